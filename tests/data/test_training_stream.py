"""The order of training images, their random numbers, and batches of several data sets."""

import collections
import itertools
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import Subset

from regionspot.data import RegionSpotDatasetMapper, build_train_loader
from regionspot.data.build import training_stream
from regionspot.data.proposals import ProposalFile
from regionspot.data.samplers import TrainingStream, balance, build_training_stream
from regionspot.data.tokens import StoreWriter, TokenStore, pack_images

from ..helpers import draw_scene, tiny_config, tiny_model, write_dataset

NAMES = ("test_small", "test_large")


@pytest.fixture
def datasets(tmp_path, register):
    """Two data sets, of 3 and of 9 images, with names of their own."""
    for name, num_images, ids, names in (
        (NAMES[0], 3, (3, 1, 10, 7), ["a", "b", "c", "d"]),
        (NAMES[1], 9, (0, 1, 2, 3), ["e", "f", "g", "h"]),
    ):
        path = write_dataset(tmp_path / name, num_images, ids, names)
        register(name, path, tmp_path / name / "images", "lvis")
    return NAMES


def take(stream, length):
    return list(itertools.islice(stream, length))


@pytest.mark.parametrize("factors", [None, torch.tensor([1.0, 2.5, 1.0, 0.5, 1.0])])
def test_stream_resumes_at_any_position(factors):
    whole = take(TrainingStream(5, 3, factors), 60)
    assert [position for position, _ in whole] == list(range(60))
    assert take(TrainingStream(5, 3, factors), 60) == whole != take(TrainingStream(5, 4, factors), 60)
    for start in (1, 7, 31):
        stream = TrainingStream(5, 3, factors)
        stream.start = start
        assert take(stream, 60 - start) == whole[start:]


def test_processes_share_the_stream(monkeypatch):
    whole = take(TrainingStream(5, 3), 40)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    halves = []
    for rank in (0, 1):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        halves.append(take(TrainingStream(5, 3), 20))
    assert sorted(halves[0] + halves[1]) == whole


@pytest.mark.parametrize(("ratio", "share"), [((), 3 / 12), ((1.0, 1.0), 1 / 2), ((3.0, 1.0), 3 / 4)])
def test_dataset_ratio(datasets, ratio, share):
    records = [DatasetCatalog.get(name) for name in datasets]
    stream = build_training_stream(tiny_config("DATASETS.TRAIN_RATIO", ratio), records, 0)
    actual = np.mean([index < 3 for _, index in take(stream, 6000)])
    assert actual == pytest.approx(share, abs=0.03)


def test_rare_classes_are_repeated():
    records = [{"annotations": [{"category_id": 1 if index == 0 else 0}]} for index in range(10)]
    cfg = tiny_config("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", "DATALOADER.REPEAT_THRESHOLD", 0.9)
    counts = collections.Counter(index for _, index in take(build_training_stream(cfg, [records], 0), 6000))
    assert counts[0] / counts[5] == pytest.approx(3, abs=0.4)  # sqrt(0.9 / 0.1)


@pytest.mark.parametrize("root", [True, False])
def test_repeat_factors_match_detectron2(datasets, root):
    cfg = tiny_config("DATALOADER.REPEAT_THRESHOLD", 0.9, "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
    cfg.DATALOADER.REPEAT_SQRT = root
    records = DatasetCatalog.get(datasets[1])
    for subset in (records, Subset(records, np.array([1, 4, 7, 8]))):
        expected = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(list(subset), 0.9, root)
        for dataset in (subset, [subset[i] for i in range(len(subset))]):
            stream = build_training_stream(cfg, [dataset], 0)
            torch.testing.assert_close(stream.repeat_factors, expected)
    stream, detectron2 = take(stream, 60), take(RepeatFactorTrainingSampler(expected, seed=0), 60)
    assert [index for _, index in stream] == detectron2


def test_repeat_factors_are_scaled_to_ratio():
    factors = balance([np.array([1.0, 2.0]), np.ones(6)], (1.0, 1.0))
    np.testing.assert_allclose(factors, [2, 4, 1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["DATASETS.TRAIN_RATIO", (1.0,)], "share for each of 2 data sets"),
        (["DATASETS.TRAIN_RATIO", (1.0, 0.0)], "positive share"),
        (["DATALOADER.SAMPLER_TRAIN", "Random"], "TrainingSampler or RepeatFactorTrainingSampler, got 'Random'"),
        (["DATASETS.TOKEN_STORES_TRAIN", ("one",)], "one store for each of 2 data sets"),
        (["DATALOADER.ASPECT_RATIO_GROUPING", True], "set it to False"),
        (["INPUT.REDUCED_JPEG", 32], "needs stored tokens"),
    ],
)
def test_contradictory_settings_are_refused(datasets, overrides, message):
    with pytest.raises(ValueError, match=message):
        build_train_loader(tiny_config("DATASETS.TRAIN", datasets, *overrides))


def test_sample_depends_on_its_position_alone(datasets):
    overrides = ["DATASETS.TRAIN", datasets, "SOLVER.IMS_PER_BATCH", 4, "INPUT.RANDOM_FLIP", "horizontal"]
    batches = take(build_train_loader(tiny_config(*overrides), seed=5), 12)
    for workers, start in ((0, 20), (2, 0), (2, 20)):
        loader = build_train_loader(tiny_config(*overrides, "DATALOADER.NUM_WORKERS", workers), seed=5)
        training_stream(loader).start = start
        for batch, expected in zip(take(loader, 7), batches[start // 4 :]):
            for inputs, other in zip(batch, expected):
                assert inputs["vocabulary"] == other["vocabulary"] and torch.equal(inputs["image"], other["image"])
    flips = {
        torch.equal(inputs["image"][..., 0], torch.from_numpy(draw_scene(inputs["image_id"] - 1)[0][:, 0]).T)
        for batch in batches
        for inputs in batch
    }
    assert flips == {True, False}


def test_mixed_vocabularies_in_one_batch(datasets):
    batch = next(iter(build_train_loader(tiny_config("DATASETS.TRAIN", datasets, "SOLVER.IMS_PER_BATCH", 12))))
    assert {inputs["vocabulary"] for inputs in batch} == set(datasets)
    model = tiny_model(names=None)
    model.set_vocabulary(["a", "b", "c", "d"], NAMES[0])
    model.set_vocabulary(["e", "f", "g", "h", "one more"], NAMES[1])
    model.recognizer.knowledge_integration.eval()
    model.training = True
    mixed = model(batch)["loss_cls"]
    alone = []
    for inputs in batch:
        model.recognizer.classifier.active = inputs.pop("vocabulary")
        alone.append(model([inputs])["loss_cls"])
    torch.testing.assert_close(mixed, torch.stack(alone).mean())
    batch[0]["vocabulary"] = "unknown"
    with pytest.raises(KeyError, match="'unknown' is not set: expected one of test_small, test_large"):
        model(batch)


def test_reduced_jpeg_with_stored_tokens(tmp_path, monkeypatch):
    Image.fromarray(draw_scene(0)[0]).save(tmp_path / "a.jpg")
    box, origin = [8.0, 4.0, 40.0, 36.0], {"stages": ["transformer"], "clip": None, "flip": False, "sam": {}}
    entry = {"image_id": 1, "boxes": torch.tensor([box]), "labels": torch.zeros(1)}
    writer = StoreWriter(tmp_path / "store", {**origin, "annotations": {}}, 1)
    writer.write(0, pack_images([{**entry, "tokens.transformer": torch.ones(1, 32)}]), 1)
    writer.finish()
    record = {"file_name": str(tmp_path / "a.jpg"), "image_id": 1, "height": 48, "width": 64}
    record["annotations"] = [{"bbox": box, "bbox_mode": 0, "category_id": 0}]
    cfg = tiny_config("INPUT.REDUCED_JPEG", 24)
    mapped = RegionSpotDatasetMapper(cfg, True, token_store=TokenStore(tmp_path / "store"))(record)
    assert mapped["image"].shape == (3, 24, 32) and mapped["instances"].image_size == (24, 32)
    assert mapped["instances"].gt_boxes.tensor.tolist() == [[4, 2, 20, 18]] and mapped["tokens"].sum() == 32


def test_proposal_at_iou_threshold_matches(datasets, tmp_path):
    """The limit is MODEL.REGIONSPOT.PROPOSALS.IOU_THRESH_TRAIN, and an IoU of just that is a match."""
    record = {**DatasetCatalog.get(NAMES[0])[0]}
    record["annotations"] = [{"bbox": [10, 10, 20, 20], "bbox_mode": 0, "category_id": 2, "iscrowd": 0}]
    boxes = [[10, 10, 20, 15], [10, 10, 20, 14.9], [10, 10, 20, 12.5]]  # IoU 0.5, 0.49, 0.25
    (tmp_path / "p.json").write_text(json.dumps({"1": {"boxes": boxes}}))
    for threshold, num_matches in ((0.5, 1), (0.25, 3), (0.51, 0)):
        cfg = tiny_config("MODEL.REGIONSPOT.PROPOSALS.IOU_THRESH_TRAIN", threshold)
        mapper = RegionSpotDatasetMapper(cfg, True, proposal_file=ProposalFile(tmp_path / "p.json"))
        regions = mapper(record)["instances"]
        assert len(regions) == 1 + num_matches and regions.gt_classes.tolist() == [2] * (1 + num_matches)
        torch.testing.assert_close(
            regions.gt_boxes.tensor[1:], torch.tensor(boxes[:num_matches], dtype=torch.float32).reshape(-1, 4)
        )


def test_matching_proposals_are_learned_from(datasets, tmp_path):
    record = DatasetCatalog.get(NAMES[0])[0]
    image, boxes, _ = draw_scene(0)
    near, far = boxes[1] + 1, [0, 0, 3, 3]
    (tmp_path / "p.json").write_text(json.dumps({"1": {"boxes": [near.tolist(), far]}}))
    files = ("DATASETS.TRAIN", (NAMES[0],), "DATASETS.PROPOSAL_FILES_TRAIN", (str(tmp_path / "p.json"),))
    batch = next(iter(build_train_loader(tiny_config(*files, "SOLVER.IMS_PER_BATCH", 3))))
    [mapped] = [inputs for inputs in batch if inputs["image_id"] == 1]
    plain = RegionSpotDatasetMapper(tiny_config(), True)(record)["instances"]
    expected = torch.cat([plain.gt_boxes.tensor, torch.from_numpy(near)[None]])
    assert torch.equal(mapped["instances"].gt_boxes.tensor, expected) and "proposals" not in mapped
    assert mapped["instances"].gt_classes.tolist() == [*plain.gt_classes.tolist(), plain.gt_classes[1].item()]
    with pytest.raises(ValueError, match="PROPOSAL_FILES_TRAIN: expected one file for each of 2 data sets"):
        build_train_loader(tiny_config(*files, "DATASETS.TRAIN", datasets))
