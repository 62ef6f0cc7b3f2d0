"""The authors' tokens, one file per image, become a store for training."""

import json
import logging

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from regionspot.data import RegionSpotDatasetMapper, build_train_loader
from regionspot.data.datasets import JsonDataset
from regionspot.data.tokens import TokenStore
from regionspot.data.tokens.convert import convert_tokens
from regionspot.engine.extract import Extraction, describe_store

from ...helpers import NAMES, tiny_config, tiny_model, write_dataset

NAME = "test_convert"


@pytest.fixture
def dataset(tmp_path, register):
    """Six scenes; the first image also has a crowd and a box without area."""
    path = write_dataset(tmp_path / "data", 6)
    content = json.loads(path.read_text())
    first = content["annotations"][0]
    content["annotations"].insert(1, {**first, "id": 100, "iscrowd": 1})
    content["annotations"].insert(0, {**first, "id": 101, "bbox": [5, 5, 0, 3]})
    path.write_text(json.dumps(content))
    register(NAME, path, tmp_path / "data" / "images", "lvis")
    (tmp_path / "tokens").mkdir()
    return content


def write_files(directory, content, keep=lambda annotation: True, shape=(1, 32)):
    """Write the authors' layout; the token of an annotation is full of its id."""
    for image in content["images"]:
        annotations = [a for a in content["annotations"] if a["image_id"] == image["id"] and keep(a)]
        tokens = torch.stack([torch.full(shape, float(a["id"])) for a in annotations])
        classes = torch.tensor([a["category_id"] for a in annotations])
        torch.save({"mask_tokens": tokens, "classes": classes}, directory / f"{image['id']}.pth")


def convert(tmp_path):
    extraction = Extraction(shard_images=4)
    origin = describe_store(tiny_model().recognizer, NAME, extraction)
    directories = tmp_path / "tokens", tmp_path / "store"
    return convert_tokens(directories[0], NAME, "transformer", 32, directories[1], origin)


@pytest.mark.parametrize("shape", [(1, 32), (32,)])
@pytest.mark.parametrize("keep", ["everything", "no crowds", "no crowds and areas only"])
def test_every_layout_is_imported(dataset, tmp_path, shape, keep):
    keeps = {
        "everything": lambda a: True,
        "no crowds": lambda a: not a["iscrowd"],
        "no crowds and areas only": lambda a: not a["iscrowd"] and a["bbox"][2] > 0,
    }
    write_files(tmp_path / "tokens", dataset, keeps[keep], shape)
    counts = convert(tmp_path)
    assert counts["imported"] == 6 and sum(counts.values()) == 6
    store = TokenStore(tmp_path / "store")
    mapper = RegionSpotDatasetMapper(tiny_config(), True, token_store=store)
    for record in DatasetCatalog.get(NAME):
        ids = [
            float(a["id"])
            for a in dataset["annotations"]
            if a["image_id"] == record["image_id"] and not a["iscrowd"] and a["bbox"][2] > 0
        ]
        tokens = mapper(record)["tokens"]
        assert tokens[:, 0].tolist() == ids and tokens.shape == (len(ids), 32)
    cfg = tiny_config("DATASETS.TRAIN", (NAME,), "DATASETS.TOKEN_STORES_TRAIN", (str(tmp_path / "store"),))
    assert len(build_train_loader(cfg).dataset) == 6


def test_files_that_do_not_fit_are_counted(dataset, tmp_path, caplog):
    tokens = tmp_path / "tokens"
    write_files(tokens, dataset)
    (tokens / "2.pth").unlink()
    (tokens / "3.pth").write_bytes(b"damaged")
    other = torch.load(tokens / "4.pth", weights_only=True)
    torch.save({**other, "classes": other["classes"] + 1}, tokens / "4.pth")
    torch.save({**other, "mask_tokens": other["mask_tokens"][..., :7]}, tokens / "5.pth")
    last = torch.load(tokens / "6.pth", weights_only=True)
    torch.save({**last, "mask_tokens": last["mask_tokens"].float() * 1e6}, tokens / "6.pth")  # more than float16 has
    with caplog.at_level(logging.WARNING):
        counts = convert(tmp_path)
    assert counts == {
        "imported": 1, "without regions": 0, "without a file": 1, "damaged": 3, "of other regions": 1
    }  # fmt: skip
    for name in ("3.pth", "4.pth", "5.pth", "6.pth"):
        assert name in caplog.text
    assert TokenStore(tmp_path / "store").image_ids.tolist() == [1]


def test_malicious_file_is_not_executed(dataset, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    write_files(tmp_path / "tokens", dataset)
    (tmp_path / "tokens" / "2.pth").write_bytes(pickle.dumps(Evil()))
    assert convert(tmp_path)["damaged"] == 1
    assert not (tmp_path / "executed").exists()


def test_directory_of_another_dataset_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="no file fits data set 'test_convert'"):
        convert(tmp_path)
    write_files(tmp_path / "tokens", dataset)
    assert convert(tmp_path)["imported"] == 6  # nothing of the failed import is in the way
    with pytest.raises(ValueError, match="finished store already"):
        convert(tmp_path)


def test_metadata_without_id_mapping(tmp_path):
    """As Detectron2's lvis_v1_*: label = id - 1."""
    path = write_dataset(tmp_path / "data", 6, (1, 2, 3, 4))
    content = json.loads(path.read_text())
    records = list(JsonDataset(path, tmp_path))
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(json_file=str(path), thing_classes=NAMES, evaluator_type="lvis")
    (tmp_path / "tokens").mkdir()
    write_files(tmp_path / "tokens", content)
    try:
        assert convert(tmp_path)["imported"] == 6
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)
