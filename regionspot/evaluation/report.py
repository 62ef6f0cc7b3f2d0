"""The outcome of an evaluation: metrics of each task, accuracy on annotated boxes, tables, and files."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tabulate import tabulate

from regionspot.data.coco_io import Results
from regionspot.evaluation.coco_metrics import CocoEvaluation, evaluate_coco
from regionspot.evaluation.ground_truth import FREQUENCIES, GroundTruth
from regionspot.evaluation.lvis_metrics import LvisEvaluation, evaluate_lvis
from regionspot.utils.files import atomic_path


@dataclass
class Outcome:
    """Metrics and recalls of one task in percent, and AP and the number of annotations of each category id."""

    metrics: dict[str, float]
    recalls: dict[str, float]
    per_class: dict[int, float]
    num_annotations: dict[int, int]


def evaluate_task(
    truth: GroundTruth,
    results: Results,
    task: str,
    metric: str,
    max_dets: int = 300,
    segm_areas: str = "masks",
) -> Outcome:
    """Evaluate detections.

    Args:
        truth: the annotations.
        results: the detections.
        task: "bbox" or "segm".
        metric: "lvis", "fixed" or "coco".
        max_dets: detections of an image that count, with "lvis": LVIS AP is of 300 at the most; -1 for all.
        segm_areas: see ``evaluate_lvis``.
    """
    evaluation: LvisEvaluation | CocoEvaluation
    if metric == "coco":
        evaluation = evaluate_coco(truth, results, task)
    else:
        evaluation = evaluate_lvis(truth, results, task, metric, max_dets, segm_areas=segm_areas)
    num_annotations = dict(zip(evaluation.category_ids.tolist(), evaluation.num_annotations.tolist()))
    return Outcome(evaluation.metrics(), evaluation.average_recalls(), evaluation.per_class(), num_annotations)


def region_accuracy(
    targets: Sequence[np.ndarray], top: Sequence[np.ndarray], frequencies: Sequence[str | None]
) -> dict[str, float]:
    """Return how often annotated boxes get their own class: top-1 and top-5 accuracy in percent.

    Args:
        targets: for each image (N,) int, the annotated classes of its regions.
        top: for each image (N, k) int, the best classes of its regions, best first.
        frequencies: for each class "r", "c" or "f", or another value where the data set has none.

    Returns:
        "top1", "top5", and where there are frequencies "top1_r", "top5_r", ...; NaN for a group without regions.
    """
    classes = np.concatenate(targets)
    is_own = np.concatenate(top) == classes[:, None]
    groups = np.array(frequencies)[classes]
    rows = {"": np.ones(len(classes), bool)}
    rows |= {f"_{frequency}": groups == frequency for frequency in FREQUENCIES if frequency in frequencies}
    return {
        f"top{k}{suffix}": float(100 * is_own[own, :k].any(axis=1).mean()) if own.any() else float("nan")
        for suffix, own in rows.items()
        for k in (1, 5)
    }


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """Return a table of metrics in percent, with a row for each task."""
    headers = ["", *next(iter(rows.values()))]
    return tabulate([[task, *values.values()] for task, values in rows.items()], headers=headers, floatfmt=".3f")


def write_outcomes(directory: Path, truth: GroundTruth, outcomes: dict[str, Outcome], **more: object) -> None:
    """Write metrics.json, with null where nothing is annotated and ``more`` beside, and per_class_<task>.csv."""
    for task, outcome in outcomes.items():
        with (
            atomic_path(directory / f"per_class_{task}.csv") as path,
            path.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["category_id", "name", "frequency", "annotations", "AP"])
            for category, name, frequency in zip(truth.category_ids.tolist(), truth.class_names, truth.frequencies):
                value = outcome.per_class[category]
                cell = "" if math.isnan(value) else repr(value)
                writer.writerow([category, name, frequency or "", outcome.num_annotations[category], cell])
    metrics = {task: without_nan(outcome.metrics) for task, outcome in outcomes.items()}
    with atomic_path(directory / "metrics.json") as path:
        path.write_text(json.dumps({**metrics, **more}, indent=1) + "\n")


def without_nan(metrics: dict[str, float]) -> dict[str, float | None]:
    """Return metrics with None in place of NaN, which JSON does not have."""
    return {key: None if math.isnan(value) else value for key, value in metrics.items()}
