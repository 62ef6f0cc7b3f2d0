"""Which detection is matched to which ground truth, at all IoU thresholds and area ranges at once.

It is what ``lvis.LVISEval.evaluate_img`` and ``pycocotools.COCOeval.evaluateImg`` decide: in the order of their
scores, each detection takes the ground truth of its image and category with the largest IoU that is left (the last of
equal ones), and one that is to be ignored only if no other reaches the threshold. A crowd is never used up. Only pairs
with an IoU that reaches the lowest threshold are ever looked at.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pycocotools.mask as mask_utils

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # (T,) IoU
AREA_RANGES = np.array([[0, 1e5**2], [0, 32**2], [32**2, 96**2], [96**2, 1e5**2]])  # (A, 2) pixels, ends included
AREA_NAMES = ("", "s", "m", "l")
Iou = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of rows of detections and of ground truths
_PAIRS = 1 << 20  # of a detection and a ground truth, looked at together
_EDGES = 1 << 15  # matched together
_IGNORED = 1 << 30  # later than any place that is not ignored
_NONE = np.iinfo(np.int32).max


@dataclass
class Edges:
    """Pairs of detections and ground truths that may match, ordered by detection.

    Attributes:
        detections, ground_truths: (E,) int64 rows.
        ious: (E,) float64, none below the lowest of ``THRESHOLDS``.
    """

    detections: np.ndarray
    ground_truths: np.ndarray
    ious: np.ndarray


def outside_ranges(areas: np.ndarray) -> np.ndarray:
    """Return (N, A) bool: the area (N,) is not in the range."""
    return (areas[:, None] < AREA_RANGES[:, 0]) | (areas[:, None] > AREA_RANGES[:, 1])


def find_edges(detection_keys: np.ndarray, truth_keys: np.ndarray, iou: Iou) -> Edges:
    """Return the pairs of one image and category whose IoU reaches the lowest threshold.

    Args:
        detection_keys: (D,) int64, one number for each image and category.
        truth_keys: (G,) int64, ascending.
        iou: of rows of detections (P,) and of ground truths (P,), to (P,) float64; it may give 0 for pairs under the
            lowest threshold.
    """
    first = np.searchsorted(truth_keys, detection_keys, side="left")
    count = np.searchsorted(truth_keys, detection_keys, side="right") - first
    rows = np.flatnonzero(count)
    found: list[tuple[np.ndarray, ...]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for part in _blocks(count[rows], _PAIRS):
        some = rows[part]
        detections = np.repeat(some, count[some])
        ends = count[some].cumsum()
        within = np.arange(len(detections)) - np.repeat(ends - count[some], count[some])
        truths = np.repeat(first[some], count[some]) + within
        ious = iou(detections, truths)
        keep = ious >= THRESHOLDS[0]
        found.append((detections[keep], truths[keep], ious[keep]))
    return Edges(*(np.concatenate(column) for column in zip(*found)))


def box_ious(first: np.ndarray, second: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """Return the IoU (P,) float64 of boxes (P, 4) XYWH, to the last digit as ``pycocotools.mask.iou``.

    Where ``crowd`` (P,) bool is set, it is the share of the first box that the second covers.
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        low = np.maximum(first[:, :2], second[:, :2])
        size = np.minimum(first[:, 2:] + first[:, :2], second[:, 2:] + second[:, :2]) - low
        both = size[:, 0] * size[:, 1]
        area = first[:, 2] * first[:, 3]
        union = np.where(crowd, area, area + second[:, 2] * second[:, 3] - both)
        return np.where((size > 0).all(axis=1), both / union, 0.0)


class MaskIou:
    """IoU of masks; those of boxes and areas too different are not compared.

    Args:
        regions: (D,) int64, each detection's mask.
        mask_areas: (R,) float64, of all masks.
        mask_boxes: (R, 4) float64 XYWH, around them; of those that are compared.
        rle_of: returns the RLE of a mask.
        truth_of: returns the RLE of a ground truth.
        truth_areas, truth_boxes: (G,) and (G, 4), of the ground truths.
        crowd: (G,) bool, ground truths whose IoU is the share of the detection that they cover.
    """

    def __init__(
        self,
        regions: np.ndarray,
        mask_areas: np.ndarray,
        mask_boxes: np.ndarray,
        rle_of: Callable[[int], dict],
        truth_of: Callable[[int], dict],
        truth_areas: np.ndarray,
        truth_boxes: np.ndarray,
        crowd: np.ndarray,
    ) -> None:
        self.regions, self.areas, self.boxes, self.rle_of = regions, mask_areas, mask_boxes, rle_of
        self.truth_of, self.truth_areas, self.truth_boxes = truth_of, truth_areas, truth_boxes
        self.crowd = crowd

    def __call__(self, detections: np.ndarray, truths: np.ndarray) -> np.ndarray:
        """Return (P,) float64 of rows of detections (P,), in order, and of ground truths (P,)."""
        ious = np.zeros(len(detections))
        regions = self.regions[detections]
        first, second = self.boxes[regions], self.truth_boxes[truths]
        low = np.maximum(first[:, :2], second[:, :2])
        size = np.minimum(first[:, 2:] + first[:, :2], second[:, 2:] + second[:, :2]) - low
        # What both cover is in both boxes, and is half of the union, thus of the larger mask, at the lowest threshold;
        # with a crowd it is half of the detection.
        truth_areas = np.where(self.crowd[truths], 0, self.truth_areas[truths])
        larger = np.maximum(self.areas[regions], truth_areas)
        likely = (size > 0).all(axis=1) & (size.prod(axis=1) >= THRESHOLDS[0] * larger)
        pairs = np.flatnonzero(likely)
        # One call for all regions that are compared with one ground truth.
        order = np.lexsort((regions[pairs], truths[pairs]))
        pairs = pairs[order]
        cuts = np.flatnonzero(np.diff(truths[pairs])) + 1
        for group in np.split(pairs, cuts) if len(pairs) else []:
            unique, inverse = np.unique(regions[group], return_inverse=True)
            row = int(truths[group[0]])
            rles = [self.rle_of(region) for region in unique.tolist()]
            values = mask_utils.iou(rles, [self.truth_of(row)], [int(self.crowd[row])])
            ious[group] = np.asarray(values).reshape(-1)[inverse.reshape(-1)]
        return ious


def match(
    edges: Edges, detection_keys: np.ndarray, ignore: np.ndarray, has_id_zero: np.ndarray, crowd: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Match detections to ground truths.

    Args:
        edges: the pairs that may match.
        detection_keys: (D,) int64, one number for each image and category; the detections of each are in the order
            in which they choose.
        ignore: (G, A) bool, ground truths that count neither as found nor as missed.
        has_id_zero: (G,) bool, ground truths of id 0, which are taken but not found: so ``lvis`` and ``pycocotools``
            read their own notes.
        crowd: (G,) bool, ground truths that many detections may be matched to.

    Returns:
        (M,) int64, ascending: the detections that have edges; and (M, T, A) int8, what became of each: 0 not matched,
        1 matched, 2 matched to a ground truth that is ignored.
    """
    rows, owner = np.unique(edges.detections, return_inverse=True)
    rank = rank_in_group(detection_keys[rows])[owner]
    order = np.lexsort((-edges.ground_truths, -edges.ious, owner, rank))
    owner, rank = owner[order], rank[order]
    truths, reaches = edges.ground_truths[order], edges.ious[order, None] >= THRESHOLDS
    state = np.zeros((len(rows), len(THRESHOLDS), len(AREA_RANGES)), np.int8)
    taken = np.zeros((len(ignore), len(THRESHOLDS), len(AREA_RANGES)), bool)
    # Detections of one rank are of different images or categories, and so do not compete.
    begins = np.flatnonzero(np.diff(owner, prepend=-1))  # the edges of one detection follow each other
    counts = np.diff(begins, append=len(owner))
    for first, last in _runs(rank[begins]):
        for block in _blocks(counts[first:last], _EDGES):
            here = begins[first:last][block]
            part = slice(here[0], here[-1] + counts[first:last][block][-1])
            some, starts = truths[part], here - here[0]
            free = reaches[part, :, None] & ~taken[some]  # (E, T, A)
            place = np.arange(len(some), dtype=np.int32)[:, None] + np.where(ignore[some], _IGNORED, 0).astype(np.int32)
            best = np.minimum.reduceat(np.where(free, place[:, None], _NONE), starts, axis=0)  # (N, T, A)
            detection, threshold, area = np.nonzero(best < _NONE)
            best = best[detection, threshold, area]
            ignored = best >= _IGNORED
            truth = some[np.where(ignored, best - _IGNORED, best)]
            taken[truth, threshold, area] = ~crowd[truth]
            outcome = np.where(ignored, 2, np.where(has_id_zero[truth], 0, 1))
            state[owner[here][detection], threshold, area] = outcome
    return rows, state


def rank_in_group(keys: np.ndarray) -> np.ndarray:
    """Return (N,) int64: how many earlier ones have the same key."""
    order = np.argsort(keys, kind="stable")
    begins = np.flatnonzero(np.diff(keys[order], prepend=keys[order][:1] - 1))
    rank = np.empty(len(keys), np.int64)
    rank[order] = np.arange(len(keys)) - np.repeat(begins, np.diff(begins, append=len(keys)))
    return rank


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of each run of equal values."""
    cuts = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    yield from ((first, last) for first, last in zip(cuts, cuts[1:]) if last > first)


def _blocks(sizes: np.ndarray, limit: int) -> Iterator[slice]:
    """Cut a row of things of sizes (N,) into slices that hold at most ``limit``, or one thing."""
    ends = sizes.cumsum()
    start = 0
    while start < len(sizes):
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + limit, side="right")), start + 1)
        yield slice(start, stop)
        start = stop
