"""Where labels are: inside the image, never on each other, and on as little of other regions as possible."""

from dataclasses import dataclass

import numpy as np

_RINGS = (1.5, 3, 5, 8, 12)  # distances of labels with a leader line, in heights of the label
_DIRECTIONS = 16
_OWN_COST = 0.25  # of covering the label's own region wholly; other regions count 1
_RANK_COST = 0.02  # of each place that is less usual


@dataclass(frozen=True)
class Placement:
    """The rectangle of a label, in integer pixels; the right and bottom ends are exclusive.

    Attributes:
        region: index of the region.
        x0, y0, x1, y1: the corners.
        leader: the line from the label to its region, (x0, y0, x1, y1) in pixels; None for a label beside it.
    """

    region: int
    x0: int
    y0: int
    x1: int
    y1: int
    leader: tuple[int, int, int, int] | None = None


class LabelPlacer:
    """Places labels one by one; each keeps the place that it got.

    Attributes:
        placements: of all labels until now.
    """

    def __init__(self, boxes: np.ndarray, image_size: tuple[int, int], max_share: float = 1.0) -> None:
        """
        Args:
            boxes: (N, 4) float XYXY, pixels, of all regions, which labels should leave free.
            image_size: (height, width) in pixels.
            max_share: the part of the image that all labels together may cover.
        """
        self.height, self.width = image_size
        self.boxes = np.clip(boxes, 0, [self.width, self.height] * 2).astype(np.float64)
        self.placements: list[Placement] = []
        self._occupied = np.zeros((len(boxes) + 1, 4))  # (N + 1, 4), of which the first len(placements) rows count
        self._free_area = max_share * self.height * self.width

    def place(
        self, region: int, size: tuple[int, int], with_leader: bool = True, beyond_share: bool = False
    ) -> Placement | None:
        """Place the label of a region; None if there is no free place for it.

        Args:
            region: row of the boxes.
            size: (width, height) of the label, pixels.
            with_leader: whether the label may be away from its region, joined by a line.
            beyond_share: whether labels may cover more than ``max_share`` by this one.
        """
        width, height = size
        if width > self.width or height > self.height or (width * height > self._free_area and not beyond_share):
            return None
        corners = self._best(region, self._beside(region, width, height), size)
        leader = None
        if corners is None and with_leader:
            corners = self._best(region, self._around(region, width, height), size)
            leader = None if corners is None else self._leader(region, corners)
        if corners is None:
            return None
        placement = Placement(region, *corners, leader)
        self._occupied[len(self.placements)] = corners
        self.placements.append(placement)
        self._free_area -= width * height
        return placement

    def _beside(self, region: int, width: int, height: int) -> np.ndarray:
        """Return (M, 2) top left corners at the region, the most usual first."""
        x0, y0, x1, y1 = self.boxes[region]
        left, right, middle = np.floor(x0), np.ceil(x1) - width, (x0 + x1 - width) // 2
        above, below, top, bottom = np.floor(y0) - height, np.ceil(y1), np.floor(y0), np.ceil(y1) - height
        places = [(left, above), (right, above), (left, below), (right, below), (left, top), (right, top)]
        places += [(left, bottom), (right, bottom), (middle, above), (middle, below)]
        places += [(np.floor(x0) - width, top), (np.ceil(x1), top), (middle, (y0 + y1 - height) // 2)]
        return np.array(places)

    def _around(self, region: int, width: int, height: int) -> np.ndarray:
        """Return (M, 2) top left corners on rings around the region, the nearest first."""
        x0, y0, x1, y1 = self.boxes[region]
        angles = np.arange(_DIRECTIONS) * (2 * np.pi / _DIRECTIONS) - np.pi / 2
        directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # up first
        half = np.array([(x1 - x0 + width) / 2, (y1 - y0 + height) / 2])
        center = np.array([(x0 + x1 - width) / 2, (y0 + y1 - height) / 2])
        rings = [center + directions * (half + ring * height) for ring in _RINGS]
        return np.concatenate(rings)

    def _best(self, region: int, places: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
        """Return the corners of the free place that covers least, None if no place is free."""
        limit = np.array([self.width - size[0], self.height - size[1]])
        corners = np.floor(places).clip(0, limit)  # moved into the image
        rectangles = np.concatenate([corners, corners + size], axis=1)  # (M, 4)
        is_free = ~(intersections(rectangles, self._occupied[: len(self.placements)]) > 0).any(axis=1)
        if not is_free.any():
            return None
        areas = (self.boxes[:, 2:] - self.boxes[:, :2]).prod(axis=1).clip(1)
        covered = intersections(rectangles[is_free], self.boxes) / areas  # (free, N)
        covered[:, region] *= _OWN_COST
        # A small region under a label is lost, a large one is not: the most covered region decides.
        cost = covered.max(axis=1) + _RANK_COST * np.flatnonzero(is_free) * len(_RINGS) / len(places)
        x0, y0, x1, y1 = rectangles[is_free][cost.argmin()].astype(int).tolist()
        return x0, y0, x1, y1

    def _leader(self, region: int, corners: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """Return the line from the label's border to the nearest point of the region's box."""
        x0, y0, x1, y1 = self.boxes[region].clip(0, [self.width - 1, self.height - 1] * 2)
        left, top, right, bottom = corners
        center = ((left + right) / 2, (top + bottom) / 2)
        end = (int(np.clip(center[0], x0, x1)), int(np.clip(center[1], y0, y1)))
        start = (int(np.clip(end[0], left, right - 1)), int(np.clip(end[1], top, bottom - 1)))
        return (*start, *end)


def intersections(rectangles: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the (M, N) areas that (M, 4) and (N, 4) rectangles XYXY have in common."""
    low = np.maximum(rectangles[:, None, :2], others[None, :, :2])
    high = np.minimum(rectangles[:, None, 2:], others[None, :, 2:])
    return (high - low).clip(0).prod(axis=2)
