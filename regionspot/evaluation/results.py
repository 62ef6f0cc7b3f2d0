"""Detections as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from regionspot.evaluation.rle import areas_of, check_rles


@dataclass(eq=False)
class Results:
    """Detections of a data set, in the order of their file; where scores are equal, the order decides.

    Attributes:
        image_ids: (D,) int64, of the annotation file.
        category_ids: (D,) int64, of the annotation file.
        scores: (D,) float64, any finite numbers.
        boxes: (D, 4) float64 XYWH, original pixels.
        regions: (D,) int64 into ``rles``, -1 for a detection without a mask; None if there are no masks.
        rles: masks as COCO's compressed RLE, ``{"size": [height, width], "counts": str or bytes}``. Detections of
            one box share one.
        name: what they are called in errors.
        boxes_of_masks: the boxes are only those around the masks; the detections' areas are then those of the masks
            for boxes too, as in ``lvis`` and ``pycocotools``.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    regions: np.ndarray | None = None
    rles: Sequence[dict] | None = None
    name: str = "predictions"
    boxes_of_masks: bool = False

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: arrays of different lengths, scores or boxes that are not finite, a negative width or height,
                regions that are not there, damaged RLEs.
        """
        self.image_ids = self._integers("image_ids", self.image_ids)
        self.category_ids = self._integers("category_ids", self.category_ids)
        self.scores = np.asarray(self.scores, np.float64)
        self.boxes = np.asarray(self.boxes, np.float64)
        number = len(self.image_ids)
        if not len(self.boxes):
            self.boxes = self.boxes.reshape(0, 4)
        shapes = [self.image_ids.shape, self.category_ids.shape, self.scores.shape, self.boxes.shape]
        if shapes != [(number,), (number,), (number,), (number, 4)]:
            raise ValueError(
                f"{self.name}: expected image_ids, category_ids, scores of shape (D,) and boxes (D, 4), got {shapes}"
            )
        self._refuse(~np.isfinite(self.scores), "expected a finite score", self.scores)
        self._refuse(~np.isfinite(self.boxes).all(axis=1), "expected a bbox of finite numbers", self.boxes)
        negative = self.boxes[:, 2:].min(axis=1) < 0
        self._refuse(negative, "expected bbox as [x, y, width, height] with width and height >= 0", self.boxes)
        if (self.regions is None) != (self.rles is None):
            raise ValueError(f"{self.name}: expected both regions and rles, or neither")
        if self.regions is not None and self.rles is not None:
            self.regions = self._integers("regions", self.regions)
            if self.regions.shape != (number,):
                raise ValueError(f"{self.name}: expected regions of shape ({number},), got {self.regions.shape}")
            outside = (self.regions < -1) | (self.regions >= len(self.rles))
            self._refuse(outside, f"expected a region in [-1, {len(self.rles)})", self.regions)
            check_rles(self.rles, self.owner_of_mask)

    def __len__(self) -> int:
        return len(self.scores)

    def owner_of_mask(self, region: int) -> str:
        """Return in words which detection first uses a mask."""
        used = self.regions == region
        return f"{self.name}: " + (f"entry {int(np.argmax(used))}" if np.any(used) else f"rles[{region}]")

    @cached_property
    def mask_areas(self) -> np.ndarray:
        """(len(rles),) float64, pixels."""
        return areas_of(self.rles or [])

    def areas(self, task: str, segm_areas: str = "masks") -> np.ndarray:
        """Return (D,) float64 pixels: what small, medium and large mean of detections.

        Args:
            task: "bbox" or "segm".
            segm_areas: "masks", as Detectron2 does; or "boxes", as ``lvis`` does itself with a file that has both.
        """
        if self.regions is not None and (self.boxes_of_masks or (task == "segm" and segm_areas == "masks")):
            return self.mask_areas[self.regions]
        with np.errstate(over="ignore"):
            return self.boxes[:, 2] * self.boxes[:, 3]

    def require_masks(self) -> tuple[np.ndarray, Sequence[dict]]:
        """Return regions and rles.

        Raises:
            ValueError: there are none, or a detection has none.
        """
        if self.regions is None or self.rles is None:
            if len(self):
                raise ValueError(f"{self.name}: task segm needs masks, but no entry has a segmentation; use task bbox")
            return np.zeros(0, np.int64), []
        if (missing := self.regions < 0).any():
            raise ValueError(
                f"{self.name}: entry {int(missing.argmax())} has no segmentation while others have; "
                "task segm needs one of each, use task bbox"
            )
        return self.regions, self.rles

    def _integers(self, key: str, values: Any) -> np.ndarray:
        array = np.asarray(values)
        if array.size and array.dtype.kind not in "iu":
            raise ValueError(f"{self.name}: expected {key} to be integers, got {array.dtype}")
        return array.astype(np.int64)

    def _refuse(self, wrong: np.ndarray, expected: str, values: np.ndarray) -> None:
        if wrong.any():
            index = int(wrong.argmax())
            raise ValueError(
                f"{self.name}: entry {index}: {expected}, got {values[index].tolist()} "
                f"({int(wrong.sum())} such of {len(wrong)})"
            )
