"""Errors by kind: a set whose errors are known one by one, and properties that hold for any set."""

import pytest

from regionspot.data.coco_io import read_results
from regionspot.evaluation.error_kinds import KINDS, NOT_COUNTED, RIGHT, find_error_kinds
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.overlaps import find_overlaps
from regionspot.evaluation.report import evaluate_task

from .reference import make_world, write_world

CUP, SPOON, PLATE = 1, 2, 3


def write_set(directory, truths, detections):
    """Write a data set in COCO's format of (image, category, box) and of detections (image, category, box, score)."""
    images = sorted({image for image, *_ in [*truths, *detections]})
    world = {
        "images": [{"id": i, "height": 200, "width": 400, "file_name": f"{i}.png"} for i in images],
        "categories": [{"id": i, "name": name} for i, name in enumerate(("cup", "spoon", "plate"), 1)],
        "annotations": [
            {"id": k, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for k, (image, category, box) in enumerate(truths, 1)
        ],
    }
    results = [{"image_id": i, "category_id": c, "bbox": box, "score": score} for i, c, box, score in detections]
    return write_world(directory, world, results)


def analyze(annotations, results, metric="coco"):
    truth, read = GroundTruth(annotations), read_results(results)
    evaluation = evaluate_task(truth, read, "bbox", metric, keep_matches=True)
    overlaps = find_overlaps(truth, read, evaluation.matches.truths)
    return evaluation, find_error_kinds(truth, read, evaluation.matches, overlaps)


def by_row(evaluation, errors):
    """Return the kind of each detection in the order of the file."""
    names = {RIGHT: "right", NOT_COUNTED: "not counted", **dict(enumerate(KINDS))}
    rows = evaluation.matches.detections.rows.tolist()
    return {row: names[kind] for row, kind in zip(rows, errors.kinds.tolist())}


# Image 1: one cup at 0, one spoon at 100, one plate at 200; image 2: one plate that nothing is near.
TRUTHS = [
    (1, CUP, [0, 0, 40, 40]),
    (1, SPOON, [100, 0, 40, 40]),
    (1, PLATE, [200, 0, 40, 40]),
    (2, PLATE, [0, 0, 40, 40]),
]
DETECTIONS = {
    "right": (1, CUP, [0, 0, 40, 40], 0.9),
    "duplicate": (1, CUP, [0, 0, 40, 30], 0.8),  # IoU 0.75 with the cup, which the first was matched to
    "classification": (1, CUP, [100, 0, 40, 40], 0.7),  # on the spoon
    "localization": (1, PLATE, [220, 0, 40, 40], 0.6),  # IoU 1/3 with the plate
    "both": (1, SPOON, [220, 0, 40, 40], 0.5),
    "background": (2, CUP, [300, 100, 40, 40], 0.4),
}


def test_each_kind_is_told_apart(tmp_path):
    evaluation, errors = analyze(*write_set(tmp_path, TRUTHS, list(DETECTIONS.values())))
    assert by_row(evaluation, errors) == dict(enumerate(DETECTIONS))
    assert errors.counts() == dict.fromkeys(KINDS, 1)  # the plate of image 2 is missed, others are covered by an error
    assert errors.missed.tolist() == [False, False, False, True] and errors.matched.tolist() == [True] + [False] * 3


def test_gain_of_each_kind(tmp_path):
    """By hand: AP50 is the mean of cup, spoon and plate."""
    _, errors = analyze(*write_set(tmp_path, TRUTHS, list(DETECTIONS.values())))
    assert errors.ap50 == pytest.approx(100 / 3)  # the cup comes first, and nothing else is right
    half = 100 * 51 / 101  # one of two plates: 51 of the 101 recalls, at precision 1
    assert errors.gains["classification"] == pytest.approx(100 / 3)  # the spoon comes before its false positive
    assert errors.gains["localization"] == pytest.approx(half / 3)
    # The plate of image 2 no longer counts; the other has no detection that is right.
    assert errors.gains["missed"] == 0
    assert errors.gains["both"] == errors.gains["duplicate"] == errors.gains["background"] == 0


def test_false_positives_before_a_hit_cost(tmp_path):
    first = [(1, CUP, [0, 0, 40, 40], 0.1)]  # the hit comes last
    wrong = {
        "background": (1, CUP, [300, 100, 40, 40], 0.9),
        "both": (1, CUP, [220, 0, 40, 40], 0.9),
        "classification": (1, CUP, [100, 0, 40, 40], 0.9),
    }
    for kind, detection in wrong.items():
        _, errors = analyze(*write_set(tmp_path, TRUTHS, [*first, detection]))
        assert errors.ap50 == pytest.approx(50 / 3)
        expected = dict.fromkeys(KINDS, 0.0) | {kind: 50 / 3 if kind != "classification" else 50 / 3 + 100 / 3}
        expected["missed"] = errors.gains["missed"]
        assert errors.gains == pytest.approx(expected), kind


def test_only_the_best_error_on_an_object_becomes_right(tmp_path):
    """Two cups on the spoon, corrected: the better one is a spoon, the other is removed, not a false positive."""
    detections = [(1, CUP, [100, 0, 40, 40], 0.8), (1, CUP, [100, 0, 40, 38], 0.9), (1, CUP, [0, 0, 40, 40], 0.1)]
    _, errors = analyze(*write_set(tmp_path, TRUTHS, detections))
    assert errors.ap50 == pytest.approx(100 / 9)  # the cup is third
    assert errors.gains["classification"] == pytest.approx((100 - 100 / 3) / 3 + 100 / 3)


def test_error_on_a_found_object_is_removed(tmp_path):
    detections = [(1, SPOON, [100, 0, 40, 40], 0.9), (1, CUP, [100, 0, 40, 40], 0.8), (1, CUP, [0, 0, 40, 40], 0.1)]
    evaluation, errors = analyze(*write_set(tmp_path, TRUTHS, detections))
    assert by_row(evaluation, errors) == {0: "right", 1: "classification", 2: "right"}
    assert errors.gains["classification"] == pytest.approx(50 / 3)  # the cup is first; the spoon is still found once


def test_missed_objects_of_a_class(tmp_path):
    """Without its missed object a class with false positives has AP 0, and one without them does not take part."""
    truths = [(1, CUP, [0, 0, 40, 40]), (1, SPOON, [100, 0, 40, 40]), (1, PLATE, [200, 0, 40, 40])]
    detections = [(1, CUP, [0, 0, 40, 40], 0.9), (1, SPOON, [300, 100, 40, 40], 0.8)]
    _, errors = analyze(*write_set(tmp_path, truths, detections))
    assert errors.counts()["missed"] == 2 and errors.ap50 == pytest.approx(100 / 3)
    assert errors.gains["missed"] == pytest.approx(100 / 2 - 100 / 3)


def test_boundaries_of_iou(tmp_path):
    """0.5 is on an object, and 0.1 is not background."""
    cup = [0, 0, 100, 100]
    boxes = {"right": [0, 0, 100, 50], "localization": [0, 0, 100, 49.9]}
    boxes |= {"background": [0, 0, 100, 9.9], "localization, 0.1": [0, 0, 100, 10]}
    for kind, box in boxes.items():
        evaluation, errors = analyze(*write_set(tmp_path, [(1, CUP, cup)], [(1, CUP, box, 0.5)]))
        assert by_row(evaluation, errors) == {0: kind.split(",")[0]}, kind
    for kind, box in {"classification": [0, 0, 100, 50], "both": [0, 0, 100, 10], "background": [0, 0, 100, 9]}.items():
        evaluation, errors = analyze(*write_set(tmp_path, [(1, CUP, cup)], [(1, SPOON, box, 0.5)]))
        assert by_row(evaluation, errors) == {0: kind}, kind


@pytest.mark.parametrize("metric", ["lvis", "fixed", "coco"])
@pytest.mark.parametrize("seed", range(4))
def test_any_set_keeps_the_evaluators_ap50(tmp_path, metric, seed):
    world, predictions = make_world(seed, detections=60, near=0.8)
    evaluation, errors = analyze(*write_world(tmp_path, world, predictions), metric)
    assert errors.ap50 == pytest.approx(evaluation.metrics()["AP50"], abs=1e-9)
    assert all(gain >= -1e-9 for gain in errors.gains.values())
    counts, matches = errors.counts(), evaluation.matches
    assert all(counts[kind] for kind in KINDS)
    judged = (matches.state[:, 0, 0] == 0).sum() + len(matches.detections.rows) - len(matches.rows)
    assert sum(counts.values()) - counts["missed"] <= judged  # LVIS does not count those in incomplete images
    assert errors.matched.sum() == (errors.kinds == RIGHT).sum() == (matches.state[:, 0, 0] == 1).sum()


def test_unverified_categories_are_no_errors(tmp_path):
    """LVIS: a detection counts only where its category was looked for."""
    world, predictions = make_world(0, images=1, ignored=0)
    evaluation, errors = analyze(*write_world(tmp_path, world, predictions), "lvis")
    image = world["images"][0]
    looked_for = {a["category_id"] for a in world["annotations"]} | set(image["neg_category_ids"])
    kept = [k for k, entry in enumerate(predictions) if entry["category_id"] in looked_for]
    assert set(by_row(evaluation, errors)) <= set(kept) and len(kept) < len(predictions)
    uncounted = {row for row, kind in by_row(evaluation, errors).items() if kind == "not counted"}
    incomplete = set(image["not_exhaustive_category_ids"])
    assert {predictions[row]["category_id"] for row in uncounted} <= incomplete


def test_ignored_annotations_are_not_missed(tmp_path):
    world, predictions = make_world(2, ignored=1.0, empty=0)
    _, errors = analyze(*write_world(tmp_path, world, predictions), "lvis")
    assert not errors.missed.any() and errors.counts()["classification"] == 0


def test_overlaps_match_all_pairs(tmp_path):
    world, predictions = make_world(5, detections=30)
    annotations, results = write_world(tmp_path, world, predictions)
    truth, read = GroundTruth(annotations), read_results(results)
    matches = evaluate_task(truth, read, "bbox", "lvis", keep_matches=True).matches
    overlaps = find_overlaps(truth, read, matches.truths)
    objects = [a for a in world["annotations"] if a["area"] > 0 and not a.get("ignore")]
    for row, entry in enumerate(predictions):
        x, y, w, h = entry["bbox"]
        best = {True: 0.0, False: 0.0}
        for other in objects:
            if other["image_id"] != entry["image_id"]:
                continue
            u, v, s, t = other["bbox"]
            width, height = min(x + w, u + s) - max(x, u), min(y + h, v + t) - max(y, v)
            overlap = max(width, 0) * max(height, 0)
            is_own = other["category_id"] == entry["category_id"]
            best[is_own] = max(best[is_own], overlap / (w * h + s * t - overlap))
        assert (overlaps.own_iou[row], overlaps.other_iou[row]) == pytest.approx((best[True], best[False]))
        for iou, partner in ((overlaps.own_iou, overlaps.own), (overlaps.other_iou, overlaps.other)):
            assert (partner[row] >= 0) == (iou[row] > 0)
