"""Reading pictures."""

from pathlib import Path

import numpy as np
from detectron2.data.detection_utils import read_image as read_detectron2_image
from PIL import Image

_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


def read_image(path: str | Path, image_format: str = "RGB") -> np.ndarray:
    """Read a picture as Detectron2 does, turned upright by its EXIF tag.

    Args:
        path: the file.
        image_format: "RGB" or "BGR".

    Returns:
        (H, W, 3) uint8.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no picture, a damaged one, or one of more than 8 bits a channel.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"image {path}: no such file")
    try:
        with Image.open(path) as image:
            mode = image.mode
        if mode in _DEEP_MODES:
            raise ValueError(f"expected 8 bits a channel, got mode {mode}; convert it first")
        return read_detectron2_image(str(path), format=image_format)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error
