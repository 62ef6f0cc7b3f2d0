"""What an evaluation comes to: metrics by task, tables, and files."""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from regionspot.data.coco_io import Results
from regionspot.evaluation.coco_metrics import CocoEvaluation, run_coco_evaluation
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.lvis_metrics import LvisEvaluation, run_lvis_evaluation
from regionspot.utils.files import atomic_path


@dataclass
class Outcome:
    """What one task came to, in percent: metrics, recalls, AP of category ids, and how many annotations these have."""

    metrics: dict[str, float]
    recalls: dict[str, float]
    per_class: dict[int, float]
    numbers: dict[int, int]


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
        segm_areas: see ``run_lvis_evaluation``.
    """
    evaluation: LvisEvaluation | CocoEvaluation
    if metric == "coco":
        evaluation = run_coco_evaluation(truth, results, task)
    else:
        evaluation = run_lvis_evaluation(truth, results, task, metric, max_dets, segm_areas=segm_areas)
    numbers = dict(zip(evaluation.category_ids.tolist(), evaluation.num_annotations.tolist()))
    return Outcome(evaluation.metrics(), evaluation.average_recalls(), evaluation.per_class(), numbers)


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """Return a table of metrics in percent, with a row for each task."""
    headers = ["", *next(iter(rows.values()))]
    return tabulate([[task, *values.values()] for task, values in rows.items()], headers=headers, floatfmt=".3f")


def write_outcomes(directory: Path, truth: GroundTruth, outcomes: dict[str, Outcome], **more: object) -> None:
    """Write metrics.json, with null where nothing is annotated and ``more`` beside, and per_class_<task>.csv."""
    metrics = {task: without_nan(outcome.metrics) for task, outcome in outcomes.items()}
    for task, outcome in outcomes.items():
        with (
            atomic_path(directory / f"per_class_{task}.csv") as path,
            path.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(["category_id", "name", "frequency", "annotations", "AP"])
            for category, name, frequency in zip(truth.category_ids.tolist(), truth.class_names, truth.frequencies):
                value = outcome.per_class[category]
                shown = "" if math.isnan(value) else repr(value)
                writer.writerow([category, name, frequency or "", outcome.numbers[category], shown])
    with atomic_path(directory / "metrics.json") as path:
        path.write_text(json.dumps({**metrics, **more}, indent=1) + "\n")


def without_nan(metrics: dict[str, float]) -> dict[str, float | None]:
    """Return metrics with None in place of NaN, which JSON does not have."""
    return {key: None if math.isnan(value) else value for key, value in metrics.items()}
