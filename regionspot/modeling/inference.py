"""From logits to detections."""

import torch
from detectron2.structures import Boxes, Instances

SCORE_FUNCTIONS = {"softmax": lambda logits: logits.softmax(dim=1), "sigmoid": torch.sigmoid}


def class_probabilities(logits: torch.Tensor, score_function: str) -> torch.Tensor:
    """Return (N, K) probabilities of (N, K) logits by "softmax" over the vocabulary or "sigmoid"."""
    return SCORE_FUNCTIONS[score_function](logits)


def select_detections(
    boxes: torch.Tensor, scores: torch.Tensor, image_size: tuple[int, int], top_k: int, score_thresh: float = 0.0
) -> Instances:
    """Keep the best (box, class) pairs of an image.

    Args:
        boxes: (N, 4) float, XYXY, output pixels.
        scores: (N, K) float in [0, 1].
        image_size: (height, width) of the output.
        top_k: pairs kept at the most; -1 keeps all.
        score_thresh: pairs scoring lower are dropped.

    Returns:
        Instances with ``pred_boxes``, ``scores``, ``pred_classes`` and ``region_indices`` (the row of ``boxes``),
        best first.
    """
    flat = scores.flatten()
    number = len(flat) if top_k < 0 else min(top_k, len(flat))
    best, index = flat.topk(number)
    index = index[best >= score_thresh]
    regions = index // scores.shape[1]
    instances = Instances(image_size)
    instances.pred_boxes = Boxes(boxes[regions])
    instances.scores = flat[index]
    instances.pred_classes = index % scores.shape[1]
    instances.region_indices = regions
    return instances
