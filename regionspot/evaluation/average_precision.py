"""Average precision and recall from matches: what LVIS's and COCO's metrics have in common."""

import logging
from dataclasses import dataclass

import numpy as np

from regionspot.data.coco_io import Results
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.matching import (
    AREA_NAMES,
    AREA_RANGES,
    THRESHOLDS,
    Iou,
    MaskIou,
    box_ious,
    find_edges,
    match,
    outside_ranges,
)
from regionspot.utils.rle import mask_areas, mask_boxes

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm")
RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(eq=False)
class Evaluation:
    """Precision and recall; -1 where a category has no annotation that counts.

    Attributes:
        precision: (T, 101, K, A) float64 at IoU thresholds, recalls, categories, area ranges.
        recall: (T, K, A) float64.
        category_ids: (K,) int64, ascending.
        num_annotations: (K,) int64 that count, of any size.
    """

    precision: np.ndarray
    recall: np.ndarray
    category_ids: np.ndarray
    num_annotations: np.ndarray

    def metrics(self) -> dict[str, float]:
        """Return AP, AP50, AP75, APs, APm and APl in percent, NaN where nothing is annotated."""
        values = {"AP": mean_percent(self.precision[:, :, :, [0]])}
        for name in ("50", "75"):
            values[f"AP{name}"] = mean_percent(self.precision[np.isclose(THRESHOLDS, int(name) / 100)][:, :, :, [0]])
        for index, name in enumerate(AREA_NAMES[1:], 1):
            values[f"AP{name}"] = mean_percent(self.precision[:, :, :, [index]])
        return values

    def per_class(self) -> dict[int, float]:
        """Return the AP of each category id in percent, NaN where none is annotated."""
        values = self.precision[:, :, :, 0].mean(axis=(0, 1))
        return {
            int(category): float(value * 100) if value >= 0 else float("nan")
            for category, value in zip(self.category_ids, values)
        }


class Truths:
    """Annotations ordered by category and image, then as in the file.

    Attributes:
        rows: (G,) int64 into the annotations of the file.
        keys: (G,) int64 ``category * I + image``, ascending.
        ignore: (G, A) bool, also those outside an area range.
        crowd: (G,) bool: may be matched many times, and the IoU is the share of the detection that it covers.
        has_id_zero: (G,) bool, as in ``GroundTruth``.
        number: (K, A) int64 that count.
    """

    def __init__(self, ground_truth: GroundTruth, rows: np.ndarray, ignore: np.ndarray, crowd: np.ndarray) -> None:
        """
        Args:
            ground_truth: the annotations.
            rows: (G,) int64, those that take part.
            ignore, crowd: (all annotations,) bool.
        """
        keys = ground_truth.categories[rows] * len(ground_truth.image_ids) + ground_truth.images[rows]
        order = np.argsort(keys, kind="stable")
        self.rows, self.keys = rows[order], keys[order]
        self.ignore = outside_ranges(ground_truth.areas[self.rows]) | ignore[self.rows, None]
        self.crowd = crowd[self.rows]
        self.has_id_zero = ground_truth.has_id_zero[self.rows]
        if self.has_id_zero.any():
            logger.warning(
                "annotations %s: one has id 0, which lvis and pycocotools count as missed even if it is found; number "
                "from 1",
                ground_truth.path,
            )
        self.number = np.zeros((len(ground_truth.category_ids), len(AREA_RANGES)), np.int64)
        np.add.at(self.number, ground_truth.categories[self.rows], ~self.ignore)


@dataclass
class Detections:
    """Detections ordered by category, then score.

    Attributes:
        rows: (D,) int64 into the results.
        categories: (D,) int64.
        keys: (D,) int64, as of ``Truths``.
    """

    rows: np.ndarray
    categories: np.ndarray
    keys: np.ndarray

    def select(self, keep: np.ndarray) -> "Detections":
        """Return those of ``keep`` (D,) bool."""
        return Detections(self.rows[keep], self.categories[keep], self.keys[keep])


def order_detections(
    ground_truth: GroundTruth, results: Results, rows: np.ndarray, images: np.ndarray, categories: np.ndarray
) -> Detections:
    """Return detections by category, then score, then image; within an image the order of the file decides.

    Args:
        ground_truth: the annotations.
        results: the detections.
        rows: (D,) int64 ascending, those that take part.
        images, categories: (all detections,) int64, positions in the annotations.
    """
    rows = rows[np.lexsort((images[rows], -results.scores[rows], categories[rows]))]
    return Detections(rows, categories[rows], categories[rows] * len(ground_truth.image_ids) + images[rows])


def match_results(
    ground_truth: GroundTruth, results: Results, task: str, detections: Detections, truths: Truths
) -> tuple[np.ndarray, np.ndarray]:
    """Match detections to annotations by the IoU of boxes or masks; see ``match``."""
    iou = _iou_of_masks if task == "segm" else _iou_of_boxes
    edges = find_edges(detections.keys, truths.keys, iou(ground_truth, results, detections, truths))
    return match(edges, detections.keys, truths.ignore, truths.has_id_zero, truths.crowd)


def accumulate(
    categories: np.ndarray, counts: np.ndarray, matched: np.ndarray, state: np.ndarray, truths: Truths
) -> tuple[np.ndarray, np.ndarray]:
    """Return precision (T, 101, K, A) and recall (T, K, A).

    Args:
        categories: (D,) int64 ascending; the detections of each are in the order of their scores.
        counts: (D, A) bool: a false positive if not matched.
        matched: (M,) int64 rows of those that ``state`` (M, T, A) is of.
        truths: the annotations.
    """
    number = len(truths.number)
    precision = np.full((len(THRESHOLDS), len(RECALLS), number, len(AREA_RANGES)), -1.0)
    recall = np.full((len(THRESHOLDS), number, len(AREA_RANGES)), -1.0)
    cuts = np.searchsorted(categories, np.arange(number + 1))
    matched_cuts = np.searchsorted(matched, cuts)
    for category in np.flatnonzero(truths.number.any(axis=1)).tolist():
        here = slice(cuts[category], cuts[category + 1])
        of_matched = slice(matched_cuts[category], matched_cuts[category + 1])
        found, best = _precision_at_found(
            counts[here], matched[of_matched] - here.start, state[of_matched], int(truths.number[category].max())
        )
        for area, total in enumerate(truths.number[category].tolist()):
            if total:
                needed = np.searchsorted(np.arange(1, total + 1) / total, RECALLS, side="left")
                precision[:, :, category, area] = best[needed, :, area].T
                recall[:, category, area] = found[:, area] / total
    return precision, recall


def _precision_at_found(
    counts: np.ndarray, rows: np.ndarray, state: np.ndarray, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return how many are found, and the best precision with as many found or more.

    Precision falls between one true positive and the next, so that nothing else has to be looked at.

    Args:
        counts: (D, A) bool, of the detections of a class.
        rows: (M,) int64 of those that ``state`` (M, T, A) is of.
        total: annotations that count, at the most of the area ranges.

    Returns:
        (T, A) int64; and (total, T, A) float64, at ``[k]`` with k + 1 found, 0 where as many are not found.
    """
    best = np.zeros((total, *state.shape[1:]))
    if not len(rows):
        return np.zeros(state.shape[1:], np.int64), best
    is_true = state == 1
    own = counts[rows][:, None]  # (M, 1, A)
    change = np.where(state == 0, 0, is_true.astype(np.int64) - own)
    positives = counts.cumsum(axis=0)[rows][:, None] + change.cumsum(axis=0)  # (M, T, A), true and false
    true = is_true.cumsum(axis=0)
    false = (positives - true).astype(np.float64)
    precision = np.where(is_true, true / (false + true + np.spacing(1)), 0.0)
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    index = np.nonzero(is_true)
    best[true[index] - 1, index[1], index[2]] = precision[index]
    return true[-1], best


def mean_percent(values: np.ndarray) -> float:
    """Return the mean in percent of those that are there, NaN if none is."""
    present = values[values > -1]
    return float(np.mean(present) * 100) if len(present) else float("nan")


def _iou_of_boxes(ground_truth: GroundTruth, results: Results, detections: Detections, truths: Truths) -> Iou:
    def iou(d: np.ndarray, g: np.ndarray) -> np.ndarray:
        return box_ious(results.boxes[detections.rows[d]], ground_truth.boxes[truths.rows[g]], truths.crowd[g])

    return iou


def _iou_of_masks(ground_truth: GroundTruth, results: Results, detections: Detections, truths: Truths) -> Iou:
    regions, rles = results.require_masks()
    needed = np.flatnonzero(np.isin(truths.keys, detections.keys))
    masks = ground_truth.masks(truths.rows[needed])
    areas, boxes = np.zeros(len(truths.rows)), np.zeros((len(truths.rows), 4))
    areas[needed], boxes[needed] = mask_areas(masks), mask_boxes(masks)
    at = dict(zip(needed.tolist(), masks))
    compared = np.unique(regions[detections.rows[np.isin(detections.keys, truths.keys)]])
    region_boxes = np.zeros((len(rles), 4))
    region_boxes[compared] = mask_boxes([rles[region] for region in compared.tolist()])
    return MaskIou(
        regions[detections.rows],
        results.mask_areas,
        region_boxes,
        rles.__getitem__,
        at.__getitem__,
        areas,
        boxes,
        truths.crowd,
    )
