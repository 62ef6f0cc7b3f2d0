"""Masks as polygons, for tools that cannot read run lengths."""

import cv2
import numpy as np

from regionspot.utils.rle import crop_rle


def rle_polygons(rle: dict) -> list[list[float]]:
    """Return the outer contours of a mask as polygons, [[x0, y0, x1, y1, ...], ...] in pixels.

    The parts of a mask that are apart are polygons of their own; holes are filled. Points are on the border of the
    pixels, not at their centers: the box around the polygons is the box around the mask.

    Args:
        rle: a valid RLE of COCO.
    """
    mask = crop_rle(rle)
    if mask is None:
        return []
    pixels, (left, top) = mask
    # At twice the size a pixel has four points, whose outermost are moved to its corners.
    doubled = pixels.repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = []
    for contour in contours:
        ends = contour.reshape(-1, 2)  # of pixels: even numbers are left and top ends, odd ones right and bottom ends
        points = (ends + ends % 2) / 2 + np.array([left, top])
        polygons.append(points.ravel().tolist())
    return polygons
