"""The numbers of an evaluation that a report shows: a few arrays for each class, however many detections there are."""

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regionspot.data.coco_io import read_results
from regionspot.evaluation.average_precision import Evaluation
from regionspot.evaluation.error_kinds import find_error_kinds
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.naming import Calibration, Naming, name_objects
from regionspot.evaluation.overlaps import find_overlaps
from regionspot.evaluation.report import evaluate_task
from regionspot.report.run import Run
from regionspot.report.worst_images import ImageErrors, find_worst_images

STAGES = ("reading predictions", "evaluating", "comparing boxes of all classes", "telling errors apart")


def show_nothing(stage: str) -> None:
    """Do not show how far an analysis is."""


@dataclass(eq=False)
class Analysis:
    """What the boxes of an evaluation say about the model; AP in percent.

    Attributes:
        run: the evaluation.
        per_class: by task (K,) float64 AP, NaN where nothing is annotated.
        curves: (2, 101) float64 precision at recalls of 0, 0.01, ...: at IoU 0.5, and the mean of IoU 0.5 to 0.95,
            averaged over the classes.
        error_counts, error_gains: by kind of error, see ``ErrorKinds``.
        ap50: AP50 of the boxes.
        objects, located, right: (K,) int64, annotated objects of each class, those with a detection on them, and those
            whose best detection has the right name.
        confusions: (annotated category, first name, objects), see ``Naming``.
        calibration: of first names; None if scores are no probabilities.
        worst: the images with most errors.
        threshold: the score above which detections have the best F1, for ``worst``.
    """

    run: Run
    per_class: dict[str, np.ndarray]
    curves: np.ndarray
    error_counts: dict[str, int]
    error_gains: dict[str, float]
    ap50: float
    objects: np.ndarray
    located: np.ndarray
    right: np.ndarray
    confusions: list[tuple[int, int, int]]
    calibration: Calibration | None
    worst: list[ImageErrors]
    threshold: float


def analyze_run(
    run: Run, truth: GroundTruth, num_images: int = 0, progress: Callable[[str], None] = show_nothing
) -> Analysis:
    """Evaluate the boxes of a run again, and find what is wrong.

    Args:
        run: the evaluation.
        truth: its annotations.
        num_images: number of worst images to describe.
        progress: called with each of the ``STAGES`` when it starts.

    Raises:
        ValueError: the files changed after the evaluation, so that its numbers are no longer theirs.
    """
    progress(STAGES[0])
    results, record = read_results(run.predictions), run.record
    progress(STAGES[1])
    evaluation = evaluate_task(truth, results, "bbox", record.metric, record.max_dets, keep_matches=True)
    _check_metrics(run, evaluation)
    assert evaluation.matches is not None
    matches = evaluation.matches
    progress(STAGES[2])
    overlaps = find_overlaps(truth, results, matches.truths)
    progress(STAGES[3])
    errors = find_error_kinds(truth, results, matches, overlaps)
    naming = name_objects(truth, results, matches.truths, overlaps)
    worst, threshold = find_worst_images(truth, results, matches, errors, num_images)
    return Analysis(
        run=run,
        per_class={"bbox": np.array(list(evaluation.per_class().values())), **_read_mask_ap(run, truth)},
        curves=_mean_curves(evaluation),
        error_counts=errors.counts(),
        error_gains=errors.gains,
        ap50=errors.ap50,
        **_count_objects(naming, len(truth.category_ids)),
        confusions=naming.confusions(),
        calibration=naming.calibration(),
        worst=worst,
        threshold=threshold,
    )


def _check_metrics(run: Run, evaluation: Evaluation) -> None:
    expected = run.tasks.get("bbox", {})
    for key, value in evaluation.metrics().items():
        recorded = expected.get(key, value)
        recorded = math.nan if recorded is None else recorded
        if not math.isclose(recorded, value, abs_tol=1e-9) and not (math.isnan(recorded) and math.isnan(value)):
            raise ValueError(
                f"{run.directory}: metrics.json has {key} {recorded:.6f} of the boxes, but its annotations and "
                f"predictions give {value:.6f}: files changed after the evaluation; evaluate again"
            )


def _mean_curves(evaluation: Evaluation) -> np.ndarray:
    """Return precision (2, 101) at IoU 0.5 and as the mean over all IoU thresholds, averaged over annotated classes."""
    annotated = np.flatnonzero(evaluation.num_annotations > 0)
    if not len(annotated):
        return np.zeros((2, evaluation.precision.shape[1]))
    precision = evaluation.precision[:, :, annotated, 0].mean(axis=2)  # (T, 101)
    return np.stack([precision[0], precision.mean(axis=0)])


def _count_objects(naming: Naming, num_classes: int) -> dict[str, np.ndarray]:
    masks: Sequence[tuple[str, np.ndarray]] = (
        ("objects", np.ones(len(naming.targets), bool)),
        ("located", naming.is_located),
        ("right", naming.is_right),
    )
    return {name: np.bincount(naming.targets[mask], minlength=num_classes) for name, mask in masks}


def _read_mask_ap(run: Run, truth: GroundTruth) -> dict[str, np.ndarray]:
    """Return the AP of masks of each class as the evaluation wrote it, {} where masks were not evaluated."""
    path = Path(run.directory, "per_class_segm.csv")
    if "segm" not in run.tasks or not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        values = {int(row["category_id"]): float(row["AP"] or "nan") for row in csv.DictReader(file)}
    return {"segm": np.array([values.get(category, math.nan) for category in truth.category_ids.tolist()])}
