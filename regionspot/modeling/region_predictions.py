"""What is recognized in the regions of one image, as NumPy arrays."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from regionspot.modeling.masks import RegionMasks
from regionspot.modeling.postprocessing import DetectionRule
from regionspot.utils.deprecation import renamed_attribute

UNKNOWN = "unknown"  # class name of regions of no class


@dataclass
class RegionPredictions:
    """What RegionSpot recognizes in N regions of an image, in the order of the prompts.

    Attributes:
        boxes: (N, 4) float32, XYXY, original pixels: the prompts', or those around the predicted masks.
        classes: (N,) int64, index of the best class in ``vocabulary``.
        class_names: N names of the best classes, "unknown" for unknown regions.
        scores: (N,) float32, probability of the best class.
        top_classes: (N, k) int64, the k best classes, best first.
        top_scores: (N, k) float32, their probabilities.
        logits: (N, K) float32, whose softmax or sigmoid gives the probabilities.
        predicted_ious: (N,) float32, SAM's own estimate of each mask's IoU.
        vocabulary: K class names.
        unknown: (N,) bool, regions of no class (``MODEL.REGIONSPOT.UNKNOWN``).
        embeddings: (N, text_dim) float32, normalized semantic tokens: dot products with normalized text embeddings, or
            with each other, are cosine similarities.
        proposal_scores: (N,) float32 in [0, 1], of regions that SAM or a detector found; None without.
        detection_scores: (N,) float32, what ranks detections (``MODEL.REGIONSPOT.SCORE_RULE``).
        image_size: (height, width) of the image.
        dense_embeddings: (N, text_dim) float32, CLIP's own normalized embeddings of the regions, with
            ``MODEL.REGIONSPOT.GEOMETRIC_ENSEMBLE``; None without.
        region_masks: SAM's mask logits, on the model's device; None when masks were not asked for. ``masks``, ``mask``
            and ``rles`` resize them to the image.
    """

    boxes: np.ndarray
    classes: np.ndarray
    class_names: list[str]
    scores: np.ndarray
    top_classes: np.ndarray
    top_scores: np.ndarray
    logits: np.ndarray
    predicted_ious: np.ndarray
    vocabulary: list[str]
    unknown: np.ndarray
    embeddings: np.ndarray
    proposal_scores: np.ndarray | None
    detection_scores: np.ndarray
    image_size: tuple[int, int]
    region_masks: RegionMasks | None
    dense_embeddings: np.ndarray | None = None

    labels = renamed_attribute("labels", "class_names")
    iou = renamed_attribute("iou", "predicted_ious")

    def __len__(self) -> int:
        return len(self.class_names)

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> "RegionPredictions":
        """Return some of the regions: a slice, their numbers in any order, or (N,) bool."""
        index = np.arange(len(self))[rows if isinstance(rows, slice) or len(rows) else slice(0)]
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        arrays = {name: value[index] for name, value in arrays.items() if isinstance(value, np.ndarray)}
        masks = None if self.region_masks is None else self.region_masks[torch.from_numpy(index)]
        return replace(self, class_names=[self.class_names[i] for i in index], region_masks=masks, **arrays)

    @cached_property
    def masks(self) -> np.ndarray | None:
        """(N, H, W) bool, original pixels; None when not asked for. All are computed when first read, and cached."""
        if self.region_masks is None:
            return None
        return self.region_masks.to_bitmasks(None, *self.image_size).tensor.cpu().numpy()

    @cached_property
    def rles(self) -> list[dict] | None:
        """N masks as COCO's compressed RLE; None when not asked for. Never more than a few are at full size."""
        return None if self.region_masks is None else list(self.region_masks.to_rles(*self.image_size))

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of one region, (H, W) bool, original pixels.

        Raises:
            ValueError: masks were not asked for.
        """
        if self.region_masks is None:
            raise ValueError("no masks: predict them by with_masks=True")
        return self.region_masks[int(index)].to_bitmasks(None, *self.image_size).tensor[0].cpu().numpy()


def name_regions(
    rule: DetectionRule,
    names: Sequence[str],
    logits: torch.Tensor,
    num_background: int,
    top_k: int,
    proposal_scores: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Return the fields of ``RegionPredictions`` that follow from logits.

    Args:
        rule: what becomes of logits.
        names: K class names.
        logits: (N, K + num_background) float.
        num_background: number of background names, which count in the probabilities but are no answers.
        top_k: number of best classes to report.
        proposal_scores: (N,) in [0, 1], or None.
    """
    probabilities = rule.probabilities(logits)
    unknown = rule.is_unknown(probabilities, num_background)
    probabilities = probabilities[:, : len(names)]
    top_scores, top_classes = probabilities.topk(min(top_k, len(names)), dim=1)
    best = top_classes[:, :1]
    return {
        "classes": best[:, 0].cpu().numpy(),
        "class_names": [UNKNOWN if u else names[i] for i, u in zip(best[:, 0].tolist(), unknown.tolist())],
        "scores": top_scores[:, 0].cpu().numpy(),
        "top_classes": top_classes.cpu().numpy(),
        "top_scores": top_scores.cpu().numpy(),
        "logits": logits[:, : len(names)].cpu().numpy(),
        "unknown": unknown.cpu().numpy(),
        "detection_scores": rule.scores(probabilities, proposal_scores).gather(1, best)[:, 0].cpu().numpy(),
    }
