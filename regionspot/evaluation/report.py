"""The report of an evaluation: metrics of each task, accuracy on annotated boxes, tables, and files."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tabulate import tabulate

from regionspot.data.coco_io import Results
from regionspot.evaluation.average_precision import Evaluation
from regionspot.evaluation.coco_metrics import CocoEvaluation, evaluate_coco
from regionspot.evaluation.ground_truth import FREQUENCIES, GroundTruth
from regionspot.evaluation.lvis_metrics import LvisEvaluation, evaluate_lvis
from regionspot.utils.files import atomic_path

DECENT_AP = 10.0  # percent


def evaluate_task(
    truth: GroundTruth,
    results: Results,
    task: str,
    metric: str,
    max_dets: int = 300,
    segm_areas: str = "masks",
    keep_matches: bool = False,
) -> LvisEvaluation | CocoEvaluation:
    """Evaluate detections by ``metric``: "lvis", "fixed" or "coco"; see ``evaluate_lvis`` and ``evaluate_coco``."""
    if metric == "coco":
        return evaluate_coco(truth, results, task, keep_matches)
    return evaluate_lvis(truth, results, task, metric, max_dets, segm_areas=segm_areas, keep_matches=keep_matches)


def region_accuracy(
    targets: Sequence[np.ndarray], top: Sequence[np.ndarray], frequencies: Sequence[str | None]
) -> dict[str, float]:
    """Return how often annotated boxes get their own class: top-1 and top-5 accuracy in percent.

    Args:
        targets: for each image (N,) int, the annotated classes of its regions.
        top: for each image (N, k) int, the best classes of its regions, best first.
        frequencies: "r", "c" or "f" of each class, or None where the data set has no frequencies.

    Returns:
        "top1", "top5", and where there are frequencies "top1_r", "top5_r", ...; NaN for a group without regions.
    """
    classes = np.concatenate(targets)
    is_correct = np.concatenate(top) == classes[:, None]  # (N, k)
    groups = np.array(frequencies)[classes]
    rows = {"": np.ones(len(classes), bool)}
    rows |= {f"_{frequency}": groups == frequency for frequency in FREQUENCIES if frequency in frequencies}
    return {
        f"top{k}{suffix}": float(100 * is_correct[group, :k].any(axis=1).mean()) if group.any() else float("nan")
        for suffix, group in rows.items()
        for k in (1, 5)
    }


def chance_warning(targets: Sequence[np.ndarray], top: Sequence[np.ndarray], ap: float) -> str:
    """Return a warning if names are no better than one name for all regions while AP is decent, "" if all is well.

    AP compares the scores of different images for each class, so it can be decent where all classes of a region are in
    the wrong order; it is then no measure of recognition.

    Args:
        targets, top: as for ``region_accuracy``.
        ap: AP of the boxes in percent.
    """
    classes, best = np.concatenate(targets), np.concatenate(top)[:, 0]
    top1, chance = 100 * float((best == classes).mean()), 100 * float(np.bincount(classes).max() / len(classes))
    if ap < DECENT_AP or chance > 50 or top1 > 1.1 * chance:
        return ""
    return (
        f"AP is {ap:.1f}, but the best name of a region is right for {top1:.1f}% of the annotated boxes, and the most "
        f"frequent name alone would be for {chance:.1f}%: the model does not tell the names of a region apart"
    )


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """Return a table of metrics in percent, with a row for each task."""
    headers = ["", *next(iter(rows.values()))]
    return tabulate([[task, *values.values()] for task, values in rows.items()], headers=headers, floatfmt=".3f")


def write_evaluations(
    directory: Path, truth: GroundTruth, evaluations: Mapping[str, Evaluation], **more: object
) -> None:
    """Write metrics.json, with null where nothing is annotated and ``more`` beside, and per_class_<task>.csv."""
    for task, evaluation in evaluations.items():
        with (
            atomic_path(directory / f"per_class_{task}.csv") as path,
            path.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["category_id", "name", "frequency", "annotations", "AP"])
            counts = evaluation.num_annotations.tolist()
            columns = zip(evaluation.per_class().items(), truth.class_names, truth.frequencies, counts)
            for (category, value), name, frequency, count in columns:
                writer.writerow([category, name, frequency or "", count, "" if math.isnan(value) else repr(value)])
    metrics = {task: without_nan(evaluation.metrics()) for task, evaluation in evaluations.items()}
    with atomic_path(directory / "metrics.json") as path:
        path.write_text(json.dumps({**metrics, **more}, indent=1) + "\n")


def without_nan(metrics: dict[str, float]) -> dict[str, float | None]:
    """Return metrics with None in place of NaN, which JSON does not have."""
    return {key: None if math.isnan(value) else value for key, value in metrics.items()}
