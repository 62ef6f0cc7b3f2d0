"""The thresholds of fixed AP's limit, which rise while detections come."""

import numpy as np
import pytest

from regionspot.evaluation.class_cap import ClassCap


def draw(seed, images=60, classes=5, levels=4, rising=False):
    """Return (image id, classes, scores) of each image, in no order; scores of few levels, some classes rare."""
    rng = np.random.default_rng(seed)
    for index, image_id in enumerate(rng.permutation(1000)[:images].tolist()):
        count = int(rng.integers(0, 40))
        scores = rng.integers(0, levels, count) / levels + (index if rising else 0)
        yield image_id, np.minimum(rng.geometric(0.4, count) - 1, classes - 1), scores.astype(np.float32)


def best(images, limit):
    """Return the best of each class as (class, score, image id, place), in the simplest code: by score, then image."""
    rows = [(c, -s, i, k) for i, classes, scores in images for k, (c, s) in enumerate(zip(classes, scores))]
    rows.sort()
    return [row for n, row in enumerate(rows) if n < limit or rows[n - limit][0] != row[0]]


@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize("levels", [1, 4, 10**6])
@pytest.mark.parametrize("limit", [1, 7, 10_000])
def test_rejected_detections_are_never_needed(monkeypatch, levels, limit, rising):
    monkeypatch.setattr("regionspot.evaluation.class_cap._PENDING", 50)
    cap, written, whole = ClassCap(5, limit), [], []
    for image in draw(levels, levels=levels, rising=rising):
        keep = cap.admits(*image)
        admitted = (image[0], image[1][keep], image[2][keep])
        cap.add(*admitted)
        written.append(admitted)
        whole.append(image)
    cap.rank()
    kept = [(i, c[keep], s[keep]) for i, c, s in written for keep in [cap.admits(i, c, s)]]
    drop_place = [row[:3] for row in best(whole, limit)]
    assert [row[:3] for row in best(kept, limit)] == drop_place
    ties_of_one_image = 40  # the maximum of these images
    assert sum(len(c) for _, c, _ in kept) <= len(drop_place) + 5 * ties_of_one_image
    assert cap.num_kept == len(drop_place)


def test_thresholds_rise(monkeypatch):
    monkeypatch.setattr("regionspot.evaluation.class_cap._PENDING", 50)
    cap, admitted = ClassCap(5, 3), 0
    for image in draw(0, levels=10**6, images=400):
        keep = cap.admits(*image)
        cap.add(image[0], image[1][keep], image[2][keep])
        admitted += keep.sum()
    assert admitted < 1000  # of 8000
