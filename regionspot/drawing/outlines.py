"""Outlines and filled masks of regions."""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from regionspot.drawing.palette import Color
from regionspot.utils.rle import CroppedMask, check_rles, crop_rle

MaskReader = Callable[[int], CroppedMask | None]


def mask_reader(regions: Any, image_size: tuple[int, int]) -> MaskReader | None:
    """Return a function that gives the mask of a region, one at a time; None for regions without masks.

    Args:
        regions: with ``rles``, N compressed COCO RLEs, or else ``masks``, (N, H, W) bool.
        image_size: (height, width) in pixels.

    Raises:
        ValueError: masks of another size or number, or a damaged RLE.
    """
    num_regions, masks = len(regions.boxes), None
    if (rles := getattr(regions, "rles", None)) is None and (masks := getattr(regions, "masks", None)) is None:
        return None
    num_masks = len(rles) if rles is not None else len(masks)  # type: ignore[arg-type]
    if num_masks != num_regions:
        raise ValueError(f"masks: expected {num_regions}, one of each region, got {num_masks}")
    if masks is not None:
        if masks.shape[1:] != image_size:
            raise ValueError(f"masks: expected shape (N, {image_size[0]}, {image_size[1]}), got {masks.shape}")
        return lambda index: crop_mask(np.asarray(masks[index]).astype(np.uint8))
    assert rles is not None
    packed = check_rles(rles, lambda index: f"mask {index}", np.tile(image_size, (num_regions, 1)))
    return lambda index: crop_rle(packed[index])


def crop_mask(mask: np.ndarray) -> CroppedMask | None:
    """Return the part of a (H, W) uint8 mask that has all its pixels, and its corner; None for no pixels."""
    x, y, width, height = cv2.boundingRect(mask)
    if not width:
        return None
    return np.ascontiguousarray(mask[y : y + height, x : x + width]), (x, y)


def fill_mask(image: np.ndarray, mask: CroppedMask, color: Color, opacity: float) -> None:
    """Mix a color into the pixels of a mask."""
    pixels, (x, y) = mask
    window = image[y : y + pixels.shape[0], x : x + pixels.shape[1]]
    values = np.arange(256)[:, None] * (1 - opacity) + np.array(color) * opacity  # (256, 3), what each value becomes
    mixed = cv2.LUT(window, values.round().astype(np.uint8)[None])
    np.copyto(window, mixed, where=pixels.astype(bool)[..., None])


def draw_contours(image: np.ndarray, mask: CroppedMask, color: Color, width: int) -> None:
    """Draw the contours of a mask, those of its holes too."""
    contours, _ = cv2.findContours(mask[0], cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE, offset=mask[1])
    cv2.drawContours(image, contours, -1, color, width, cv2.LINE_AA)


def draw_box(image: np.ndarray, box: np.ndarray, color: Color, width: int) -> None:
    """Draw the border of a (4,) box XYXY from its edges inward, so that it is whole at the border of the image."""
    limit = np.array([image.shape[1], image.shape[0]])
    # clipped as floats: a box may end far outside
    x0, y0 = np.floor(box[:2].clip(0, limit - 1)).astype(int).tolist()
    x1, y1 = np.ceil(box[2:].clip([x0 + 1, y0 + 1], limit)).astype(int).tolist()
    width = min(width, x1 - x0, y1 - y0)
    image[y0 : y0 + width, x0:x1] = image[y1 - width : y1, x0:x1] = color
    image[y0:y1, x0 : x0 + width] = image[y0:y1, x1 - width : x1] = color
