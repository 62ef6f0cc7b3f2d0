"""Which of an image's recognized regions are kept."""

from dataclasses import dataclass

import numpy as np
import torch
from detectron2.layers import batched_nms

from regionspot.modeling.region_predictions import RegionPredictions


@dataclass(frozen=True)
class RegionFilter:
    """Keeps the regions that are good enough; by default all of them.

    Attributes:
        score_thresh: regions with lower ``detection_scores`` are dropped.
        nms_thresh: of two regions of a class with a greater IoU only the better one is kept; 1 keeps both.
        top_k: number of best regions to keep of an image; -1 for all.
        keep_unknown: keep regions of no class (``MODEL.REGIONSPOT.UNKNOWN``), whatever their scores.
    """

    score_thresh: float = 0.0
    nms_thresh: float = 1.0
    top_k: int = -1
    keep_unknown: bool = True

    def __post_init__(self) -> None:
        for name in ("score_thresh", "nms_thresh"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(self, name)}")
        if self.top_k < -1:
            raise ValueError(f"top_k: expected at least 0, or -1 for all regions, got {self.top_k}")

    def __call__(self, predictions: RegionPredictions) -> RegionPredictions:
        """Return the regions that are kept, in their order."""
        scores, unknown = predictions.detection_scores, predictions.unknown
        keep = np.where(unknown, self.keep_unknown, scores >= self.score_thresh)
        rows = np.flatnonzero(keep)
        if self.nms_thresh < 1 and len(rows):
            boxes, row_scores = torch.from_numpy(predictions.boxes[rows]), torch.from_numpy(scores[rows])
            # unknown regions are a class of their own
            classes = torch.from_numpy(np.where(unknown, -1, predictions.classes)[rows] + 1)
            rows = rows[batched_nms(boxes, row_scores, classes, self.nms_thresh).numpy()]
        if 0 <= self.top_k < len(rows):
            rows = rows[np.argsort(-scores[rows], kind="stable")[: self.top_k]]
        return predictions[np.sort(rows)]
