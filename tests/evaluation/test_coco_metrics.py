"""COCO's protocol as Detectron2 runs it."""

import contextlib
import copy
import io

import numpy as np
import pytest
from detectron2.evaluation.coco_evaluation import COCOEvaluator, _evaluate_predictions_on_coco
from pycocotools.coco import COCO

from regionspot.evaluation.coco_metrics import coco_per_class, coco_recalls, evaluate_coco, run_coco_evaluation
from regionspot.evaluation.results_file import read_results

from .reference import assert_same, make_world, write_world


def detectron2_says(annotations, predictions, task, names):
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _evaluate_predictions_on_coco(COCO(str(annotations)), copy.deepcopy(predictions), task)
        evaluator = COCOEvaluator.__new__(COCOEvaluator)
        evaluator._logger = __import__("logging").getLogger(__name__)
        return evaluator._derive_coco_results(evaluation, task, names)


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(2))
def test_as_detectron2(tmp_path, task, seed):
    world, predictions = make_world(seed, masks=task == "segm", ties=seed > 0, detections=30)
    world["info"] = {}
    for entry in world["annotations"][::7]:
        entry["iscrowd"] = 1
    annotations, results = write_world(tmp_path, world, predictions)
    names = [str(i) for i in sorted(entry["id"] for entry in world["categories"])]
    theirs = detectron2_says(annotations, predictions, task, names)
    evaluation = run_coco_evaluation(annotations, read_results(results), task)
    ours = evaluate_coco(annotations, read_results(results), task)
    assert list(ours) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    classes, numbers = coco_per_class(evaluation)
    assert_same(ours | {f"AP-{category}": value for category, value in classes.items()}, theirs)
    for category, number in numbers.items():
        own = [entry for entry in world["annotations"] if entry["category_id"] == category]
        assert number == sum(not entry["iscrowd"] for entry in own)
    assert coco_recalls(evaluation)["AR@100"] > 0


def test_what_annotations_may_lack(tmp_path):
    world, predictions = make_world(2)
    whole = write_world(tmp_path / "whole", world, predictions)
    world = {**world, "annotations": [dict(entry) for entry in world["annotations"]]}
    for entry in world["annotations"]:
        del entry["iscrowd"], entry["id"]
    for entry in (*world["images"], *world["categories"]):
        for key in ("frequency", "neg_category_ids", "not_exhaustive_category_ids"):
            entry.pop(key, None)
    less = write_world(tmp_path / "less", world, predictions)
    expected, got = (evaluate_coco(path, read_results(results)) for path, results in (whole, less))
    assert_same(got, expected)


def test_no_detection_is_zero_and_said(tmp_path, caplog):
    annotations, results = write_world(tmp_path, make_world(2)[0], [])
    assert evaluate_coco(annotations, read_results(results))["AP"] == 0
    assert "no detection" in caplog.text


def test_nothing_annotated_is_nan(tmp_path):
    world, predictions = make_world(2)
    annotations, results = write_world(tmp_path, {**world, "annotations": []}, predictions)
    assert all(np.isnan(value) for value in evaluate_coco(annotations, read_results(results)).values())


def test_errors(tmp_path):
    world, predictions = make_world(2, masks=True)
    annotations, results = write_world(tmp_path, world, predictions)
    read = read_results(results)
    with pytest.raises(ValueError, match="expected one of bbox, segm"):
        evaluate_coco(annotations, read, "keypoints")
    with pytest.raises(FileNotFoundError, match="no such file"):
        evaluate_coco(tmp_path / "nothing.json", read)
    predictions[1]["image_id"] = 99999
    _, results = write_world(tmp_path, world, predictions)
    with pytest.raises(ValueError, match="entry 1 has image id 99999"):
        evaluate_coco(annotations, read_results(results))
    world["annotations"][3]["segmentation"] = []
    annotations, _ = write_world(tmp_path, world, predictions)
    with pytest.raises(ValueError, match=r"annotations.3.: expected polygons"):
        evaluate_coco(annotations, read, "segm")
