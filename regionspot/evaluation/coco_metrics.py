"""COCO AP and AR, from arrays: the numbers of ``pycocotools`` for any number of images and classes.

``COCOeval`` keeps an entry for every (image, class) pair: a terabyte for a data set of 13,000 classes.
"""

from dataclasses import dataclass

import numpy as np

from regionspot.data.coco_io import Results
from regionspot.evaluation.average_precision import (
    Evaluation,
    accumulate,
    locate_results,
    match_results,
    mean_percent,
)
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.tables import AREA_NAMES, Truths, is_outside_ranges, order_detections, rank_in_group

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


def evaluate_coco(
    ground_truth: GroundTruth, results: Results, task: str = "bbox", keep_matches: bool = False
) -> CocoEvaluation:
    """Evaluate detections by COCO's rules, with 1, 10 and 100 detections of a class in an image.

    Args:
        ground_truth: in COCO or LVIS format.
        results: the detections. Masks are small, medium or large by their own area, not their box's.
        task: "bbox" or "segm".
        keep_matches: return the matches, too.

    Raises:
        ValueError: unknown task, unknown image or category ids, or, for task segm, masks that are missing, damaged or
            not of their image's size.
    """
    images, categories = locate_results(ground_truth, results, task)
    annotations = np.arange(len(ground_truth.images))
    if task == "segm":
        ground_truth.masks(annotations)  # refuses damaged masks, also of classes without detections
    # COCO ignores crowds only, and counts annotations without area.
    truths = Truths(ground_truth, annotations, ground_truth.crowd, ground_truth.crowd)
    detections = order_detections(ground_truth, results, np.arange(len(results)), images, categories)
    rank = rank_in_group(detections.keys)
    detections, rank = detections.select(rank < MAX_DETS[-1]), rank[rank < MAX_DETS[-1]]
    counts = ~is_outside_ranges(results.areas(task)[detections.rows])
    matches = match_results(ground_truth, results, task, detections, truths, counts)
    matched = matches.rows
    precision, recall = accumulate(detections.categories, counts, matched, matches.state, truths.totals)

    is_true = matches.state[:, :, 0] == 1  # (M, T), annotations of any size
    classes, totals = detections.categories[matched], truths.totals[:, 0]
    recalls = {}
    for limit in MAX_DETS:
        within = is_true & (rank[matched] < limit)[:, None]
        num_true = np.stack([np.bincount(classes, weights=column, minlength=len(totals)) for column in within.T])
        recalls[limit] = np.where(totals > 0, num_true / np.maximum(totals, 1), -1.0)  # (T, K)
    kept = matches if keep_matches else None
    return CocoEvaluation(precision, recall, ground_truth.category_ids, totals, recalls, matches=kept)
