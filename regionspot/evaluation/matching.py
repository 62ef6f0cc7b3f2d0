"""Which detection is matched to which ground truth, at all IoU thresholds and area ranges at once.

It is what ``lvis.LVISEval.evaluate_img`` and ``pycocotools.COCOeval.evaluateImg`` decide: in the order of their
scores, each detection takes the remaining ground truth of its image and category with the largest IoU (the last of
equal ones), and one that is ignored only if no other reaches the threshold. A crowd is never used up. The matcher is
sparse: only pairs whose IoU reaches the lowest threshold are kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from regionspot.evaluation.ious import MIN_IOU, PairIou
from regionspot.evaluation.tables import AREA_RANGES, Detections, Truths, rank_in_group

THRESHOLDS = np.linspace(MIN_IOU, 0.95, 10)  # (T,) IoU
PAIRS = 1 << 20  # pairs of a detection and a ground truth that are compared at a time: bounds the memory
_EDGES = 1 << 15  # edges that are matched at a time, each of which has T x A states
_IGNORED = 1 << 30  # added to the place of an ignored ground truth: later than any other
_NONE = np.iinfo(np.int32).max

Edges = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows of detections and of ground truths (E,) int64, and their IoU


@dataclass(eq=False)
class Matches:
    """Which detections are matched to which ground truths.

    Attributes:
        detections, truths: what was matched.
        counts: (D, A) bool: the detection is a false positive where it is not matched.
        rows: (M,) int64, ascending: the detections that have edges.
        state: (M, T, A) int8: 0 not matched, 1 matched, 2 matched to a ground truth that is ignored.
        partners: (M,) int64, the ground truth of a match at the lowest IoU threshold, of any area; -1 for none.
    """

    detections: Detections
    truths: Truths
    counts: np.ndarray
    rows: np.ndarray
    state: np.ndarray
    partners: np.ndarray


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
    for block in blocks(counts[rows], PAIRS):
        detections, truths = expand_ranges(rows[block], first[rows[block]], counts[rows[block]])
        ious = iou(detections, truths)
        keep = ious >= THRESHOLDS[0]
        edges.append((detections[keep], truths[keep], ious[keep]))
    detections, truths, ious = (np.concatenate(column) for column in zip(*edges))
    return detections, truths, ious


def expand_ranges(rows: np.ndarray, first: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each of ``rows`` (N,) ``counts`` (N,) times, and beside it first, first + 1, ..."""
    starts = counts.cumsum() - counts
    repeated = np.repeat(rows, counts)
    return repeated, np.arange(len(repeated)) + np.repeat(first - starts, counts)


def match(edges: Edges, detections: Detections, truths: Truths, counts: np.ndarray) -> Matches:
    """Match detections to ground truths.

    Args:
        edges: the pairs that may match.
        detections: sorted by score, best first, within each image and category.
        truths: the ground truths. Those with id 0 are used up without counting as matched: ``lvis`` and
            ``pycocotools`` record the id of a match, and 0 for none.
        counts: (D, A) bool, as in ``Matches``.
    """
    rows, owner = np.unique(edges[0], return_inverse=True)
    rank = rank_in_group(detections.keys[rows])[owner]
    # Per detection its edges by falling IoU; of equal IoU the later ground truth comes first, as in pycocotools.
    order = np.lexsort((-edges[1], -edges[2], owner, rank))
    owner, rank = owner[order], rank[order]
    edge_truths, reaches = edges[1][order], edges[2][order, None] >= THRESHOLDS
    state = np.zeros((len(rows), len(THRESHOLDS), len(AREA_RANGES)), np.int8)
    taken = np.zeros((len(truths.rows), len(THRESHOLDS), len(AREA_RANGES)), bool)
    partners = np.full(len(rows), -1)
    begins = np.flatnonzero(np.diff(owner, prepend=-1))  # the edges of one detection follow each other
    sizes = np.diff(begins, append=len(owner))
    # Detections of one rank are of different images or categories, and so do not compete.
    for first, last in _runs(rank[begins]):
        for block in blocks(sizes[first:last], _EDGES):
            starts = begins[first:last][block]
            block_edges = slice(starts[0], starts[-1] + sizes[first:last][block][-1])
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
            is_first = (threshold == 0) & (area == 0)
            partners[owner[starts][detection[is_first]]] = truth[is_first]
    return Matches(detections, truths, counts, rows, state, partners)


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of each run of equal values."""
    cuts = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    yield from ((first, last) for first, last in zip(cuts, cuts[1:]) if last > first)


def blocks(sizes: np.ndarray, limit: int) -> Iterator[slice]:
    """Split items of sizes (N,) into slices that hold at most ``limit`` together, or one item."""
    ends = sizes.cumsum()
    start = 0
    while start < len(sizes):
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + limit, side="right")), start + 1)
        yield slice(start, stop)
        start = stop
