"""Which detection is matched to which ground truth, at all IoU thresholds and area ranges at once.

It is what ``lvis.LVISEval.evaluate_img`` and ``pycocotools.COCOeval.evaluateImg`` decide: in the order of their
scores, each detection takes the remaining ground truth of its image and category with the largest IoU (the last of
equal ones), and one that is ignored only if no other reaches the threshold. A crowd is never used up. The matcher is
sparse: only pairs whose IoU reaches the lowest threshold are kept.
"""

from collections.abc import Iterator

import numpy as np

from regionspot.evaluation.ious import MIN_IOU, PairIou
from regionspot.evaluation.tables import AREA_RANGES, Detections, Truths, rank_in_group

THRESHOLDS = np.linspace(MIN_IOU, 0.95, 10)  # (T,) IoU
_PAIRS = 1 << 20  # pairs of a detection and a ground truth that are compared at a time: bounds the memory
_EDGES = 1 << 15  # edges that are matched at a time, each of which has T x A states
_IGNORED = 1 << 30  # added to the place of an ignored ground truth: later than any other
_NONE = np.iinfo(np.int32).max

Edges = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows of detections and of ground truths (E,) int64, and their IoU


def find_edges(detection_keys: np.ndarray, truth_keys: np.ndarray, iou: PairIou) -> Edges:
    """Return the pairs of one image and category whose IoU reaches the lowest threshold, ordered by detection.

    Args:
        detection_keys: (D,) int64, as ``Truths.keys``.
        truth_keys: (G,) int64, ascending.
        iou: called with rows of detections (P,) and of ground truths (P,).
    """
    first = np.searchsorted(truth_keys, detection_keys, side="left")
    counts = np.searchsorted(truth_keys, detection_keys, side="right") - first
    rows = np.flatnonzero(counts)
    edges: list[Edges] = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for block in _blocks(counts[rows], _PAIRS):
        block_rows = rows[block]
        block_counts = counts[block_rows]
        detections = np.repeat(block_rows, block_counts)
        starts = block_counts.cumsum() - block_counts
        truths = np.arange(len(detections)) + np.repeat(first[block_rows] - starts, block_counts)
        ious = iou(detections, truths)
        keep = ious >= THRESHOLDS[0]
        edges.append((detections[keep], truths[keep], ious[keep]))
    detections, truths, ious = (np.concatenate(column) for column in zip(*edges))
    return detections, truths, ious


def match(edges: Edges, detections: Detections, truths: Truths) -> tuple[np.ndarray, np.ndarray]:
    """Match detections to ground truths.

    Args:
        edges: the pairs that may match.
        detections: sorted by score, best first, within each image and category.
        truths: the ground truths. Those with id 0 are used up without counting as matched: ``lvis`` and
            ``pycocotools`` record the id of a match, and 0 for none.

    Returns:
        (M,) int64, ascending: the detections with edges; and (M, T, A) int8, the state of each: 0 not matched,
        1 matched, 2 matched to a ground truth that is ignored.
    """
    rows, owner = np.unique(edges[0], return_inverse=True)
    rank = rank_in_group(detections.keys[rows])[owner]
    # Per detection its edges by falling IoU; of equal IoU the later ground truth comes first, as in pycocotools.
    order = np.lexsort((-edges[1], -edges[2], owner, rank))
    owner, rank = owner[order], rank[order]
    edge_truths, reaches = edges[1][order], edges[2][order, None] >= THRESHOLDS
    state = np.zeros((len(rows), len(THRESHOLDS), len(AREA_RANGES)), np.int8)
    taken = np.zeros((len(truths.rows), len(THRESHOLDS), len(AREA_RANGES)), bool)
    begins = np.flatnonzero(np.diff(owner, prepend=-1))  # the edges of one detection follow each other
    counts = np.diff(begins, append=len(owner))
    # Detections of one rank are of different images or categories, and so do not compete.
    for first, last in _runs(rank[begins]):
        for block in _blocks(counts[first:last], _EDGES):
            starts = begins[first:last][block]
            block_edges = slice(starts[0], starts[-1] + counts[first:last][block][-1])
            block_truths, starts_in_block = edge_truths[block_edges], starts - starts[0]
            free = reaches[block_edges, :, None] & ~taken[block_truths]  # (E, T, A)
            # Ignored ground truths come after all others, so one minimum finds the match of either kind.
            penalty = _IGNORED * truths.ignore[block_truths].astype(np.int32)  # (E, A)
            place = np.arange(len(block_truths), dtype=np.int32)[:, None] + penalty
            best = np.minimum.reduceat(np.where(free, place[:, None], _NONE), starts_in_block, axis=0)  # (N, T, A)
            detection, threshold, area = np.nonzero(best < _NONE)
            best = best[detection, threshold, area]
            ignored = best >= _IGNORED
            truth = block_truths[np.where(ignored, best - _IGNORED, best)]
            taken[truth, threshold, area] = ~truths.crowd[truth]
            outcome = np.where(ignored, 2, np.where(truths.has_id_zero[truth], 0, 1))
            state[owner[starts][detection], threshold, area] = outcome
    return rows, state


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of each run of equal values."""
    cuts = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    yield from ((first, last) for first, last in zip(cuts, cuts[1:]) if last > first)


def _blocks(sizes: np.ndarray, limit: int) -> Iterator[slice]:
    """Split items of sizes (N,) into slices that hold at most ``limit`` together, or one item."""
    ends = sizes.cumsum()
    start = 0
    while start < len(sizes):
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + limit, side="right")), start + 1)
        yield slice(start, stop)
        start = stop
