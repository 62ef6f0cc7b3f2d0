"""tools/evaluate_predictions.py from files to files."""

import csv
import json
import math
import runpy
import sys

import pytest

from regionspot.utils.files import sha256_of_file
from regionspot_cli.commands import COMMANDS

from ..evaluation.reference import assert_same, best_of_each_class, make_world, run_lvis, write_world
from ..helpers import ROOT

KEYS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"]


@pytest.fixture
def case(tmp_path):
    world, predictions = make_world(3, masks=True, detections=25)
    return world, predictions, *write_world(tmp_path, world, predictions)


def run(annotations, results, *more):
    arguments = ["--annotations", str(annotations), "--predictions", str(results), *map(str, more)]
    with pytest.raises(SystemExit) as ended:
        COMMANDS["evaluate-predictions"].run(arguments)
    return ended.value.code


def test_boxes_and_masks(case, tmp_path, capsys):
    world, predictions, annotations, results = case
    assert run(annotations, results, "--output", tmp_path / "out") == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics) == ["bbox", "segm"]
    for task in metrics:
        expected, expected_per_class = run_lvis(annotations, predictions, task)
        assert_same(metrics[task], {key: expected[key] for key in KEYS})
        with (tmp_path / "out" / f"per_class_{task}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert list(rows[0]) == ["category_id", "name", "frequency", "annotations", "AP"]
        per_class = {int(row["category_id"]): float(row["AP"]) if row["AP"] else math.nan for row in rows}
        assert_same(per_class, expected_per_class)
        assert {row["name"] for row in rows} == {entry["name"] for entry in world["categories"]}
        assert sum(int(row["annotations"]) for row in rows) <= len(world["annotations"])
    protocol, *table = capsys.readouterr().out.splitlines()
    assert "protocol lvis | task bbox segm | 300 detections per image" in protocol
    images = len({entry["image_id"] for entry in predictions})
    assert f"{images} of {len(world['images'])}" in protocol
    for path in (annotations, results):
        assert f"{path.name} (sha256 {sha256_of_file(path)[:12]})" in protocol
    assert f"{metrics['segm']['APr']:.3f}" in "\n".join(table)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "evaluation.json",
        "metrics.json",
        "per_class_bbox.csv",
        "per_class_segm.csv",
    ]


def test_fixed(case, tmp_path, capsys):
    _, predictions, annotations, results = case
    assert run(annotations, results, "--protocol", "fixed", "--task", "bbox", "--output", tmp_path) == 0
    expected, _ = run_lvis(annotations, best_of_each_class(predictions, 10_000), "bbox", -1)
    assert_same(json.loads((tmp_path / "metrics.json").read_text())["bbox"], {key: expected[key] for key in KEYS})
    assert "protocol fixed | task bbox | 10000 detections per class" in capsys.readouterr().out


def test_coco_by_content(tmp_path, capsys):
    world, predictions = make_world(3)
    for image in world["images"]:
        del image["neg_category_ids"]
    annotations, results = write_world(tmp_path, world, predictions, lines=True)
    assert run(annotations, results, "--output", tmp_path) == 0
    assert list(json.loads((tmp_path / "metrics.json").read_text())["bbox"]) == KEYS[:6]
    assert "protocol coco | task bbox | 100 detections per image and class" in capsys.readouterr().out


def test_nothing_annotated_is_null(tmp_path):
    world, predictions = make_world(3, frequencies="rc")
    assert run(*write_world(tmp_path, world, predictions), "--output", tmp_path) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["bbox"]["APf"] is None


def test_errors_are_one_line_and_leave_nothing(case, tmp_path, capsys):
    _, predictions, annotations, results = case
    predictions[4]["category_id"] = 0
    results.write_text(json.dumps(predictions))
    for arguments in ((annotations, results), (annotations, tmp_path / "none.json"), (results, results)):
        assert run(*arguments, "--output", tmp_path / "out") == 1
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        assert not captured.out
    assert not (tmp_path / "out").exists()


def test_as_a_program(case, monkeypatch, capsys):
    *_, annotations, results = case
    tool = ROOT / "tools" / "evaluate_predictions.py"
    for predictions, status in ((results, 0), (annotations, 1)):
        monkeypatch.setattr(
            sys, "argv", [str(tool), "--annotations", str(annotations), "--predictions", str(predictions)]
        )
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(tool), run_name="__main__")
        assert end.value.code == status
    assert "got an annotation file" in capsys.readouterr().err
