"""Regions as they are drawn in the page: boxes, points, or both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_REGIONS = 300
MAX_POINTS = 50  # of a region


@dataclass(frozen=True)
class DrawnRegion:
    """A region of an image.

    Attributes:
        box: XYXY, original pixels, or None.
        points: x, y (original pixels) and label of each point: 1 on the object, 0 beside it.
    """

    box: tuple[float, float, float, float] | None = None
    points: tuple[tuple[float, float, int], ...] = ()


def parse_regions(value: Any) -> list[DrawnRegion]:
    """Return the regions that the page sends: a list of {"box": [x0, y0, x1, y1], "points": [[x, y, label], ...]}.

    Raises:
        ValueError: no regions, too many, or not what the page sends.
    """
    if not value:
        raise ValueError('no regions: draw a box, click a point, or press "Everything"')
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f"regions: expected a list of boxes and points, got {str(value)[:80]}")
    if len(value) > MAX_REGIONS:
        raise ValueError(f"regions: expected at most {MAX_REGIONS}, got {len(value)}")
    return [_parse_region(entry) for entry in value]


def _parse_region(entry: dict[str, Any]) -> DrawnRegion:
    box, points = entry.get("box"), entry.get("points") or []
    if box is None and not points:
        raise ValueError("regions: expected a box or points, got neither")
    if not isinstance(points, list) or len(points) > MAX_POINTS:
        raise ValueError(f"regions: expected at most {MAX_POINTS} points, got {str(points)[:80]}")
    if not points or box is not None:
        _check_numbers(box, 4)
    for point in points:
        _check_numbers(point, 3)
    if box is None and not any(point[2] for point in points):
        raise ValueError("regions: expected a point on the object, got background points alone")
    return DrawnRegion(tuple(box) if box is not None else None, tuple((x, y, int(label)) for x, y, label in points))


def _check_numbers(values: Any, count: int) -> None:
    is_valid = isinstance(values, list) and len(values) == count
    if not is_valid or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in values):
        raise ValueError(f"regions: expected {count} numbers, got {str(values)[:80]}")


def group_prompts(regions: Sequence[DrawnRegion]) -> list[tuple[list[int], dict[str, np.ndarray]]]:
    """Return the prompts of regions in groups of one kind: boxes, points, or boxes with points.

    SAM decodes regions of one kind together: a box cannot be padded.

    Returns:
        For each group the indices of its n regions, and their prompts as ``RegionSpotPredictor.predict`` takes them:
        ``boxes`` (n, 4), ``points`` (n, P, 2) float32 and ``point_labels`` (n, P) int64, padded with -1.
    """
    groups: dict[tuple[bool, bool], list[int]] = {}
    for index, region in enumerate(regions):
        groups.setdefault((region.box is not None, bool(region.points)), []).append(index)
    return [(rows, _to_arrays([regions[row] for row in rows])) for rows in groups.values()]


def _to_arrays(regions: list[DrawnRegion]) -> dict[str, np.ndarray]:
    arrays = {}
    if regions[0].box is not None:
        arrays["boxes"] = np.array([region.box for region in regions], np.float32)
    if longest := max(len(region.points) for region in regions):
        arrays["points"] = np.zeros((len(regions), longest, 2), np.float32)
        arrays["point_labels"] = np.full((len(regions), longest), -1)
        for row, region in enumerate(regions):
            for column, (x, y, label) in enumerate(region.points):
                arrays["points"][row, column] = x, y
                arrays["point_labels"][row, column] = label
    return arrays
