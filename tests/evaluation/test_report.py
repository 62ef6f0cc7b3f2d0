"""The report of an evaluation: limits reach the metrics, and files hold every class."""

import csv
import json

import numpy as np
import pytest

from regionspot.data.coco_io import read_results
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.report import chance_warning, evaluate_task, write_evaluations

from .reference import make_world, run_lvis, write_world


def test_limit_of_detections_reaches_metrics(tmp_path):
    world, predictions = make_world(5)
    annotations, results = write_world(tmp_path, world, predictions)
    truth, read = GroundTruth(annotations), read_results(results)
    for limit in (1, 300):
        expected, _ = run_lvis(annotations, predictions, "bbox", limit)
        evaluation = evaluate_task(truth, read, "bbox", "lvis", limit)
        assert evaluation.metrics()["AP"] == pytest.approx(expected["AP"], abs=1e-9)
        assert f"AR@{limit}" in evaluation.average_recalls()


def test_report_files(tmp_path):
    world, predictions = make_world(1, frequencies="rc")
    annotations, results = write_world(tmp_path, world, predictions)
    truth = GroundTruth(annotations)
    evaluation = evaluate_task(truth, read_results(results), "bbox", "lvis")
    write_evaluations(tmp_path, truth, {"bbox": evaluation}, protocol="a line")
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["protocol"] == "a line" and report["bbox"]["APf"] is None
    assert report["bbox"]["AP"] == evaluation.metrics()["AP"] > 0
    with (tmp_path / "per_class_bbox.csv").open() as file:
        rows = list(csv.DictReader(file))
    by_id = {entry["id"]: entry for entry in world["categories"]}
    assert [int(row["category_id"]) for row in rows] == sorted(by_id)
    for row in rows:
        category = by_id[int(row["category_id"])]
        own = [entry for entry in world["annotations"] if entry["category_id"] == category["id"]]
        assert (row["name"], row["frequency"]) == (category["name"], category["frequency"])
        assert int(row["annotations"]) == sum(entry["area"] > 0 and not entry.get("ignore") for entry in own)
    shown = [float(row["AP"]) for row in rows if row["AP"]]
    assert np.mean(shown) == pytest.approx(evaluation.metrics()["AP"])


def test_one_name_for_all_is_warned_about():
    targets, constant = [np.array([0, 0, 1]), np.array([2, 3])], [np.zeros((3, 2), int), np.zeros((2, 2), int)]
    warning = chance_warning(targets, constant, 35.0)
    assert "AP is 35.0" in warning and "right for 40.0% of the annotated boxes" in warning
    assert not chance_warning(targets, constant, 9.0)  # AP is low, too: nothing contradicts
    right = [np.stack([own, own], axis=1) for own in targets]
    assert not chance_warning(targets, right, 35.0)
    assert not chance_warning([np.zeros(9, int)], [np.zeros((9, 1), int)], 100.0)  # one class: constant is right
