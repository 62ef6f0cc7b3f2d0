"""LVIS AP and fixed AP, from arrays: the numbers of the ``lvis`` package in a fraction of its time and memory."""

import logging
from dataclasses import dataclass

import numpy as np

from regionspot.evaluation.ground_truth import FREQUENCIES, GroundTruth
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
from regionspot.evaluation.results import Results
from regionspot.evaluation.rle import areas_of, boxes_of

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm")
PROTOCOLS = ("lvis", "fixed")
RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(eq=False)
class LvisEvaluation:
    """Precision and recall; -1 where a category has no annotation that counts.

    Attributes:
        precision: (T, 101, K, A) float64 at IoU thresholds, recalls, categories, area ranges.
        recall: (T, K, A) float64.
        category_ids: (K,) int64, ascending.
        frequencies: (K,) "r", "c" or "f".
        num_annotations: (K,) int64 that count, of any size.
        num_detections: that were read.
        num_limited: of these, within the limit per image or per class.
        num_judged: of these, in an image that was verified for their category.
        num_images: of the annotations.
        num_images_with_detections: of these.
        max_dets: per image; None in the fixed protocol.
    """

    precision: np.ndarray
    recall: np.ndarray
    category_ids: np.ndarray
    frequencies: list[str]
    num_annotations: np.ndarray
    num_detections: int
    num_limited: int
    num_judged: int
    num_images: int
    num_images_with_detections: int
    max_dets: int | None

    def metrics(self) -> dict[str, float]:
        """Return AP, AP50, AP75, APs, APm, APl, APr, APc, APf in percent, NaN where nothing is annotated."""
        values = {"AP": _mean(self.precision[:, :, :, [0]])}
        for name in ("50", "75"):
            values[f"AP{name}"] = _mean(self.precision[np.isclose(THRESHOLDS, int(name) / 100)][:, :, :, [0]])
        for index, name in enumerate(AREA_NAMES[1:], 1):
            values[f"AP{name}"] = _mean(self.precision[:, :, :, [index]])
        for frequency in FREQUENCIES:
            group = [index for index, own in enumerate(self.frequencies) if own == frequency]
            values[f"AP{frequency}"] = _mean(self.precision[:, :, group, [0] * len(group)])
        return values

    def average_recalls(self) -> dict[str, float]:
        """Return AR, ARs, ARm, ARl in percent, as ``lvis`` calls them: "AR@300"; without "@" in the fixed protocol."""
        limit = "" if self.max_dets is None else f"@{self.max_dets}"
        return {f"AR{name}{limit}": _mean(self.recall[:, :, [index]]) for index, name in enumerate(AREA_NAMES)}

    def per_class(self) -> dict[int, float]:
        """Return the AP of each category id in percent, NaN where none is annotated."""
        values = self.precision[:, :, :, 0].mean(axis=(0, 1))
        return {
            int(category): float(value * 100) if value >= 0 else float("nan")
            for category, value in zip(self.category_ids, values)
        }


def evaluate_lvis(
    ground_truth: GroundTruth, results: Results, task: str = "bbox", protocol: str = "lvis", max_dets: int = 300
) -> dict[str, float]:
    """Return AP, AP50, AP75, APs, APm, APl, APr, APc and APf in percent, NaN where nothing is annotated.

    Args, Raises: see ``run_lvis_evaluation``, which also has recall, the AP of each class and counts.
    """
    return run_lvis_evaluation(ground_truth, results, task, protocol, max_dets).metrics()


def run_lvis_evaluation(
    ground_truth: GroundTruth,
    results: Results,
    task: str = "bbox",
    protocol: str = "lvis",
    max_dets: int = 300,
    *,
    dets_per_class: int = 10_000,
    segm_areas: str = "masks",
) -> LvisEvaluation:
    """Evaluate detections.

    Args:
        ground_truth: in LVIS format.
        results: the detections.
        task: "bbox" or "segm", whose IoU counts.
        protocol: "lvis": the ``max_dets`` best detections of each image; or "fixed" (Dave et al. 2021, Evaluating
            Large-Vocabulary Object Detectors): the ``dets_per_class`` best of each class in the whole data set.
        max_dets: -1 for no limit.
        dets_per_class: of the fixed protocol.
        segm_areas: whether a mask is small, medium or large is said by "masks", as in Detectron2, or by "boxes", as
            in ``lvis`` itself where entries have both.

    Raises:
        ValueError: an argument of another value, annotations that are not LVIS's, an image or category of the
            detections that is not in them, or, for task segm, masks that are missing or not of their image's size.
    """
    _check_choice("task", task, TASKS)
    _check_choice("protocol", protocol, PROTOCOLS)
    _check_choice("segm_areas", segm_areas, ("masks", "boxes"))
    for key, limit in (("max_dets", max_dets), ("dets_per_class", dets_per_class)):
        if limit < 1 and limit != -1:
            raise ValueError(f"{key}: expected a positive number, or -1 for no limit, got {limit}")
    ground_truth.require_lvis()
    images, categories = ground_truth.positions(results)
    if task == "segm":
        ground_truth.check_masks(results, images)
    if not len(results):
        logger.warning("%s: there is no detection, so that every AP is 0", results.name)
    if protocol == "fixed":
        chosen = _best_of_each(categories, results.scores, dets_per_class)
    else:
        chosen = _best_of_each(images, results.scores, max_dets)

    truths = _Truths(ground_truth)
    areas = results.areas(task, segm_areas)
    rows = _judged(chosen, images, categories, areas, truths, ground_truth)
    if len(results) and not len(rows):
        logger.warning("%s: no detection is of a category that its image is annotated for", results.name)
    # Stable: within an image the order of the file decides.
    rows = rows[np.lexsort((images[rows], -results.scores[rows], categories[rows]))]
    detections = _Detections(rows, categories[rows], categories[rows] * len(ground_truth.image_ids) + images[rows])
    uncounted = outside_ranges(areas[rows]) | np.isin(detections.keys, ground_truth.not_exhaustive)[:, None]
    iou = _iou_of_masks if task == "segm" else _iou_of_boxes
    edges = find_edges(detections.keys, truths.keys, iou(ground_truth, results, detections, truths))
    matched, state = match(edges, detections.keys, truths.ignore, truths.unnumbered)
    precision, recall = _accumulate(detections.categories, ~uncounted, matched, state, truths)
    return LvisEvaluation(
        precision=precision,
        recall=recall,
        category_ids=ground_truth.category_ids,
        frequencies=[str(frequency) for frequency in ground_truth.frequencies],
        num_annotations=truths.number[:, 0],
        num_detections=len(results),
        num_limited=len(chosen),
        num_judged=len(rows),
        num_images=len(ground_truth.image_ids),
        num_images_with_detections=len(np.unique(images)),
        max_dets=max_dets if protocol == "lvis" else None,
    )


class _Truths:
    """Annotations ordered by category and image, then as in the file.

    Attributes:
        rows: (G,) int64 into the annotations of the file; those without area are left out.
        keys: (G,) int64 ``category * I + image``, ascending.
        ignore: (G, A) bool.
        number: (K, A) int64 that count.
    """

    def __init__(self, ground_truth: GroundTruth) -> None:
        rows = np.flatnonzero((ground_truth.areas > 0) & (ground_truth.areas < np.inf))
        keys = ground_truth.categories[rows] * len(ground_truth.image_ids) + ground_truth.images[rows]
        order = np.argsort(keys, kind="stable")
        self.rows, self.keys = rows[order], keys[order]
        self.ignore = outside_ranges(ground_truth.areas[self.rows]) | ground_truth.ignore[self.rows, None]
        self.unnumbered = ground_truth.unnumbered[self.rows]
        if self.unnumbered.any():
            logger.warning(
                "annotations %s: one has id 0, which lvis counts as missed even if it is found; number from 1",
                ground_truth.path,
            )
        self.number = np.zeros((len(ground_truth.category_ids), len(AREA_RANGES)), np.int64)
        np.add.at(self.number, ground_truth.categories[self.rows], ~self.ignore)


@dataclass
class _Detections:
    rows: np.ndarray  # (D,) int64 into the results, ordered by category, then score, then image
    categories: np.ndarray  # (D,) int64
    keys: np.ndarray  # (D,) int64, as of the annotations


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}: expected one of {', '.join(choices)}, got {value!r}")


def _best_of_each(groups: np.ndarray, scores: np.ndarray, limit: int) -> np.ndarray:
    """Return, ascending, the rows of the ``limit`` best of each group; of equal scores the first."""
    if not len(groups) or limit < 0 or np.bincount(groups).max() <= limit:
        return np.arange(len(groups))
    order = np.lexsort((-scores, groups))
    begins = np.flatnonzero(np.diff(groups[order], prepend=-1))
    rank = np.arange(len(order)) - np.repeat(begins, np.diff(begins, append=len(order)))
    return np.sort(order[rank < limit])


def _judged(
    chosen: np.ndarray,
    images: np.ndarray,
    categories: np.ndarray,
    areas: np.ndarray,
    truths: _Truths,
    ground_truth: GroundTruth,
) -> np.ndarray:
    """Return which of the chosen detections have an area and an image that was verified for their category."""
    chosen = chosen[(areas[chosen] > 0) & (areas[chosen] < np.inf)]
    keys = categories[chosen] * len(ground_truth.image_ids) + images[chosen]
    verified = np.union1d(truths.keys, ground_truth.negatives)
    position = np.searchsorted(verified, keys)
    return chosen[np.append(verified, -1)[position] == keys]


def _iou_of_boxes(ground_truth: GroundTruth, results: Results, detections: _Detections, truths: _Truths) -> Iou:
    first, second = results.boxes[detections.rows], ground_truth.boxes[truths.rows]
    return lambda d, g: box_ious(first[d], second[g])


def _iou_of_masks(ground_truth: GroundTruth, results: Results, detections: _Detections, truths: _Truths) -> Iou:
    regions, rles = results.require_masks()
    needed = np.flatnonzero(np.isin(truths.keys, detections.keys))
    masks = ground_truth.masks(truths.rows[needed])
    areas, boxes = np.zeros(len(truths.rows)), np.zeros((len(truths.rows), 4))
    areas[needed], boxes[needed] = areas_of(masks), boxes_of(masks)
    at = dict(zip(needed.tolist(), masks))
    compared = np.unique(regions[detections.rows[np.isin(detections.keys, truths.keys)]])
    mask_boxes = np.zeros((len(rles), 4))
    mask_boxes[compared] = boxes_of([rles[region] for region in compared.tolist()])
    return MaskIou(
        regions[detections.rows], results.mask_areas, mask_boxes, rles.__getitem__, at.__getitem__, areas, boxes
    )


def _accumulate(
    categories: np.ndarray, counts: np.ndarray, matched: np.ndarray, state: np.ndarray, truths: _Truths
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


def _mean(values: np.ndarray) -> float:
    """Return the mean in percent of those that are there, NaN if none is."""
    present = values[values > -1]
    return float(np.mean(present) * 100) if len(present) else float("nan")
