"""COCO metrics match pycocotools and Detectron2 to 1e-9."""

import contextlib
import copy
import io
import time

import numpy as np
import pytest
from detectron2.evaluation.coco_evaluation import COCOEvaluator, _evaluate_predictions_on_coco
from pycocotools.coco import COCO

from regionspot.data.coco_io import read_results
from regionspot.evaluation.coco_metrics import MAX_DETS, evaluate_coco
from regionspot.evaluation.ground_truth import GroundTruth

from .reference import assert_same, make_world, write_world

HOSTILE = {
    "plain": {},
    "ties": {"ties": True},
    "more than 100 of a class": {"detections": 300, "categories": 1, "images": 3},
    "more than 100 of a class, ties": {"detections": 300, "categories": 1, "images": 3, "ties": True},
    "crowded": {"categories": 2, "truths": 40, "near": 0.95, "images": 4},
    "crowded, ties": {"categories": 1, "truths": 40, "near": 1.0, "images": 3, "ties": True},
    "many categories": {"categories": 60},
    "mostly empty": {"empty": 0.8},
}


def make_hostile(seed, crowds=0.2, **options):
    """Return a world with crowds, boxes without area and boxes on the bounds of the area ranges."""
    world, predictions = make_world(seed, **options)
    rng, world["info"] = np.random.default_rng(seed), {}
    for entry in world["annotations"]:
        entry["iscrowd"] = int(rng.random() < crowds)
        if rng.random() < 0.05:
            entry["bbox"][2] = 0.0
    for entry in predictions:
        if rng.random() < 0.3:
            entry["bbox"][2:] = [float(v) for v in rng.choice([0, 8, 32, 96, 128], 2)]
    return world, predictions


def run_pycocotools(annotations, predictions, task):
    """Return COCOeval after ``evaluate``, ``accumulate`` and ``summarize``, run as Detectron2 does."""
    with contextlib.redirect_stdout(io.StringIO()):
        return _evaluate_predictions_on_coco(COCO(str(annotations)), copy.deepcopy(predictions), task)


def compare(directory, world, predictions, task="bbox"):
    annotations, results = write_world(directory, world, predictions)
    reference = run_pycocotools(annotations, predictions, task)
    evaluation = evaluate_coco(GroundTruth(annotations), read_results(results), task)
    same = {"rtol": 0, "atol": 1e-9}
    np.testing.assert_allclose(evaluation.precision, reference.eval["precision"][..., -1], **same)
    np.testing.assert_allclose(evaluation.recall, reference.eval["recall"][..., -1], **same)
    for index, limit in enumerate(MAX_DETS):
        np.testing.assert_allclose(evaluation.recalls[limit], reference.eval["recall"][:, :, 0, index], **same)
    stats = [value * 100 if value >= 0 else np.nan for value in reference.stats]
    np.testing.assert_allclose([*evaluation.metrics().values(), *evaluation.average_recalls().values()], stats, **same)
    return evaluation, reference


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("seed", range(2))
def test_boxes_as_pycocotools(tmp_path, kind, seed):
    compare(tmp_path, *make_hostile(seed, **HOSTILE[kind]))


@pytest.mark.parametrize("kind", HOSTILE)
def test_masks_as_pycocotools(tmp_path, kind):
    options = {"detections": 12, **HOSTILE[kind]}
    world, predictions = make_hostile(11, masks=True, **options)
    compare(tmp_path, world, predictions, "segm")


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_crowds_match_repeatedly_and_last(tmp_path, task):
    world, predictions = make_hostile(3, crowds=0.6, masks=True, categories=2, truths=12, near=1.0, images=5)
    evaluation, _ = compare(tmp_path, world, predictions, task)
    without = [{**entry, "iscrowd": 0} for entry in world["annotations"]]
    assert compare(tmp_path, {**world, "annotations": without}, predictions, task)[0].metrics() != evaluation.metrics()
    compare(tmp_path, {**world, "annotations": [{**e, "iscrowd": 1} for e in without]}, predictions, task)


def test_world_is_not_trivial(tmp_path):
    world, predictions = make_world(3, images=20, detections=60)
    evaluation, _ = compare(tmp_path, {**world, "info": {}}, predictions)
    values = [*evaluation.metrics().values(), *evaluation.average_recalls().values()]
    assert all(0 < value < 100 for value in values) and len({*values}) >= len(values) - 1  # AR@100 may be AR@10


def test_annotation_id_zero_as_pycocotools(tmp_path, caplog):
    world, predictions = make_hostile(3, images=4, truths=2, categories=2, near=1.0)
    for entry in world["annotations"]:
        entry["id"] -= 1
    compare(tmp_path, world, predictions)
    assert "number from 1" in caplog.text


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_masks_without_boxes_as_pycocotools(tmp_path, task):
    world, predictions = make_hostile(6, masks=True)
    for entry in predictions:
        del entry["bbox"]
    compare(tmp_path, world, predictions, task)


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_classes_as_detectron2(tmp_path, task):
    world, predictions = make_hostile(1, masks=task == "segm", detections=30)
    evaluation, reference = compare(tmp_path, world, predictions, task)
    evaluator = COCOEvaluator.__new__(COCOEvaluator)
    evaluator._logger = __import__("logging").getLogger(__name__)
    names = [str(i) for i in sorted(entry["id"] for entry in world["categories"])]
    with contextlib.redirect_stdout(io.StringIO()):
        expected = evaluator._derive_coco_results(reference, task, names)
    assert_same(
        evaluation.metrics() | {f"AP-{category}": value for category, value in evaluation.per_class().items()}, expected
    )
    for category, count in zip(evaluation.category_ids, evaluation.num_annotations):
        own = [entry for entry in world["annotations"] if entry["category_id"] == category]
        assert count == sum(not entry["iscrowd"] for entry in own)


def test_optional_keys_of_annotations(tmp_path):
    world, predictions = make_world(2)
    whole = write_world(tmp_path / "whole", world, predictions)
    world = {**world, "annotations": [dict(entry) for entry in world["annotations"]]}
    for entry in world["annotations"]:
        del entry["iscrowd"], entry["id"]
    for entry in (*world["images"], *world["categories"]):
        for key in ("frequency", "neg_category_ids", "not_exhaustive_category_ids"):
            entry.pop(key, None)
    less = write_world(tmp_path / "less", world, predictions)
    expected, got = (evaluate_coco(GroundTruth(paths[0]), read_results(paths[1])) for paths in (whole, less))
    assert_same(got.metrics(), expected.metrics())


def test_no_detections_warn(tmp_path, caplog):
    annotations, results = write_world(tmp_path, make_world(2)[0], [])
    assert evaluate_coco(GroundTruth(annotations), read_results(results)).metrics()["AP"] == 0
    assert "no detection" in caplog.text


def test_nothing_annotated_is_nan(tmp_path):
    world, predictions = make_world(2)
    annotations, results = write_world(tmp_path, {**world, "annotations": []}, predictions)
    evaluation = evaluate_coco(GroundTruth(annotations), read_results(results))
    assert all(np.isnan(value) for value in evaluation.metrics().values())


def test_errors(tmp_path):
    world, predictions = make_world(2, masks=True)
    annotations, results = write_world(tmp_path, world, predictions)
    read = read_results(results)
    with pytest.raises(ValueError, match="expected one of bbox, segm"):
        evaluate_coco(GroundTruth(annotations), read, "keypoints")
    with pytest.raises(FileNotFoundError, match="no such file"):
        evaluate_coco(GroundTruth(tmp_path / "nothing.json"), read)
    predictions[1]["image_id"] = 99999
    _, results = write_world(tmp_path, world, predictions)
    with pytest.raises(ValueError, match="entry 1 has image id 99999"):
        evaluate_coco(GroundTruth(annotations), read_results(results))
    world["annotations"][3]["segmentation"] = []
    annotations, _ = write_world(tmp_path, world, predictions)
    with pytest.raises(ValueError, match=r"annotations.3.: expected polygons"):
        evaluate_coco(GroundTruth(annotations), read, "segm")


def test_cost_of_many_images_and_classes(tmp_path):
    """4 million pairs; an entry for each would take gigabytes and minutes."""
    images = [{"id": i, "height": 100, "width": 100} for i in range(2000)]
    categories = [{"id": i, "name": f"thing {i}"} for i in range(2000)]
    boxes = [{"image_id": i, "category_id": i, "bbox": [10, 10, 20, 20]} for i in range(2000)]
    annotations = [{**box, "id": i + 1, "area": 400, "iscrowd": 0} for i, box in enumerate(boxes)]
    predictions = [{**box, "score": 0.5} for box in boxes[::2]]
    world = {"images": images, "annotations": annotations, "categories": categories}
    paths, start = write_world(tmp_path, world, predictions), time.process_time()
    assert evaluate_coco(GroundTruth(paths[0]), read_results(paths[1])).metrics()["AP"] == pytest.approx(50)
    assert time.process_time() - start < 20
