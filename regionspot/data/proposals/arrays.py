"""Proposals of many images as a few arrays, the same for every file format."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

LIMIT = 1e9  # pixels; no image is as large, so that larger numbers are dropped like infinity and NaN
CHUNK = 1 << 20  # rows that are processed at a time, to bound memory
_ROUNDING = 1e-4  # a float32 softmax may exceed [0, 1] by this much


@dataclass(frozen=True)
class ProposalArrays:
    """The boxes of I images, N in all; those of image i are rows ``offsets[i]`` to ``offsets[i + 1]``, in file order.

    Attributes:
        image_ids: (I,) int64, increasing.
        offsets: (I + 1,) int64.
        boxes: (N, 4) float32, XYXY in the pixels of the original image, finite; not clipped to it.
        scores: (N,) float32 in [0, 1], or None.
        labels: (N,) int64 as in the file, or None.
        rles: (N,) compressed COCO RLEs ``{"size": [h, w], "counts": str}`` (None for a box without), or None.
        scores_from: what the file's scores were, "none", "probabilities" or "logits".
        num_not_finite: boxes that were dropped because a coordinate or the score is NaN or infinite.
    """

    image_ids: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray | None = None
    labels: np.ndarray | None = None
    rles: list[dict[str, Any] | None] | None = field(default=None, repr=False)
    scores_from: str = "none"
    num_not_finite: int = 0

    def rows(self, index: int) -> slice:
        """Return the rows of the ``index``-th image."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def select(self, keep: np.ndarray) -> "ProposalArrays":
        """Return the rows of ``keep``, (N,) bool; images without any keep an empty entry."""
        if keep.all():
            return self
        return replace(
            self,
            # the number of rows that are kept before each image
            offsets=np.concatenate([[0], keep.cumsum()])[self.offsets],
            boxes=self.boxes[keep],
            scores=_take(self.scores, keep),
            labels=_take(self.labels, keep),
            rles=None if self.rles is None else [self.rles[row] for row in np.flatnonzero(keep)],
        )


def gather_images(
    path: Path,
    image_ids: np.ndarray,
    lengths: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    are_logits: bool = False,
) -> ProposalArrays:
    """Return the proposals of a file that groups them by image; a ``ValueError`` names an id that occurs twice.

    ``image_ids`` (I,) are in any order, and ``lengths`` (I,) int64 their numbers of rows. ``boxes``, ``scores`` and
    ``labels`` are as in ``ProposalArrays``, but may have NaN and infinity, and scores may be logits.
    """
    # Sorted by image id, so that an image is found by binary search.
    order = np.argsort(image_ids, kind="stable")
    image_ids, sorted_lengths = image_ids[order], lengths[order]
    repeated = np.flatnonzero(np.diff(image_ids) == 0)
    if len(repeated):
        raise ValueError(f"proposals {path}: image id {image_ids[repeated[0]]} occurs twice; expected once each")
    offsets = np.concatenate([[0], sorted_lengths.cumsum()]).astype(np.int64)
    if (np.diff(order) < 0).any():
        # (N,) the row of the file for each sorted row: the images' blocks change places, rows in them keep their order
        starts = (lengths.cumsum() - lengths)[order]
        rows = np.repeat(starts - offsets[:-1], sorted_lengths) + np.arange(len(boxes))
        boxes, scores, labels = boxes[rows], _take(scores, rows), _take(labels, rows)
    return _finish(ProposalArrays(image_ids, offsets, boxes, scores, labels), are_logits)


def gather_rows(
    row_ids: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    rles: list[dict[str, Any] | None] | None = None,
) -> ProposalArrays:
    """Return the proposals of a file that lists them one by one.

    ``row_ids`` (N,) int64 are the boxes' image ids.
    """
    # Sorted in place, one column after the other: a sorted copy of all would double the memory.
    if (np.diff(row_ids) < 0).any():
        order = np.argsort(row_ids, kind="stable")
        for column in (row_ids, boxes, scores, labels):
            if column is not None:
                column[:] = column[order]
        rles = None if rles is None else [rles[row] for row in order]
    # An image begins where the id differs from the one before; the prepended id makes the first row a beginning.
    starts = np.flatnonzero(np.diff(row_ids, prepend=row_ids[:1] - 1)) if len(row_ids) else np.zeros(0, np.int64)
    offsets = np.append(starts, len(row_ids)).astype(np.int64)
    return _finish(ProposalArrays(row_ids[starts], offsets, boxes, scores, labels, rles), False)


def chunks(num_rows: int) -> Iterator[slice]:
    """Yield slices that cover ``num_rows`` rows."""
    return (slice(start, min(start + CHUNK, num_rows)) for start in range(0, num_rows, CHUNK))


def _take(column: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if column is None else column[rows]


def _finish(arrays: ProposalArrays, are_logits: bool) -> ProposalArrays:
    """Drop rows that are not finite and turn scores into float32 probabilities."""
    keep = np.empty(len(arrays.boxes), bool)
    for rows in chunks(len(keep)):
        keep[rows] = (np.abs(arrays.boxes[rows]) < LIMIT).all(axis=1)  # NaN compares as False
        if arrays.scores is not None:
            keep[rows] &= np.abs(arrays.scores[rows]) < LIMIT
    arrays = replace(arrays.select(keep), num_not_finite=len(keep) - int(keep.sum()))
    if arrays.scores is None:
        return arrays
    probabilities, are_logits = _as_probabilities(arrays.scores, are_logits)
    return replace(arrays, scores=probabilities, scores_from="logits" if are_logits else "probabilities")


def _as_probabilities(scores: np.ndarray, are_logits: bool) -> tuple[np.ndarray, bool]:
    """Return (N,) float32 in [0, 1], and whether the scores were logits: if one is outside [0, 1], all are."""
    # One score outside [0, 1] decides for all: files do not mix logits and probabilities.
    if len(scores) and not (scores.min() >= -_ROUNDING and scores.max() <= 1 + _ROUNDING):
        are_logits = True
    result = np.empty(len(scores), np.float32)
    for rows in chunks(len(scores)):
        values = scores[rows].astype(np.float64)
        with np.errstate(over="ignore"):
            result[rows] = 1 / (1 + np.exp(-values)) if are_logits else np.clip(values, 0, 1)
    return result, are_logits
