"""Reading pictures."""

from pathlib import Path

import numpy as np
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from PIL import Image

_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_EXIF_ORIENTATION = 0x0112


def read_image(path: str | Path, image_format: str = "RGB") -> np.ndarray:
    """Return a picture as (H, W, 3) uint8, see ``decode_image``."""
    return decode_image(path, image_format)[0]


def decode_image(path: str | Path, image_format: str, reduced_size: int = 0) -> tuple[np.ndarray, tuple[int, int]]:
    """Read a picture as Detectron2 does, turned upright by its EXIF tag.

    Args:
        path: the file.
        image_format: "RGB" or "BGR".
        reduced_size: let a JPEG be decoded at a half, a quarter or an eighth of its size, as long as its shorter side
            keeps at least so many pixels; 0 decodes it whole.

    Returns:
        (H, W, 3) uint8, and the (height, width) of the whole picture.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no picture, a damaged one, or one of more than 8 bits a channel.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"image {path}: no such file")
    try:
        with Image.open(path) as image:
            if image.mode in _DEEP_MODES:
                raise ValueError(f"expected 8 bits a channel, got mode {image.mode}; convert it first")
            width, height = image.size
            if image.getexif().get(_EXIF_ORIENTATION, 1) >= 5:  # lies on its side
                width, height = height, width
            if reduced_size and image.format == "JPEG":
                image.draft(image.mode, (reduced_size, reduced_size))
            return convert_PIL_to_numpy(_apply_exif_orientation(image), image_format), (height, width)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error
