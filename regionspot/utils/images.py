"""Reading images: the only place where files and PIL images become pixels."""

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.utils.logger import log_first_n
from PIL import Image

# Others are refused before they are read: EPS would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")
# Pillow's modes of one channel with 16 or 32 bits, which its own conversion to RGB would clip at 255.
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb_array(
    image: str | Path | Image.Image | np.ndarray, deep_range: Sequence[float] = (), image_format: str = "RGB"
) -> np.ndarray:
    """Return any image as (H, W, 3) uint8 RGB, upright; transparency is dropped.

    Args:
        image: a path, a PIL image (both are rotated by their EXIF tag), or a uint8 array: (H, W, 3), (H, W, 4) with
            transparency, (H, W) or (H, W, 1) gray.
        deep_range: see ``decode_image``.
        image_format: order of an array's channels, "RGB" or "BGR".

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, a damaged one, or an array of another shape or dtype.
    """
    if image_format not in ("RGB", "BGR"):
        raise ValueError(f"image_format: expected RGB or BGR, got {image_format!r}")
    if isinstance(image, (str, Path)):
        return decode_image(image, "RGB", deep_range=deep_range)[0]
    if isinstance(image, Image.Image):
        with _one_error("image"):
            return _to_array(image, "RGB", check_deep_range(deep_range))
    array = np.asarray(image)
    shape = array.shape if array.ndim != 2 else (*array.shape, 1)
    if array.dtype != np.uint8 or len(shape) != 3 or shape[2] not in (1, 3, 4) or 0 in shape:
        raise ValueError(
            "image: expected a path, a PIL image, or a uint8 array, (H, W, 3), (H, W, 4) or gray (H, W); got shape "
            f"{array.shape} and dtype {array.dtype}"
        )
    array = array.reshape(shape)
    if shape[2] == 1:
        return array.repeat(3, axis=2)
    return array[..., :3] if image_format == "RGB" else array[..., 2::-1]


def open_image(content: bytes) -> Image.Image:
    """Open the bytes of an image file, without decoding its pixels.

    Raises:
        ValueError: not an image of ``FORMATS``, a damaged one, or one that Pillow takes for a decompression bomb.
    """
    with _one_error("image"):
        return Image.open(io.BytesIO(content), formats=FORMATS)


def decode_image(
    path: str | Path, image_format: str, reduced_size: int = 0, deep_range: Sequence[float] = ()
) -> tuple[np.ndarray, tuple[int, int]]:
    """Read an image as Detectron2 does, rotated upright by its EXIF tag.

    Args:
        path: the file.
        image_format: "RGB" or "BGR".
        reduced_size: decode a JPEG at a half, a quarter or an eighth of its size, as long as its shorter side keeps at
            least so many pixels; 0 decodes it at full size.
        deep_range: lowest and highest value of an image with more than 8 bits per channel, which become 0 and 255; ()
            for each image's own.

    Returns:
        (H, W, 3) uint8, and the (height, width) of the whole image.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image of ``FORMATS``, or a damaged one.
    """
    deep_range = check_deep_range(deep_range)
    if not Path(path).is_file():
        raise FileNotFoundError(f"image {path}: no such file")
    with _one_error(f"image {path}"), Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        # orientations 5 to 8 are rotated by 90 degrees
        size = (width, height) if _orientation(image) >= 5 else (height, width)
        if reduced_size and image.format == "JPEG":
            image.draft(image.mode, (reduced_size, reduced_size))  # changes image.size
        return _to_array(image, image_format, deep_range), size


def check_deep_range(deep_range: Sequence[float]) -> tuple[float, ...]:
    """Return ``INPUT.DEEP_RANGE`` if it is valid."""
    if len(deep_range) not in (0, 2) or (deep_range and not deep_range[0] < deep_range[1]):
        raise ValueError(f"INPUT.DEEP_RANGE: expected (lowest, highest) or (), got {tuple(deep_range)}")
    return tuple(deep_range)


@contextmanager
def _one_error(name: str) -> Iterator[None]:
    """Turn all errors of decoders into a ValueError; damaged bytes raise struct.error, SyntaxError and others."""
    try:
        yield
    except Image.UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise ValueError(f"{name} cannot be read: expected one of {kinds}; convert it, or replace it") from error
    except Exception as error:
        raise ValueError(f"{name} cannot be read: {error or type(error).__name__}") from error


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # malformed EXIF: the image is upright, as in Detectron2
        return 1
    return int(value) if value in _UPRIGHT else 1


def _to_array(image: Image.Image, image_format: str, deep_range: tuple[float, ...]) -> np.ndarray:
    orientation = _orientation(image)  # first: images made from arrays have no EXIF tag
    if image.mode in _DEEP_MODES:
        image = _to_8_bits(image, deep_range)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return convert_PIL_to_numpy(image, image_format)


def _to_8_bits(image: Image.Image, deep_range: tuple[float, ...]) -> Image.Image:
    """Scale a gray image of 16 or 32 bits to 8; infinite values are clipped, NaN becomes 0."""
    values = np.asarray(image, dtype=np.float64)
    finite = values[np.isfinite(values)]
    low, high = deep_range or ((finite.min(), finite.max()) if finite.size else (0.0, 1.0))
    message = "an image has more than 8 bits per channel (mode %s): scaled from %s, %g to %g, to 0 to 255; see %s"
    origin = "INPUT.DEEP_RANGE" if deep_range else "its own range"
    log_first_n(logging.INFO, message % (image.mode, origin, low, high, "INPUT.DEEP_RANGE"), name=__name__)
    scaled = (values - low) * (255 / ((high - low) or 1.0))
    return Image.fromarray(np.nan_to_num(scaled.clip(0, 255)).round().astype(np.uint8))
