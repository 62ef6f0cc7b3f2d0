"""From logits to detections: class probabilities, unknown regions, the best (box, class) pairs."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances, pairwise_iou

# The released models are trained by sigmoid and tested by softmax.
SCORE_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(dim=1),
    "sigmoid": torch.sigmoid,
}
SCORE_RULES = ("product", "class", "proposal")
NUM_TOP_CLASSES = 5  # that each region reports


@dataclass
class Recognition:
    """What is recognized in one image.

    Attributes:
        detections: best first, with ``pred_boxes``, ``scores``, ``pred_classes`` and ``region_indices`` (the row of the
            box in the input). Unknown regions have no detections.
        regions: all regions in the order of their boxes, with ``pred_boxes``, ``top_classes`` and ``top_scores`` (N, up
            to 5; class probabilities) and ``unknown`` (N,) bool.

    Both have ``region_embeddings`` (N, text_dim) float32, normalized, with ``MODEL.REGIONSPOT.REGION_EMBEDDINGS``.
    """

    detections: Instances
    regions: Instances


@dataclass(frozen=True)
class DetectionRule:
    """How detections follow from the logits of an image's regions.

    Attributes:
        score_function: class probabilities by "softmax" over the vocabulary, or "sigmoid".
        score_rule: a detection's score: "product" of proposal score and class probability, or either alone: "class"
            or "proposal" (for the best class of a region only). Without proposal scores it is "class".
        score_thresh: detections with lower scores are dropped.
        labels_per_box: number of best classes of a region that may become detections; -1 for all.
        nms_thresh: IoU threshold of class-wise non-maximum suppression; 1 for none.
        top_k: number of best detections to keep of an image; -1 for all.
        unknown_thresh: a region whose best class is less probable than this is unknown; 0 for none.
    """

    score_function: str = "softmax"
    score_rule: str = "product"
    score_thresh: float = 0.0
    labels_per_box: int = -1
    nms_thresh: float = 1.0
    top_k: int = 100
    unknown_thresh: float = 0.0

    def __post_init__(self) -> None:
        if self.score_function not in SCORE_FUNCTIONS:
            raise ValueError(
                f"MODEL.REGIONSPOT.SCORE_FUNCTION: expected {' or '.join(SCORE_FUNCTIONS)}; got {self.score_function!r}"
            )
        if self.score_rule not in SCORE_RULES:
            raise ValueError(f"MODEL.REGIONSPOT.SCORE_RULE: expected {', '.join(SCORE_RULES)}; got {self.score_rule!r}")
        if self.labels_per_box == 0:
            raise ValueError("MODEL.REGIONSPOT.LABELS_PER_BOX: expected at least 1, or -1 for all, got 0")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "DetectionRule":
        node = cfg.MODEL.REGIONSPOT
        return cls(
            score_function=node.SCORE_FUNCTION,
            score_rule=node.SCORE_RULE,
            score_thresh=node.SCORE_THRESH_TEST,
            labels_per_box=node.LABELS_PER_BOX,
            nms_thresh=node.NMS_THRESH_TEST,
            top_k=cfg.TEST.DETECTIONS_PER_IMAGE,
            unknown_thresh=node.UNKNOWN.THRESHOLD,
        )

    def detect(
        self,
        boxes: Boxes,
        logits: torch.Tensor,
        proposal_scores: torch.Tensor | None,
        image_size: tuple[int, int],
        num_background: int = 0,
        classes: torch.Tensor | None = None,
    ) -> Recognition:
        """Turn the logits of an image's regions into detections.

        Args:
            boxes: of the N regions, XYXY, output pixels.
            logits: (N, K + num_background) float.
            proposal_scores: (N,) in [0, 1], or None.
            image_size: (height, width) of the output.
            num_background: number of names at the end of the vocabulary that are background prompts.
            classes: (K,) bool, which classes may become detections; all by default.
        """
        probabilities = self.probabilities(logits)
        unknown = self.is_unknown(probabilities, num_background)
        probabilities = probabilities[:, : probabilities.shape[1] - num_background]
        scores = torch.where(unknown[:, None], -1, self.scores(probabilities, proposal_scores))  # (N, K)
        if classes is not None:
            scores = torch.where(classes.to(scores.device), scores, -1)
        top = probabilities.topk(min(NUM_TOP_CLASSES, probabilities.shape[1]), dim=1)
        # top_classes do not know the rule: they are reported also for unknown regions
        fields = {"pred_boxes": boxes, "top_classes": top.indices, "top_scores": top.values, "unknown": unknown}
        return Recognition(self.select(boxes.tensor, scores, image_size), Instances(image_size, **fields))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return (N, K) class probabilities of (N, K) logits."""
        return SCORE_FUNCTIONS[self.score_function](logits)

    def is_unknown(self, probabilities: torch.Tensor, num_background: int = 0) -> torch.Tensor:
        """Return (N,) bool: the regions of no class, by ``probabilities`` (N, K + num_background), background last.

        They are those whose best name is a background name or less probable than ``unknown_thresh``.
        """
        if not probabilities.shape[1]:
            return torch.ones(len(probabilities), dtype=torch.bool, device=probabilities.device)
        best, index = probabilities.max(dim=1)
        return (best < self.unknown_thresh) | (index >= probabilities.shape[1] - num_background)

    def scores(self, probabilities: torch.Tensor, proposal_scores: torch.Tensor | None) -> torch.Tensor:
        """Return (N, K) scores of (box, class) pairs, -1 for a pair that must not become a detection."""
        scores = probabilities
        if proposal_scores is not None and self.score_rule == "product":
            scores = scores * proposal_scores.to(scores)[:, None]
        labels = self.labels_per_box
        if proposal_scores is not None and self.score_rule == "proposal":
            scores, labels = proposal_scores.to(scores)[:, None].expand_as(scores), 1
        # the best by probability, not by score: where a proposal's score is 0, all scores tie
        if 0 < labels < scores.shape[1]:
            best = probabilities.topk(labels, dim=1).indices
            scores = torch.full_like(scores, -1).scatter(1, best, scores.gather(1, best))
        return scores

    def select(self, boxes: torch.Tensor, scores: torch.Tensor, image_size: tuple[int, int]) -> Instances:
        """Return the best (box, class) pairs of an image, see ``Recognition.detections``.

        Args:
            boxes: (N, 4) float, XYXY, output pixels.
            scores: (N, K) float in [0, 1], negative for pairs that must not be kept.
            image_size: (height, width) of the output.
        """
        pairs = scores.flatten()  # (N * K,)
        # suppression comes before the limit, so it needs all pairs
        num_pairs = len(pairs) if self.top_k < 0 or self.nms_thresh < 1 else min(self.top_k, len(pairs))
        # topk, not sort: an image may have a million pairs
        best, index = pairs.topk(num_pairs)
        index = index[best >= max(self.score_thresh, 0)]  # pairs that must not be kept have -1
        regions, classes = index // max(scores.shape[1], 1), index % max(scores.shape[1], 1)
        if self.nms_thresh < 1:
            keep = batched_nms(boxes[regions], pairs[index], classes, self.nms_thresh)  # best first
            keep = keep if self.top_k < 0 else keep[: self.top_k]
            index, regions, classes = index[keep], regions[keep], classes[keep]
        return Instances(
            image_size,
            pred_boxes=Boxes(boxes[regions]),
            scores=pairs[index],
            pred_classes=classes,
            region_indices=regions,
        )


def merge_detections(detections: Instances, preferred: Instances, nms_thresh: float, top_k: int) -> Instances:
    """Merge an image's detections from two sources of different classes by score.

    Best first, each detection suppresses those of the other source that overlap it by more than ``nms_thresh`` (1 keeps
    all), whatever their classes. Detections of the same source do not affect each other: their own rule did that.

    Both have ``pred_boxes``, ``scores``, ``pred_classes`` and ``region_indices``; ``preferred`` ones come first where
    scores tie. At most ``top_k`` detections stay, best first; -1 for all.
    """
    merged = Instances.cat([preferred, detections])
    order = merged.scores.argsort(descending=True, stable=True)
    merged = merged[order]
    if nms_thresh < 1:
        source = order >= len(preferred)  # (N,)
        overlaps = pairwise_iou(merged.pred_boxes, merged.pred_boxes) > nms_thresh  # (N, N)
        rivals = overlaps & (source[:, None] != source)
        merged = merged[torch.from_numpy(_greedy_keep(rivals.cpu().numpy())).to(source.device)]
    return merged if top_k < 0 else merged[:top_k]


def _greedy_keep(rivals: np.ndarray) -> np.ndarray:
    """Return (N,) bool: the rows that stay if each that stays removes its later ``rivals`` (N, N)."""
    keep = np.ones(len(rivals), dtype=bool)
    for row in np.flatnonzero(rivals.any(axis=1)):
        if keep[row]:
            keep[row + 1 :] &= ~rivals[row, row + 1 :]
    return keep
