"""COCO AP and AR, from arrays: the numbers of ``pycocotools`` for any number of images and classes.

``COCOeval`` keeps an entry for every (image, class) pair: a terabyte for a data set of 13,000 classes.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regionspot.data.coco_io import Results
from regionspot.evaluation.average_precision import (
    TASKS,
    Evaluation,
    Truths,
    accumulate,
    match_results,
    mean_percent,
    order_detections,
)
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.matching import AREA_NAMES, outside_ranges, rank_in_group

logger = logging.getLogger(__name__)

MAX_DETS = (1, 10, 100)  # of a class in an image


@dataclass(eq=False)
class CocoEvaluation(Evaluation):
    """Precision and recall of the 100 best detections of each class in each image.

    Attributes:
        recalls: for 1, 10 and 100 detections (T, K) float64, of annotations of any size; -1 as in ``recall``.
    """

    recalls: dict[int, np.ndarray]

    def average_recalls(self) -> dict[str, float]:
        """Return AR@1, AR@10, AR@100, ARs@100, ARm@100, ARl@100 in percent, NaN where nothing is annotated."""
        values = {f"AR@{limit}": mean_percent(recall) for limit, recall in self.recalls.items()}
        sizes = {f"AR{name}@100": mean_percent(self.recall[:, :, i]) for i, name in enumerate(AREA_NAMES) if name}
        return values | sizes


def evaluate_coco(json_file: str | Path | GroundTruth, results: Results, task: str = "bbox") -> dict[str, float]:
    """Return AP, AP50, AP75, APs, APm and APl in percent, NaN where nothing is annotated, as Detectron2 does.

    Args, Raises: see ``run_coco_evaluation``, which also has recall, the AP of each class and counts.
    """
    return run_coco_evaluation(json_file, results, task).metrics()


def run_coco_evaluation(json_file: str | Path | GroundTruth, results: Results, task: str = "bbox") -> CocoEvaluation:
    """Evaluate detections by COCO's rules, with 1, 10 and 100 detections of a class in an image.

    Args:
        json_file: annotations in COCO or LVIS format, or what was read of them.
        results: the detections. Small, medium and large masks are told apart by their own area, not the box's.
        task: "bbox" or "segm".

    Raises:
        FileNotFoundError: no such file.
        ValueError: another task, wrong annotations, an image or category of the detections that is not in them, or,
            for task segm, masks that are missing or not of their image's size.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    ground_truth = json_file if isinstance(json_file, GroundTruth) else GroundTruth(json_file)
    images, categories = ground_truth.locate(results)
    if task == "segm":
        ground_truth.check_masks(results, images)
        ground_truth.masks(np.arange(len(ground_truth.images)))  # refuses damaged ones
    if not len(results):
        logger.warning("%s: there is no detection, so that every AP is 0", results.name)
    # COCO's rules know no "ignore" but that of crowds, and count what has no area.
    truths = Truths(ground_truth, np.arange(len(ground_truth.images)), ground_truth.crowd, ground_truth.crowd)
    detections = order_detections(ground_truth, results, np.arange(len(results)), images, categories)
    rank = rank_in_group(detections.keys)
    detections, rank = detections.select(rank < MAX_DETS[-1]), rank[rank < MAX_DETS[-1]]
    counts = ~outside_ranges(results.areas(task)[detections.rows])
    matched, state = match_results(ground_truth, results, task, detections, truths)
    precision, recall = accumulate(detections.categories, counts, matched, state, truths)
    found = state[:, :, 0] == 1  # (M, T), of annotations of any size
    classes, total = detections.categories[matched], truths.number[:, 0]
    return CocoEvaluation(
        precision=precision,
        recall=recall,
        category_ids=ground_truth.category_ids,
        num_annotations=total,
        recalls={limit: _recall(classes, found & (rank[matched] < limit)[:, None], total) for limit in MAX_DETS},
    )


def _recall(classes: np.ndarray, found: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return (T, K) float64, -1 where nothing is annotated.

    Args:
        classes: (M,) int64 of detections.
        found: (M, T) bool, whether each finds an annotation.
        total: (K,) int64 annotations of each class.
    """
    counts = [np.bincount(classes, weights=column, minlength=len(total)) for column in found.T]
    return np.where(total > 0, np.stack(counts) / np.maximum(total, 1), -1.0)
