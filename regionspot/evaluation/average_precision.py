"""Average precision and recall from matches, shared by LVIS's and COCO's metrics."""

import logging
from dataclasses import dataclass, field

import numpy as np

from regionspot.data.coco_io import Results
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.ious import box_iou, mask_iou
from regionspot.evaluation.matching import THRESHOLDS, Matches, find_edges, match
from regionspot.evaluation.tables import AREA_NAMES, Detections, Truths

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm")
RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(eq=False)
class Evaluation:
    """Precision and recall; -1 where a category has no annotation that is not ignored.

    Attributes:
        precision: (T, 101, K, A) float64 at IoU thresholds, recalls, categories, area ranges.
        recall: (T, K, A) float64.
        category_ids: (K,) int64, ascending.
        num_annotations: (K,) int64, annotations of any size that are not ignored.
        matches: which detection is matched to which annotation; None unless it was asked for.
    """

    precision: np.ndarray
    recall: np.ndarray
    category_ids: np.ndarray
    num_annotations: np.ndarray
    matches: Matches | None = field(default=None, kw_only=True)

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


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a ``value`` of the option ``key`` that is none of its ``choices``."""
    if value not in choices:
        raise ValueError(f"{key}: expected one of {', '.join(choices)}, got {value!r}")


def locate_results(ground_truth: GroundTruth, results: Results, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Check detections for ``task``; return their images and categories, see ``GroundTruth.locate``."""
    check_choice("task", task, TASKS)
    images, categories = ground_truth.locate(results)
    if task == "segm":
        ground_truth.check_masks(results, images)
    if not len(results):
        logger.warning("%s: there are no detections, so every AP is 0", results.name)
    return images, categories


def match_results(
    ground_truth: GroundTruth, results: Results, task: str, detections: Detections, truths: Truths, counts: np.ndarray
) -> Matches:
    """Match detections to annotations by the IoU of boxes or masks; see ``match``."""
    make_iou = mask_iou if task == "segm" else box_iou
    iou = make_iou(results, ground_truth, detections, truths)
    return match(find_edges(detections.keys, truths.keys, iou), detections, truths, counts)


def accumulate(
    categories: np.ndarray, counts: np.ndarray, matched: np.ndarray, state: np.ndarray, all_totals: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return precision (T, 101, K, A) and recall (T, K, A).

    Args:
        categories: (D,) int64 ascending; the detections of a category are sorted by score, best first.
        counts, matched, state: (D, A) bool, (M,) int64 and (M, T, A) int8, as those of ``Matches``.
        all_totals: (K, A) int64, annotations that are not ignored.
    """
    num_categories = len(all_totals)
    _, num_thresholds, num_areas = state.shape
    precision = np.full((num_thresholds, len(RECALLS), num_categories, num_areas), -1.0)
    recall = np.full((num_thresholds, num_categories, num_areas), -1.0)
    # Detections outside ``matched`` only add false positives, so a class costs its M matches, not its D detections.
    cuts = np.searchsorted(categories, np.arange(num_categories + 1))
    matched_cuts = np.searchsorted(matched, cuts)
    for category in np.flatnonzero(all_totals.any(axis=1)).tolist():
        rows = slice(cuts[category], cuts[category + 1])
        matched_rows = slice(matched_cuts[category], matched_cuts[category + 1])
        totals = all_totals[category].tolist()
        num_true, best = _precision_at_true_positives(
            counts[rows], matched[matched_rows] - rows.start, state[matched_rows], max(totals)
        )
        for area, total in enumerate(totals):
            if total:
                # how many true positives reach each of the 101 recalls
                needed = np.searchsorted(np.arange(1, total + 1) / total, RECALLS, side="left")
                precision[:, :, category, area] = best[needed, :, area].T
                recall[:, category, area] = num_true[:, area] / total
    return precision, recall


def _precision_at_true_positives(
    counts: np.ndarray, rows: np.ndarray, state: np.ndarray, total: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of true positives (T, A), and the best precision (total, T, A) with at least k + 1 of them.

    ``counts`` (D, A) is of all detections of a class, ``state`` (M, T, A) of those in ``rows`` (M,), which have
    candidates. ``total`` is the largest number of annotations in an area range.
    """
    # From one true positive to the next precision can only fall, so the maximum is always at a true positive.
    best = np.zeros((total, *state.shape[1:]))
    if not len(rows):
        return np.zeros(state.shape[1:], np.int64), best
    is_true = state == 1
    was_counted = counts[rows][:, None]  # (M, 1, A)
    change = np.where(state == 0, 0, is_true.astype(np.int64) - was_counted)
    positives = counts.cumsum(axis=0)[rows][:, None] + change.cumsum(axis=0)  # (M, T, A), true and false
    true = is_true.cumsum(axis=0)
    false = (positives - true).astype(np.float64)
    precision = np.where(is_true, true / (false + true + np.spacing(1)), 0.0)
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    index = np.nonzero(is_true)
    best[true[index] - 1, index[1], index[2]] = precision[index]
    return true[-1], best


def mean_percent(values: np.ndarray) -> float:
    """Return the mean in percent of the values that are not -1, NaN if there are none."""
    present = values[values > -1]
    return float(np.mean(present) * 100) if len(present) else float("nan")
