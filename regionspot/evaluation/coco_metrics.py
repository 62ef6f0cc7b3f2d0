"""COCO AP through pycocotools, from the same arrays."""

import contextlib
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from regionspot.evaluation.ground_truth import GroundTruth, read_ground_truth
from regionspot.evaluation.results import Results

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RECALLS = ("AR@1", "AR@10", "AR@100", "ARs@100", "ARm@100", "ARl@100")


def evaluate_coco(json_file: str | Path, results: Results, task: str = "bbox") -> dict[str, float]:
    """Return AP, AP50, AP75, APs, APm and APl in percent, NaN where nothing is annotated, as Detectron2 does.

    Args, Raises: see ``run_coco_evaluation``.
    """
    return coco_metrics(run_coco_evaluation(json_file, results, task))


def run_coco_evaluation(json_file: str | Path | GroundTruth, results: Results, task: str = "bbox") -> COCOeval:
    """Evaluate detections by pycocotools' protocol, with 1, 10 and 100 detections of a class in an image.

    Args:
        json_file: annotations in COCO or LVIS format, or what was read of them.
        results: the detections. Small, medium and large masks are told apart by their own area, not the box's.
        task: "bbox" or "segm".

    Raises:
        FileNotFoundError: no such file.
        ValueError: another task, wrong annotations, an image or category of the detections that is not in them, or,
            for task segm, masks that are missing or not of their image's size.
    """
    if task not in ("bbox", "segm"):
        raise ValueError(f"task: expected one of bbox, segm, got {task!r}")
    ground_truth = json_file if isinstance(json_file, GroundTruth) else read_ground_truth(json_file)
    images, _ = ground_truth.positions(results)
    if task == "segm":
        ground_truth.check_masks(results, images)
        ground_truth.masks(np.arange(len(ground_truth.images)))  # refuses damaged ones
    if not len(results):
        logger.warning("%s: there is no detection, so that every AP is 0", results.name)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco(_complete(json.loads(ground_truth.path.read_text(encoding="utf-8-sig"))))
        nothing = _coco({**truth.dataset, "annotations": []})  # loadRes wants one entry at the least
        found = truth.loadRes(_entries(results, task)) if len(results) else nothing
        evaluation = COCOeval(truth, found, iouType=task)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def coco_metrics(evaluation: COCOeval) -> dict[str, float]:
    """Return AP, AP50, AP75, APs, APm, APl in percent, NaN where nothing is annotated."""
    return {name: _percent(value) for name, value in zip(METRICS, evaluation.stats[:6])}


def coco_recalls(evaluation: COCOeval) -> dict[str, float]:
    """Return AR@1, AR@10, AR@100, ARs@100, ARm@100, ARl@100 in percent, NaN where nothing is annotated."""
    return {name: _percent(value) for name, value in zip(RECALLS, evaluation.stats[6:])}


def coco_per_class(evaluation: COCOeval) -> tuple[dict[int, float], dict[int, int]]:
    """Return of each category id the AP in percent, NaN where nothing is annotated, and how many annotations count."""
    precision = evaluation.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1))  # (K,)
    ids = evaluation.params.catIds
    numbers = dict.fromkeys(ids, 0)
    for annotation in evaluation.cocoGt.dataset["annotations"]:
        numbers[annotation["category_id"]] += not annotation["ignore"]
    return {category: _percent(value) for category, value in zip(ids, precision)}, numbers


def _percent(value: float) -> float:
    return float(value) * 100 if value >= 0 else float("nan")


def _complete(dataset: dict[str, Any]) -> dict[str, Any]:
    """Fill in what pycocotools needs of annotations and people leave out: ids, areas (the boxes'), and iscrowd."""
    annotations = dataset["annotations"]
    unnumbered = not all(isinstance(annotation.get("id"), int) for annotation in annotations)
    for index, annotation in enumerate(annotations, 1):
        if unnumbered:
            annotation["id"] = index
        if annotation.get("area") is None:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        annotation.setdefault("iscrowd", 0)
    return dataset


def _coco(dataset: dict[str, Any]) -> COCO:
    """Return annotations as pycocotools knows them; ``info`` may be missing."""
    dataset.setdefault("info", {})
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _entries(results: Results, task: str) -> list[dict[str, Any]]:
    columns = (results.image_ids.tolist(), results.category_ids.tolist(), results.scores.tolist())
    entries = [{"image_id": i, "category_id": c, "score": s} for i, c, s in zip(*columns)]
    if task == "segm" or results.boxes_of_masks:
        regions, rles = results.require_masks()
        for entry, region in zip(entries, regions.tolist()):
            entry["segmentation"] = rles[region]
    else:
        for entry, box in zip(entries, results.boxes.tolist()):
            entry["bbox"] = box
    return entries
