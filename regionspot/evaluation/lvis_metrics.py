"""LVIS AP and fixed AP, from arrays: the numbers of the ``lvis`` package in a fraction of its time and memory."""

import logging
from dataclasses import dataclass

import numpy as np

from regionspot.data.coco_io import Results
from regionspot.evaluation.average_precision import (
    TASKS,
    Detections,
    Evaluation,
    Truths,
    accumulate,
    match_results,
    mean_percent,
    order_detections,
)
from regionspot.evaluation.ground_truth import FREQUENCIES, GroundTruth
from regionspot.evaluation.matching import AREA_NAMES, outside_ranges

logger = logging.getLogger(__name__)

PROTOCOLS = ("lvis", "fixed")
DETS_PER_CLASS = 10_000  # of the fixed protocol


@dataclass(eq=False)
class LvisEvaluation(Evaluation):
    """Precision and recall, and what was looked at.

    Attributes:
        frequencies: (K,) "r", "c" or "f".
        num_detections: that were read.
        num_limited: of these, within the limit per image or per class.
        num_judged: of these, in an image that was verified for their category.
        num_images: of the annotations.
        num_images_with_detections: of these.
        max_dets: per image; None in the fixed protocol.
    """

    frequencies: list[str]
    num_detections: int
    num_limited: int
    num_judged: int
    num_images: int
    num_images_with_detections: int
    max_dets: int | None

    def metrics(self) -> dict[str, float]:
        """Return AP, AP50, AP75, APs, APm, APl, APr, APc, APf in percent, NaN where nothing is annotated."""
        values = super().metrics()
        for frequency in FREQUENCIES:
            group = [index for index, own in enumerate(self.frequencies) if own == frequency]
            values[f"AP{frequency}"] = mean_percent(self.precision[:, :, group, [0] * len(group)])
        return values

    def average_recalls(self) -> dict[str, float]:
        """Return AR, ARs, ARm, ARl in percent, as ``lvis`` calls them: "AR@300"; without "@" in the fixed protocol."""
        limit = "" if self.max_dets is None else f"@{self.max_dets}"
        return {f"AR{name}{limit}": mean_percent(self.recall[:, :, [index]]) for index, name in enumerate(AREA_NAMES)}


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
    dets_per_class: int = DETS_PER_CLASS,
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
    images, categories = ground_truth.locate(results)
    if task == "segm":
        ground_truth.check_masks(results, images)
    if not len(results):
        logger.warning("%s: there is no detection, so that every AP is 0", results.name)
    if protocol == "fixed":
        chosen = _best_of_each(categories, results.scores, dets_per_class)
    else:
        chosen = _best_of_each(images, results.scores, max_dets)

    has_area = np.flatnonzero((ground_truth.areas > 0) & (ground_truth.areas < np.inf))
    truths = Truths(ground_truth, has_area, ground_truth.ignore, np.zeros(len(ground_truth.ignore), bool))
    areas = results.areas(task, segm_areas)
    rows = _judged(chosen, images, categories, areas, truths, ground_truth)
    if len(results) and not len(rows):
        logger.warning("%s: no detection is of a category that its image is annotated for", results.name)
    detections = order_detections(ground_truth, results, rows, images, categories)
    uncounted = _uncounted(ground_truth, detections, areas)
    matched, state = match_results(ground_truth, results, task, detections, truths)
    precision, recall = accumulate(detections.categories, ~uncounted, matched, state, truths)
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
    truths: Truths,
    ground_truth: GroundTruth,
) -> np.ndarray:
    """Return which of the chosen detections have an area and an image that was verified for their category."""
    chosen = chosen[(areas[chosen] > 0) & (areas[chosen] < np.inf)]
    keys = categories[chosen] * len(ground_truth.image_ids) + images[chosen]
    verified = np.union1d(truths.keys, ground_truth.negatives)
    position = np.searchsorted(verified, keys)
    return chosen[np.append(verified, -1)[position] == keys]


def _uncounted(ground_truth: GroundTruth, detections: Detections, areas: np.ndarray) -> np.ndarray:
    """Return (D, A) bool: not a false positive, even if it is not matched."""
    not_exhaustive = np.isin(detections.keys, ground_truth.not_exhaustive)
    return outside_ranges(areas[detections.rows]) | not_exhaustive[:, None]
