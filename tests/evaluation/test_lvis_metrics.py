"""LVIS metrics match the lvis package."""

import json
import logging

import numpy as np
import pytest

from regionspot.data.coco_io import read_results
from regionspot.evaluation import matching
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.lvis_metrics import evaluate_lvis

from .reference import assert_same, best_of_each_class, make_world, run_lvis, write_world

KEYS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"]
HOSTILE = {
    "plain": {},
    "ties": {"ties": True},
    "more than 300 an image": {"detections": 450, "images": 3},
    "more than 300 an image, ties": {"detections": 450, "images": 3, "ties": True},
    "crowded": {"categories": 2, "truths": 40, "near": 0.95, "images": 4},
    "crowded, ties": {"categories": 1, "truths": 40, "near": 1.0, "images": 3, "ties": True},
    "all ignored": {"ignored": 1.0},
    "few": {"detections": 1, "near": 1.0},
    "many categories": {"categories": 60},
    "no frequent": {"frequencies": "rc"},
    "mostly empty": {"empty": 0.8},
}


def compare(directory, world, predictions, task, max_dets=300):
    annotations, results = write_world(directory, world, predictions)
    expected, expected_per_class = run_lvis(annotations, predictions, task, max_dets)
    evaluation = evaluate_lvis(GroundTruth(annotations), read_results(results), task, max_dets=max_dets)
    metrics = evaluation.metrics()
    assert list(metrics) == KEYS
    recalls = {key.replace(f"@{max_dets}", "@300"): value for key, value in evaluation.average_recalls().items()}
    assert_same(metrics | recalls, expected)
    assert_same(evaluation.per_class(), expected_per_class)
    return metrics


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("seed", range(3))
def test_boxes_as_lvis(tmp_path, kind, seed):
    world, predictions = make_world(seed, **HOSTILE[kind])
    compare(tmp_path, world, predictions, "bbox")


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if "300" not in kind])
def test_masks_as_lvis(tmp_path, kind):
    world, predictions = make_world(11, masks=True, **{"detections": 12, **HOSTILE[kind]})
    compare(tmp_path, world, predictions, "segm")
    compare(tmp_path / "boxes", world, predictions, "bbox")


def test_ious_at_thresholds_as_lvis(tmp_path):
    """Each IoU threshold and the ends of the area ranges, to the bit; 32 x 32 is small and medium."""
    places = [(area, k) for area in (1024.0, 9216.0) for k in range(9, 21)]
    world, _ = make_world(0, images=len(places), categories=1)
    category, world["annotations"], predictions = world["categories"][0]["id"], [], []
    for index, (image, (area, k)) in enumerate(zip(world["images"], places)):
        image |= {"neg_category_ids": [], "not_exhaustive_category_ids": []}
        both = {"image_id": image["id"], "category_id": category}
        world["annotations"].append({"id": index + 1, **both, "bbox": [8, 8, 20, 20], "area": area, "iscrowd": 0})
        scores = np.random.default_rng(index).random(3).tolist()
        for score, box in zip(scores, ([8, 8, 20, k], [40, 40, 32, 32], [40, 40, 96, 96])):
            predictions.append({**both, "bbox": box, "score": score})
    for entry in world["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    values = compare(tmp_path, world, predictions, "bbox")
    assert values["APs"] > 0 and values["APm"] > 0 and values["APl"] > 0
    [alone] = [entry for entry in predictions if entry["bbox"][3] == 10][:1]  # of IoU 0.5
    truth = {**world, "images": [image for image in world["images"] if image["id"] == alone["image_id"]]}
    truth["annotations"] = [entry for entry in world["annotations"] if entry["image_id"] == alone["image_id"]]
    values = compare(tmp_path, truth, [alone], "bbox")
    assert values["AP50"] == pytest.approx(100) and values["AP"] == pytest.approx(10) and values["AP75"] == 0


@pytest.mark.parametrize("max_dets", [1, 7, -1])
def test_limits_as_lvis(tmp_path, max_dets):
    world, predictions = make_world(5, ties=True)
    annotations, results = write_world(tmp_path, world, predictions)
    expected, _ = run_lvis(annotations, predictions, "bbox", max_dets)
    metrics = evaluate_lvis(GroundTruth(annotations), read_results(results), max_dets=max_dets).metrics()
    assert_same(metrics, {key: expected[key] for key in KEYS})


@pytest.mark.parametrize("limit", [1, 7, 50])
def test_block_sizes_as_lvis(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(matching, "PAIRS", limit)
    monkeypatch.setattr(matching, "_EDGES", limit)
    compare(tmp_path, *make_world(0, **HOSTILE["crowded"]), "bbox")


def test_world_is_not_trivial(tmp_path):
    world, predictions = make_world(3, images=20, detections=60)
    values = compare(tmp_path, world, predictions, "bbox")
    assert all(0 < value < 100 for value in values.values())
    assert len(set(values.values())) == len(values)


def test_masks_with_box_areas_as_lvis(tmp_path):
    world, predictions = make_world(4, masks=True, images=12)
    annotations, results = write_world(tmp_path, world, predictions)
    expected, _ = run_lvis(annotations, predictions, "segm", without_boxes=False)
    truth, read = GroundTruth(annotations), read_results(results)
    metrics = evaluate_lvis(truth, read, "segm", segm_areas="boxes").metrics()
    assert_same(metrics, {key: expected[key] for key in KEYS})
    assert metrics["APs"] != evaluate_lvis(truth, read, "segm").metrics()["APs"]


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_masks_without_boxes_as_lvis(tmp_path, task):
    world, predictions = make_world(6, masks=True)
    for entry in predictions:
        del entry["bbox"]
    compare(tmp_path, world, predictions, task)


def test_annotation_id_zero_as_lvis(tmp_path, caplog):
    world, predictions = make_world(3, images=4, truths=2, categories=2, near=1.0)
    for entry in world["annotations"]:
        entry["id"] -= 1
    compare(tmp_path, world, predictions, "bbox")
    assert "number from 1" in caplog.text


def test_integer_scores_and_unknown_negatives(tmp_path):
    world, predictions = make_world(8)
    for index, entry in enumerate(predictions):
        entry["score"] = index % 3 - 1
    world["images"][0]["neg_category_ids"].append(99999)
    compare(tmp_path, world, predictions, "bbox")


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("limit", [3, 10_000])
def test_fixed_ap_limits_each_class(tmp_path, task, limit):
    world, predictions = make_world(7, masks=task == "segm", ties=True, detections=30)
    annotations, results = write_world(tmp_path, world, predictions)
    expected, _ = run_lvis(annotations, best_of_each_class(predictions, limit), task, max_dets=-1)
    truth, read = GroundTruth(annotations), read_results(results)
    evaluation = evaluate_lvis(truth, read, task, "fixed", dets_per_class=limit)
    assert_same(evaluation.metrics(), {key: expected[key] for key in KEYS})
    assert list(evaluation.average_recalls()) == ["AR", "ARs", "ARm", "ARl"]
    if limit == 10_000:
        assert_same(evaluate_lvis(truth, read, task, protocol="fixed").metrics(), evaluation.metrics())


def test_fixed_ap_limit_is_10000(tmp_path):
    world, _ = make_world(0, images=1, categories=2)
    [image], classes = world["images"], [entry["id"] for entry in world["categories"]]
    entry = {"image_id": image["id"], "bbox": [0, 0, 1, 1], "category_id": classes[0]}
    predictions = [{**entry, "score": i / 20_000} for i in range(10_007)] + [{**entry, "score": 0.0}]
    predictions += [{**entry, "score": 0.0, "category_id": classes[1]}] * 2
    annotations, results = write_world(tmp_path, world, predictions)
    evaluation = evaluate_lvis(GroundTruth(annotations), read_results(results), protocol="fixed")
    assert evaluation.num_limited == 10_000 + 2


def test_fixed_ap_has_no_limit_per_image(tmp_path):
    world, predictions = make_world(9, images=2, detections=500, empty=0)
    annotations, results = write_world(tmp_path, world, predictions)
    truth, read = GroundTruth(annotations), read_results(results)
    expected, _ = run_lvis(annotations, predictions, "bbox", max_dets=-1)
    assert_same(evaluate_lvis(truth, read, protocol="fixed").metrics(), {key: expected[key] for key in KEYS})
    assert evaluate_lvis(truth, read, protocol="fixed").metrics() != evaluate_lvis(truth, read, max_dets=20).metrics()


def test_no_detections_warn(tmp_path, caplog):
    world, _ = make_world(1, frequencies="rc")
    annotations, results = write_world(tmp_path, world, [])
    values = evaluate_lvis(GroundTruth(annotations), read_results(results)).metrics()
    assert values["AP"] == 0
    assert np.isnan(values["APf"])
    assert "no detection" in caplog.text
    assert evaluate_lvis(GroundTruth(annotations), read_results(results), "segm").metrics()["AP"] == 0


def test_unverified_categories_warn(tmp_path, caplog):
    world, predictions = make_world(1)
    for image in world["images"]:
        image["neg_category_ids"] = []
    judged = {(entry["image_id"], entry["category_id"]) for entry in world["annotations"]}
    others = [entry for entry in predictions if (entry["image_id"], entry["category_id"]) not in judged]
    annotations, results = write_world(tmp_path, world, others)
    with caplog.at_level(logging.WARNING):
        evaluation = evaluate_lvis(GroundTruth(annotations), read_results(results))
    assert (evaluation.num_detections, evaluation.num_judged) == (len(others), 0)
    assert "annotated in its image" in caplog.text


def test_counts(tmp_path):
    world, predictions = make_world(2, ignored=0.3)
    annotations, results = write_world(tmp_path, world, predictions)
    evaluation = evaluate_lvis(GroundTruth(annotations), read_results(results), max_dets=5)
    counted = [entry for entry in world["annotations"] if entry["area"] > 0 and not entry.get("ignore")]
    for category, count in zip(evaluation.category_ids, evaluation.num_annotations):
        assert count == sum(entry["category_id"] == category for entry in counted)
    by_image = np.unique([entry["image_id"] for entry in predictions], return_counts=True)[1]
    assert evaluation.num_images_with_detections == len(by_image)
    assert evaluation.num_limited == np.minimum(by_image, 5).sum()


@pytest.mark.parametrize(
    ("part", "key", "words"),
    [
        ("categories", "frequency", "frequency"),
        ("images", "neg_category_ids", "neg_category_ids"),
        ("images", "not_exhaustive_category_ids", "not_exhaustive_category_ids"),
    ],
)
def test_annotations_without_lvis_keys_are_refused(tmp_path, part, key, words):
    world, predictions = make_world(0)
    del world[part][-1][key]
    annotations, results = write_world(tmp_path, world, predictions)
    with pytest.raises(ValueError, match=f"{words}.*protocol coco"):
        evaluate_lvis(GroundTruth(annotations), read_results(results))


@pytest.mark.parametrize("wrong", [{"task": "boxes"}, {"protocol": "coco"}, {"max_dets": 0}])
def test_invalid_arguments_are_refused(tmp_path, wrong):
    annotations, results = write_world(tmp_path, *make_world(0))
    with pytest.raises(ValueError, match="expected"):
        evaluate_lvis(GroundTruth(annotations), read_results(results), **wrong)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"segmentation": [[1, 2, 3]]}, "polygons"),
        ({"segmentation": {"size": [5, 5], "counts": "0"}}, "annotations.0.*RLE is damaged"),
        ({"segmentation": {"size": [5, 5], "counts": [25]}}, "height and width"),
        ({"segmentation": [[1, 2, 3, 4, 1e12, 6]]}, "polygons"),
        ({"bbox": None}, "no bbox"),
        ({"id": 2}, "id 2 occurs 2 times"),
        ({"image_id": 424242}, "image id 424242, which is not in 'images'"),
        ({"category_id": 424242}, "category id 424242, which is not in 'categories'"),
    ],
)
def test_invalid_annotations_are_refused(tmp_path, change, words):
    world, predictions = make_world(0, masks=True, empty=0, near=1.0, images=3)
    world["annotations"][0] |= change
    annotations, results = write_world(tmp_path, world, predictions)
    with pytest.raises(ValueError, match=words) as error:
        evaluate_lvis(GroundTruth(annotations), read_results(results), "segm")
    assert str(annotations) in str(error.value)


def test_uncompressed_masks_of_annotations(tmp_path):
    world, predictions = make_world(2, masks=True, near=1.0)
    sizes = {image["id"]: (image["height"], image["width"]) for image in world["images"]}
    for entry in world["annotations"]:
        height, width = sizes[entry["image_id"]]
        cut = min(int(entry["bbox"][0]) * height, height * width - 1)
        if entry["id"] % 2:
            entry["segmentation"] = {"size": [height, width], "counts": [cut, height * width - cut]}
    compare(tmp_path, json.loads(json.dumps(world)), predictions, "segm")
