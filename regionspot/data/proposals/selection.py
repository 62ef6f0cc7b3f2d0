"""Selecting proposals: the best of each image, without those that overlap."""

import numpy as np
import torch
from torchvision.ops import batched_nms, nms

from regionspot.data.proposals.arrays import ProposalArrays


def select_proposals(
    proposals: ProposalArrays, top_k: int | None = None, nms_iou: float | None = None, min_score: float | None = None
) -> ProposalArrays:
    """Return the selected proposals of each image, in their order.

    Args:
        proposals: of many images.
        top_k: keep the best of each image, after the other two steps; the first of equal scores.
        nms_iou: drop boxes that overlap a better one (of the same label, if there are labels) with more than this IoU.
        min_score: drop boxes with lower scores.

    Raises:
        ValueError: a value out of its range, or proposals without scores.
    """
    if top_k is None and nms_iou is None and min_score is None:
        return proposals
    if proposals.scores is None:
        raise ValueError(
            "top-k, NMS and a minimum score need scores, but the file has none; convert it without these options"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top-k: expected 1 or more, got {top_k}")
    for name, value in (("the IoU of NMS", nms_iou), ("the minimum score", min_score)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    # float32, as the scores are: 0.3 as float64 is not a score of 0.3
    keep = np.ones(len(proposals.boxes), bool) if min_score is None else proposals.scores >= np.float32(min_score)
    for index in range(len(proposals.image_ids)):
        rows = proposals.rows(index)
        remaining = np.flatnonzero(keep[rows]) + rows.start
        if nms_iou is not None:
            remaining = remaining[_suppress(proposals, remaining, nms_iou)]
        if top_k is not None:
            # stable, so that the same file always gives the same boxes
            remaining = remaining[np.argsort(-proposals.scores[remaining], kind="stable")[:top_k]]
        keep[rows] = False
        keep[remaining] = True
    return proposals.select(keep)


def _suppress(proposals: ProposalArrays, rows: np.ndarray, iou: float) -> np.ndarray:
    """Return the indices into ``rows`` that survive NMS, increasing."""
    assert proposals.scores is not None
    # float64: batched_nms moves the boxes of each label far away from the others, where float32 is too coarse.
    boxes = torch.from_numpy(proposals.boxes[rows]).double()
    scores = torch.from_numpy(proposals.scores[rows])
    if proposals.labels is None:
        return nms(boxes, scores.double(), iou).sort().values.numpy()
    _, labels = np.unique(proposals.labels[rows], return_inverse=True)
    return batched_nms(boxes, scores.double(), torch.from_numpy(labels), iou).sort().values.numpy()
