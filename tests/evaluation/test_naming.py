"""First names of objects: confusion and calibration, by hand."""

import numpy as np
import pytest

from regionspot.data.coco_io import read_results
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.naming import Calibration, name_objects
from regionspot.evaluation.overlaps import find_overlaps
from regionspot.evaluation.report import evaluate_task

from .test_error_kinds import CUP, PLATE, SPOON, write_set


def name(directory, truths, detections):
    annotations, results = write_set(directory, truths, detections)
    truth, read = GroundTruth(annotations), read_results(results)
    matches = evaluate_task(truth, read, "bbox", "coco", keep_matches=True).matches
    return name_objects(truth, read, matches.truths, find_overlaps(truth, read, matches.truths))


def test_first_name_is_the_best_detection_on_it(tmp_path):
    truths = [(1, CUP, [0, 0, 40, 40]), (1, SPOON, [100, 0, 40, 40]), (2, PLATE, [0, 0, 40, 40])]
    truths += [(3, PLATE, [0, 0, 40, 40]), (3, CUP, [100, 0, 40, 40])]
    detections = [
        (1, CUP, [0, 0, 40, 40], 0.3),
        (1, SPOON, [0, 0, 40, 40], 0.5),  # better: the cup's first name
        (1, SPOON, [100, 0, 40, 40], 0.9),
        (2, CUP, [0, 0, 40, 19], 0.9),  # IoU below 0.5: not on the plate
        (3, CUP, [0, 0, 40, 40], 0.6),
        (3, SPOON, [100, 0, 40, 38], 0.7),
    ]
    naming = name(tmp_path, truths, detections)
    names = dict(zip(zip(naming.targets.tolist(), naming.scores.tolist()), naming.names.tolist()))
    # categories are numbered from 0 in the order of their ids
    assert names == {(0, 0.5): 1, (0, 0.7): 1, (1, 0.9): 1, (2, 0.0): -1, (2, 0.6): 0}
    assert naming.is_located.sum() == 4 and naming.is_right.sum() == 1
    assert naming.confusions() == [(0, 1, 2), (2, 0, 1)]


def test_object_of_the_name_wins_where_boxes_are_equal(tmp_path):
    """A box with two annotations: a detection is on the one of its own name."""
    truths = [(1, CUP, [0, 0, 40, 40]), (1, SPOON, [0, 0, 40, 40])]
    naming = name(tmp_path, truths, [(1, CUP, [0, 0, 40, 40], 0.9), (1, SPOON, [0, 0, 40, 40], 0.5)])
    assert naming.is_right.all() and sorted(naming.scores.tolist()) == [0.5, 0.9]


def test_calibration_by_hand():
    scores = np.array([0.05, 0.95, 0.95, 1.0, 0.55, 0.55])
    is_right = np.array([False, True, True, False, True, False])
    calibration = Calibration.measure(scores, is_right)
    assert calibration.counts.tolist() == [1, 0, 0, 0, 0, 2, 0, 0, 0, 3]
    assert calibration.accuracy[[0, 5, 9]] == pytest.approx([0, 0.5, 2 / 3])
    assert np.isnan(calibration.accuracy[1])
    gaps = [0.05, 0.05, (0.95 + 0.95 + 1.0) / 3 - 2 / 3]
    assert calibration.error == pytest.approx((gaps[0] + 2 * gaps[1] + 3 * gaps[2]) / 6)


def test_perfect_calibration_has_no_error():
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=200_000)
    assert Calibration.measure(scores, rng.uniform(size=len(scores)) < scores).error < 0.01


@pytest.mark.parametrize("scores", [[], [0.5, 1.5], [-3.0, 0.2]])
def test_other_scores_have_no_calibration(scores):
    assert Calibration.measure(np.array(scores), np.zeros(len(scores), bool)) is None
