"""LVIS AP and fixed AP, from arrays: the numbers of the ``lvis`` package in a fraction of its time and memory."""

import logging
from dataclasses import dataclass

import numpy as np

from regionspot.data.coco_io import Results, look_up
from regionspot.evaluation.average_precision import (
    Evaluation,
    accumulate,
    check_choice,
    locate_results,
    match_results,
    mean_percent,
)
from regionspot.evaluation.ground_truth import FREQUENCIES, GroundTruth
from regionspot.evaluation.tables import AREA_NAMES, Truths, is_outside_ranges, order_detections, rank_in_run

logger = logging.getLogger(__name__)

PROTOCOLS = ("lvis", "fixed")
DETS_PER_CLASS = 10_000  # of the fixed protocol


@dataclass(eq=False)
class LvisEvaluation(Evaluation):
    """Precision and recall, and which detections took part."""

    frequencies: list[str | None]  # (K,) "r", "c" or "f"
    num_detections: int  # all detections of the results
    num_limited: int  # those within the limit per image or per class
    num_judged: int  # those of them in an image that was verified for their category
    num_images_with_detections: int
    max_dets: int | None  # limit per image; None in the fixed protocol

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
    ground_truth: GroundTruth,
    results: Results,
    task: str = "bbox",
    protocol: str = "lvis",
    max_dets: int = 300,
    *,
    dets_per_class: int = DETS_PER_CLASS,
    segm_areas: str = "masks",
    keep_matches: bool = False,
) -> LvisEvaluation:
    """Evaluate detections by LVIS's rules.

    Args:
        ground_truth: in LVIS format.
        results: the detections.
        task: "bbox" or "segm", by whose IoU detections are matched.
        protocol: "lvis": the ``max_dets`` best detections of each image; or "fixed" (Dave et al. 2021, Evaluating
            Large-Vocabulary Object Detectors): the ``dets_per_class`` best of each class in the whole data set.
        max_dets: -1 for no limit.
        dets_per_class: of the fixed protocol.
        segm_areas: whether a mask is small, medium or large is decided by "masks", as in Detectron2, or by "boxes", as
            in ``lvis`` itself where entries have both.
        keep_matches: return the matches, too.

    Raises:
        ValueError: an invalid argument, annotations that are not LVIS's, unknown image or category ids, or, for task
            segm, masks that are missing or not of their image's size.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    check_choice("segm_areas", segm_areas, ("masks", "boxes"))
    for key, limit in (("max_dets", max_dets), ("dets_per_class", dets_per_class)):
        if limit < 1 and limit != -1:
            raise ValueError(f"{key}: expected a positive number, or -1 for no limit, got {limit}")
    ground_truth.require_lvis()
    images, categories = locate_results(ground_truth, results, task)
    is_fixed = protocol == "fixed"
    groups, limit = (categories, dets_per_class) if is_fixed else (images, max_dets)
    limited = _best_of_each(groups, results.scores, limit)

    has_area = np.flatnonzero((ground_truth.areas > 0) & (ground_truth.areas < np.inf))
    truths = Truths(ground_truth, has_area, ground_truth.ignore, np.zeros(len(ground_truth.ignore), bool))
    areas = results.areas(task, segm_areas)
    # LVIS is federated: a detection counts only where its category is annotated, or verified to be absent.
    judged = limited[(areas[limited] > 0) & (areas[limited] < np.inf)]
    verified = np.union1d(truths.keys, ground_truth.negatives)
    _, unverified = look_up(verified, categories[judged] * len(ground_truth.image_ids) + images[judged])
    judged = judged[~unverified]
    if len(results) and not len(judged):
        logger.warning("%s: no detection has a category that is annotated in its image", results.name)
    detections = order_detections(ground_truth, results, judged, images, categories)
    # Where not every object is annotated, a detection without a match is no false positive.
    not_exhaustive = np.isin(detections.keys, ground_truth.not_exhaustive)
    counts = ~(is_outside_ranges(areas[detections.rows]) | not_exhaustive[:, None])
    matches = match_results(ground_truth, results, task, detections, truths, counts)
    precision, recall = accumulate(detections.categories, counts, matches.rows, matches.state, truths.totals)
    return LvisEvaluation(
        precision=precision,
        recall=recall,
        category_ids=ground_truth.category_ids,
        num_annotations=truths.totals[:, 0],
        frequencies=ground_truth.frequencies,
        num_detections=len(results),
        num_limited=len(limited),
        num_judged=len(judged),
        num_images_with_detections=len(np.unique(images)),
        max_dets=None if is_fixed else max_dets,
        matches=matches if keep_matches else None,
    )


def _best_of_each(groups: np.ndarray, scores: np.ndarray, limit: int) -> np.ndarray:
    """Return, ascending, the rows of the ``limit`` best detections of each group; where scores tie, the first."""
    if not len(groups) or limit < 0 or np.bincount(groups).max() <= limit:
        return np.arange(len(groups))
    order = np.lexsort((-scores, groups))
    return np.sort(order[rank_in_run(groups[order]) < limit])
