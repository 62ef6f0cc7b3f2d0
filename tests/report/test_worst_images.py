"""The images with most errors, by hand."""

import numpy as np
import pytest

from regionspot.data.coco_io import read_results
from regionspot.evaluation.error_kinds import find_error_kinds
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.overlaps import find_overlaps
from regionspot.evaluation.report import evaluate_task
from regionspot.report.panels import find_image, make_panel
from regionspot.report.worst_images import best_threshold, find_worst_images

from ..evaluation.test_error_kinds import CUP, PLATE, SPOON, write_set


def worst(directory, truths, detections, num_images=9):
    annotations, results = write_set(directory, truths, detections)
    truth, read = GroundTruth(annotations), read_results(results)
    matches = evaluate_task(truth, read, "bbox", "coco", keep_matches=True).matches
    errors = find_error_kinds(truth, read, matches, find_overlaps(truth, read, matches.truths))
    return find_worst_images(truth, read, matches, errors, num_images)


TRUTHS = [(image, CUP, [0, 0, 40, 40]) for image in (1, 2, 3, 4)] + [(3, SPOON, [100, 0, 40, 40])]
DETECTIONS = [
    (1, CUP, [0, 0, 40, 40], 0.9),  # image 1: no error
    (2, PLATE, [0, 0, 40, 40], 0.8),  # image 2: a wrong name, and a cup that is not found
    (3, CUP, [0, 0, 40, 40], 0.7),  # image 3: one of two found
    (4, CUP, [0, 0, 40, 40], 0.6),
    (4, CUP, [200, 100, 40, 40], 0.1),  # below the threshold
]


def test_order_and_kinds(tmp_path):
    images, threshold = worst(tmp_path, TRUTHS, DETECTIONS)
    assert threshold == 0.6  # three of four are right, and of the five objects three are found
    assert [(x.image_id, x.num_missed, x.num_wrong) for x in images] == [(2, 1, 1), (3, 1, 0)]
    second, third = images
    assert [(x.name, x.kind, x.text) for x in second.objects] == [("cup", "missed", "not found")]
    assert [(x.name, x.kind, x.score, x.text) for x in second.detections] == [("plate", "wrong", 0.8, "is: cup")]
    assert [(x.name, x.kind) for x in third.objects] == [("cup", "right"), ("spoon", "missed")]
    assert [(x.name, x.kind, x.text) for x in third.detections] == [("cup", "right", "")]
    assert second.file_name == "2.png" and second.size == (200, 400)


def test_only_as_many_as_asked_for(tmp_path):
    images, _ = worst(tmp_path, TRUTHS, DETECTIONS, 1)
    assert [x.image_id for x in images] == [2]
    assert worst(tmp_path, TRUTHS, DETECTIONS, 0)[0] == []


def test_regions_of_an_image_are_bounded(tmp_path):
    detections = [(1, CUP, [k, 0, 40, 40], 0.5) for k in range(90)]
    [image], _ = worst(tmp_path, [(1, CUP, [0, 0, 40, 40])], detections)
    assert len(image.detections) == 60 and image.num_hidden == 30
    panel = make_panel(image, str(tmp_path))
    assert sum(box.is_labeled for box in panel.detections) == 25 and "no such file" in panel.problem


def test_best_threshold_by_hand():
    scores, is_right = np.array([0.9, 0.8, 0.7, 0.7, 0.1]), np.array([True, False, True, True, False])
    assert best_threshold(scores, is_right, 3) == 0.7  # F1: 2/4, 2/5, both of 0.7 together 6/7, 6/8
    assert best_threshold(scores[:2], is_right[:2], 3) == 0.9
    assert best_threshold(scores, np.zeros(5, bool), 3) == 0.1  # nothing is right: all are shown
    assert best_threshold(np.zeros(0), np.zeros(0, bool), 3) == 0.0


def test_labels_do_not_cover_each_other(tmp_path):
    """Three names of one box: above, below and inside; all within the image."""
    detections = [(1, name, [100, 60, 80, 80], 0.9 - name / 10) for name in (CUP, SPOON, PLATE)]
    [image], _ = worst(tmp_path, [(1, CUP, [300, 0, 40, 40])], detections)
    panel = make_panel(image, str(tmp_path))
    baselines = sorted(box.label_y for box in panel.detections)
    assert len(baselines) == 3 and min(np.diff(baselines)) >= panel.font_size
    assert all(0 <= box.label_y <= 200 and box.label_x >= 0 for box in panel.detections)


def test_image_by_the_end_of_its_name(tmp_path):
    (tmp_path / "patch8").mkdir()
    (tmp_path / "patch8" / "a.jpg").touch()
    assert find_image("images/v2/patch8/a.jpg", str(tmp_path)) == tmp_path / "patch8" / "a.jpg"
    with pytest.raises(FileNotFoundError, match="no such file; --images DIR"):
        find_image("images/v2/patch8/b.jpg", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no file name"):
        find_image("", str(tmp_path))
