"""From logits to detections: scores, the best (box, class) pairs."""

from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances, pairwise_iou

SCORE_FUNCTIONS = {"softmax": lambda logits: logits.softmax(dim=1), "sigmoid": torch.sigmoid}
SCORE_RULES = ("product", "class", "proposal")


@dataclass
class DetectionRule:
    """How detections follow from the logits of an image's regions.

    Attributes:
        score_function: class probabilities by "softmax" over the vocabulary, or "sigmoid".
        score_rule: a detection's score: "product" of proposal score and class probability, or either alone: "class"
            or "proposal" (which then goes to the best class of a region). Without proposal scores it is "class".
        score_thresh: detections scoring lower are dropped.
        labels_per_box: best classes of a region that may become detections; -1 for all.
        nms_thresh: of two detections of a class whose boxes have more IoU than this only the better stays; 1 for none.
        top_k: detections an image at the most; -1 for all.
        unknown_thresh: a region whose best class is less probable than this is unknown; 0 for none.
        background: number of names at the end of the vocabulary that are background prompts: a region whose best
            class is one of them is unknown.
    """

    score_function: str = "softmax"
    score_rule: str = "product"
    score_thresh: float = 0.0
    labels_per_box: int = -1
    nms_thresh: float = 1.0
    top_k: int = 100
    unknown_thresh: float = 0.0
    background: int = 0

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

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return (N, K) class probabilities of (N, K) logits."""
        return SCORE_FUNCTIONS[self.score_function](logits)

    def is_unknown(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return (N,) bool: which regions, by their (N, K) probabilities, are of no class of the vocabulary."""
        if not probabilities.shape[1]:
            return torch.ones(len(probabilities), dtype=torch.bool, device=probabilities.device)
        best, index = probabilities.max(dim=1)
        return (best < self.unknown_thresh) | (index >= probabilities.shape[1] - self.background)

    def scores(self, probabilities: torch.Tensor, proposal_scores: torch.Tensor | None) -> torch.Tensor:
        """Return (N, K) scores of (box, class) pairs; a pair that may be no detection has -1.

        Args:
            probabilities: (N, K) class probabilities.
            proposal_scores: (N,) in [0, 1], or None.
        """
        scores = probabilities
        if proposal_scores is not None and self.score_rule == "product":
            scores = scores * proposal_scores.to(scores)[:, None]
        labels = self.labels_per_box
        if proposal_scores is not None and self.score_rule == "proposal":
            scores, labels = proposal_scores.to(scores)[:, None].expand_as(scores), 1
        if 0 < labels < scores.shape[1]:
            best = probabilities.topk(labels, dim=1).indices
            scores = torch.full_like(scores, -1).scatter(1, best, scores.gather(1, best))
        return scores

    def select(self, boxes: torch.Tensor, scores: torch.Tensor, image_size: tuple[int, int]) -> Instances:
        """Keep the best (box, class) pairs of an image.

        Args:
            boxes: (N, 4) float, XYXY, output pixels.
            scores: (N, K) float in [0, 1], negative for pairs that may not be kept.
            image_size: (height, width) of the output.

        Returns:
            Instances with ``pred_boxes``, ``scores``, ``pred_classes`` and ``region_indices`` (the row of ``boxes``),
            best first.
        """
        flat = scores.flatten()
        number = len(flat) if self.top_k < 0 or self.nms_thresh < 1 else min(self.top_k, len(flat))
        best, index = flat.topk(number)
        index = index[best >= max(self.score_thresh, 0)]
        regions, classes = index // max(scores.shape[1], 1), index % max(scores.shape[1], 1)
        if self.nms_thresh < 1:
            kept = batched_nms(boxes[regions], flat[index], classes, self.nms_thresh)
            kept = kept if self.top_k < 0 else kept[: self.top_k]
            index, regions, classes = index[kept], regions[kept], classes[kept]
        instances = Instances(image_size)
        instances.pred_boxes = Boxes(boxes[regions])
        instances.scores = flat[index]
        instances.pred_classes = classes
        instances.region_indices = regions
        return instances


def merge_detections(ours: Instances, theirs: Instances, nms_thresh: float, top_k: int) -> Instances:
    """Merge an image's detections from two sources of different classes by score.

    Best first, each detection suppresses those of the other source that have more IoU with it than ``nms_thresh``,
    whatever their classes. What a source says of an object does not touch what else it says. Ties are theirs.

    Args:
        ours, theirs: with ``pred_boxes``, ``scores``, ``pred_classes`` and ``region_indices``.
        nms_thresh: 1 keeps all.
        top_k: detections kept at the most; -1 for all.

    Returns:
        Instances with these four fields, best first.
    """
    merged = Instances.cat([theirs, ours])
    order = merged.scores.argsort(descending=True, stable=True)
    merged = merged[order]
    if nms_thresh < 1:
        source = order >= len(theirs)  # (N,), True where it is ours
        rivals = (pairwise_iou(merged.pred_boxes, merged.pred_boxes) > nms_thresh) & (source[:, None] != source)
        merged = merged[torch.from_numpy(_greedy_keep(rivals.cpu().numpy())).to(source.device)]
    return merged if top_k < 0 else merged[:top_k]


def _greedy_keep(rivals: np.ndarray) -> np.ndarray:
    """Return (N,) bool: which rows stay where each that stays removes its later (N, N) ``rivals``."""
    kept = np.ones(len(rivals), dtype=bool)
    for row in np.flatnonzero(rivals.any(axis=1)):
        if kept[row]:
            kept[row + 1 :] &= ~rivals[row, row + 1 :]
    return kept
