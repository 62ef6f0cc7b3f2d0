"""Random errors of the boxes that training learns from."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T

from regionspot.data import RegionSpotDatasetMapper, build_train_loader
from regionspot.data.box_jitter import jitter_boxes, jittered_copies
from regionspot.engine import RegionSpotTrainer

from ..helpers import tiny_config, write_dataset

NAME = "test_jitter"
SIZE = (48, 64)  # of the drawn scenes


@pytest.fixture
def dataset(tmp_path, register):
    return register(NAME, write_dataset(tmp_path / "data", 4), tmp_path / "data" / "images")


def moved_plainly(box, errors, strength, size):
    """Return a box moved by four standard normal errors, in plain Python."""
    height, width = size
    x0, y0, x1, y1 = box
    sides = (x1 - x0, y1 - y0, x1 - x0, y1 - y0)
    moved = [side + strength * error * length for side, error, length in zip(box, errors, sides)]
    moved = [min(max(value, 0), limit) for value, limit in zip(moved, (width, height, width, height))]
    return moved if moved[2] - moved[0] > 1 and moved[3] - moved[1] > 1 else list(box)


def test_sides_move_as_computed_plainly():
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 40, (300, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(0.5, 8, corners.shape)], axis=1)
    actual = jitter_boxes(boxes, SIZE, 0.3, np.random.default_rng(1))
    errors = np.random.default_rng(1).normal(0, 1, (300, 4))
    expected = [moved_plainly(*pair, 0.3, SIZE) for pair in zip(boxes.tolist(), errors)]
    np.testing.assert_allclose(actual, expected, atol=1e-9)
    is_same = (actual == boxes).all(axis=1)
    assert 0 < is_same.sum() < 150  # some had become too thin
    assert (actual[:, 2:] - actual[:, :2] > 1).all(axis=1)[~is_same].all()


def test_errors_are_shares_of_width_and_height():
    boxes = np.tile([[300.0, 400.0, 500.0, 440.0]], (20000, 1))
    moved = jitter_boxes(boxes, (1000, 1000), 0.1, np.random.default_rng(0))
    errors = (moved - boxes) / [200, 40, 200, 40]
    np.testing.assert_allclose(errors.std(axis=0), 0.1, rtol=0.03)
    np.testing.assert_allclose(errors.mean(axis=0), 0, atol=0.003)
    np.testing.assert_allclose(np.corrcoef(errors.T), np.eye(4), atol=0.03)


def test_boxes_stay_in_the_image_and_keep_their_area():
    boxes = np.array([[-9, 3, 20, 30], [50, 40, 90, 99], [5, 5, 5.5, 30], [7, 7, 7, 9], [70, 50, 90, 60]], np.float32)
    clipped = np.array([[0, 3, 20, 30], [50, 40, 64, 48], [5, 5, 5.5, 30], [7, 7, 7, 9], [64, 48, 64, 48]], np.float32)
    for seed in range(50):
        moved = jitter_boxes(boxes, SIZE, 0.4, np.random.default_rng(seed))
        assert moved.dtype == np.float32 and (moved >= 0).all() and (moved <= [64, 48, 64, 48]).all()
        is_moved = (moved != clipped).any(axis=1)
        assert (moved[is_moved, 2:] - moved[is_moved, :2] > 1).all() and not is_moved[3:].any()


def test_copies_depend_on_image_and_number_alone():
    boxes = np.array([[10, 10, 30, 30], [5, 20, 25, 44]], np.float32)
    copies = jittered_copies(boxes, SIZE, 0.1, 3, 5)
    assert copies.shape == (2, 3, 4) and copies.dtype == np.float32
    np.testing.assert_array_equal(jittered_copies(boxes, SIZE, 0.1, 2, 5), copies[:, :2])
    np.testing.assert_array_equal(jittered_copies(boxes[:1], SIZE, 0.1, 3, 5), copies[:1])
    others = [copies[:, 0], copies[:, 1], copies[:, 2], jittered_copies(boxes, SIZE, 0.1, 1, 6)[:, 0], boxes]
    for index, one in enumerate(others):
        assert all((one != other).any(axis=1).all() for other in others[index + 1 :])
    assert jittered_copies(boxes, SIZE, 0.1, 1, -5).shape == (2, 1, 4)  # ids may be negative
    assert jittered_copies(boxes[:0], SIZE, 0.1, 2, 5).shape == (0, 2, 4)


@pytest.mark.parametrize("strength", [-0.1, float("nan"), 0.5, float("inf")])
def test_impossible_strength_is_refused(dataset, strength):
    cfg = tiny_config("DATASETS.TRAIN", (NAME,), "INPUT.BOX_JITTER", strength)
    with pytest.raises(ValueError, match=rf"INPUT.BOX_JITTER: expected .*less than 0.5, got {strength}"):
        build_train_loader(cfg)


def read(cfg, records, seed, is_train=True):
    np.random.seed(seed)
    mapper = RegionSpotDatasetMapper(cfg, is_train)
    return [mapper(record) for record in records]


def test_training_boxes_are_jittered_again_at_each_step(dataset):
    cfg, records = tiny_config("INPUT.BOX_JITTER", 0.1), list(DatasetCatalog.get(NAME))
    plain = read(tiny_config(), records, 0)
    for one, again, other, test in zip(
        read(cfg, records, 1), read(cfg, records, 1), read(cfg, records, 2), read(cfg, records, 1, is_train=False)
    ):
        annotated = plain.pop(0)
        boxes, sides = (x["instances"].gt_boxes.tensor for x in (one, annotated))
        distances = (boxes - sides).abs() / (sides[:, 2:] - sides[:, :2]).repeat(1, 2)
        assert distances.max() < 0.5 and (distances > 0).any(dim=1).all()
        assert torch.equal(one["instances"].gt_classes, annotated["instances"].gt_classes)
        assert torch.equal(one["image"], annotated["image"])
        assert torch.equal(again["instances"].gt_boxes.tensor, boxes)
        assert not torch.equal(other["instances"].gt_boxes.tensor, boxes)
        assert torch.equal(test["instances"].gt_boxes.tensor, sides)


class Mirror(T.Augmentation):
    """The horizontal flip, without a random number."""

    def get_transform(self, image):
        return T.HFlipTransform(image.shape[1])


def test_jittered_boxes_are_augmented_with_their_image(dataset):
    options = {"image_format": "RGB", "box_jitter": 0.2}
    mapped = []
    for augmentations in ([], [Mirror()]):
        np.random.seed(3)
        mapper = RegionSpotDatasetMapper(augmentations=augmentations, **options)
        mapped.append(mapper(DatasetCatalog.get(NAME)[0]))
    plain, mirrored = (inputs["instances"].gt_boxes.tensor for inputs in mapped)
    torch.testing.assert_close(mirrored[:, [2, 0]], 64 - plain[:, [0, 2]])
    torch.testing.assert_close(mirrored[:, 1::2], plain[:, 1::2])


def test_number_of_workers_does_not_change_jitter(dataset):
    overrides = ("DATASETS.TRAIN", (NAME,), "SOLVER.IMS_PER_BATCH", 4, "INPUT.BOX_JITTER", 0.1)
    streams = []
    for workers in (0, 2):
        batches = iter(build_train_loader(tiny_config(*overrides, "DATALOADER.NUM_WORKERS", workers), seed=3))
        streams.append([inputs for _ in range(3) for inputs in next(batches)])
    boxes = {}
    for one, two in zip(*streams):
        assert torch.equal(one["instances"].gt_boxes.tensor, two["instances"].gt_boxes.tensor)
        boxes.setdefault(one["image_id"], []).append(one["instances"].gt_boxes.tensor)
    for one, two, three in boxes.values():  # of three epochs
        assert not torch.equal(one, two) and not torch.equal(two, three) and not torch.equal(one, three)


def test_training_step_with_jitter(dataset, tmp_path):
    overrides = ("DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (), "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 1)
    losses = []
    for strength in (0.0, 0.2):
        output = tmp_path / str(strength)
        output.mkdir()
        cfg = tiny_config(*overrides, "OUTPUT_DIR", str(output), "INPUT.BOX_JITTER", strength, "SOLVER.STEPS", ())
        torch.manual_seed(0)
        trainer = RegionSpotTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        losses.append(trainer.storage.history("total_loss").latest())
    assert np.isfinite(losses).all() and losses[0] != losses[1]


def test_copies_of_numpy_ids_are_those_of_the_number():
    boxes = np.array([[4.0, 5, 30, 40]], np.float32)
    expected = jittered_copies(boxes, (48, 64), 0.1, 2, 5)
    for kind in (np.int32, np.int64):
        assert np.array_equal(jittered_copies(boxes, (48, 64), 0.1, 2, kind(5)), expected)
