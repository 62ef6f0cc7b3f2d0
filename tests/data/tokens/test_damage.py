"""Token stores that are damaged, incomplete, or older than their images."""

import json
import os
import shutil

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image
from safetensors.torch import load_file, save_file

from regionspot.data import build_train_loader
from regionspot.data.dataset_mapper import annotated_regions
from regionspot.data.tokens import TokenStore
from regionspot.engine.extract import Extraction, extract_tokens
from regionspot.utils.files import sha256_of_file, short_directory_name

from ...helpers import tiny_model, write_dataset
from .test_store import config, content, dataset, extract  # noqa: F401


def test_store_directory_names():
    names = {"a/my.json:~/b/my_photos/": "my-my_photos", "/x y/all.coco.json:train": "all.coco-train"}
    for name, expected in {**names, "lvis_v1_train": "lvis_v1_train", "a.json:../..": "a-.."}.items():
        assert short_directory_name(name) == expected


@pytest.fixture
def store(dataset, tmp_path):  # noqa: F811
    extract(tmp_path / "store")
    return tmp_path / "store"


def change_entry(store, shard, **values):
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["shards"][shard].update(values)
    (store / "manifest.json").write_text(json.dumps(manifest))


def boxes_of(dataset, image_id):  # noqa: F811
    return annotated_regions(DatasetCatalog.get(dataset)[image_id - 1]).gt_boxes.tensor.float()


def test_truncated_shard_is_refused(store, dataset):  # noqa: F811
    opened, path = TokenStore(store), store / "shard-00001.safetensors"
    opened.get(3, boxes_of(dataset, 3))
    os.truncate(path, path.stat().st_size - 4096 if path.stat().st_size > 8192 else 100)
    for read in (lambda: opened.get(3, boxes_of(dataset, 3)), lambda: TokenStore(store)):
        with pytest.raises(ValueError, match=r"shard-00001.safetensors is damaged: expected \d+ bytes, got"):
            read()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="shard-00001.safetensors is missing"):
        opened.get(3, boxes_of(dataset, 3))
    opened.get(1, boxes_of(dataset, 1))


@pytest.mark.parametrize("key", ["boxes", "labels", "offsets", "tokens.transformer", "image_files"])
def test_tensor_of_wrong_length_names_shard(store, key):
    path = store / "shard-00000.safetensors"
    tensors = load_file(path)
    save_file({**tensors, key: tensors[key][:-1].clone()}, path)
    change_entry(store, 0, bytes=path.stat().st_size, sha256=sha256_of_file(path))
    with pytest.raises(ValueError, match=f"shard-00000.safetensors is damaged: {key} has shape"):
        TokenStore(store)
    wrong = tensors["offsets"].clone()
    wrong[1] = wrong[-1] + 1
    save_file({**tensors, "offsets": wrong}, path)
    change_entry(store, 0, bytes=path.stat().st_size, sha256=sha256_of_file(path))
    with pytest.raises(ValueError, match="shard-00000.safetensors is damaged: its offsets"):
        TokenStore(store)


def test_checksums_are_compared_once(store, monkeypatch):
    cfg, hashed = config("DATASETS.TOKEN_STORES_TRAIN", (str(store),)), []

    def count(path):
        hashed.append(path.name)
        return sha256_of_file(path)

    monkeypatch.setattr("regionspot.data.tokens.store.sha256_of_file", count)
    build_train_loader(cfg)
    build_train_loader(cfg)
    assert hashed == [f"shard-{shard:05d}.safetensors" for shard in range(3)]
    path = store / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="shard-00001.safetensors is damaged: expected SHA-256"):
        build_train_loader(cfg)
    assert hashed[3:] == ["shard-00001.safetensors"]


def test_other_boxes_are_refused(store, dataset):  # noqa: F811
    boxes = boxes_of(dataset, 2)
    for other in (boxes + 0.5, boxes.flip(0), boxes[:-1]):
        with pytest.raises(ValueError, match="image 2 has other boxes"):
            TokenStore(store).get(2, other)


def test_truncated_shard_is_written_again(store, tmp_path, dataset):  # noqa: F811
    whole = content(store)
    manifest = json.loads(whole["manifest.json"])
    unfinished = tmp_path / "unfinished"
    shutil.copytree(store, unfinished)
    (unfinished / "manifest.json").unlink()
    origin = {key: value for key, value in manifest.items() if key not in ("shards", "images", "boxes")}
    (unfinished / "origin.json").write_text(json.dumps(origin))
    for shard, entry in enumerate(manifest["shards"]):
        (unfinished / f"shard-{shard:05d}.json").write_text(json.dumps(entry))
    os.truncate(unfinished / "shard-00001.safetensors", 200)
    with pytest.raises(ValueError, match="not finished"):
        TokenStore(unfinished)
    extract(unfinished)
    assert content(unfinished) == whole


def test_second_run_adds_left_out_images(dataset, tmp_path):  # noqa: F811
    image = tmp_path / "data" / "images" / "2.png"
    whole = image.read_bytes()
    stamp = image.stat().st_mtime_ns
    extract(tmp_path / "whole")
    image.write_bytes(b"damaged")
    extract(tmp_path / "store", skip_damaged=True)
    before = content(tmp_path / "store")
    assert json.loads(before["manifest.json"])["shards"][1]["left_out"] == [3]
    extract(tmp_path / "store", skip_damaged=True)  # nothing has changed
    assert content(tmp_path / "store") == before
    with pytest.raises(ValueError, match="1 of 3 shards"):
        extract(tmp_path / "store")
    image.write_bytes(whole)
    os.utime(image, ns=(stamp, stamp))
    extract(tmp_path / "store", skip_damaged=True)
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_second_run_detects_edited_images(store, dataset, tmp_path):  # noqa: F811
    before, image = content(store), tmp_path / "data" / "images" / "4.png"
    image.touch()  # the same bytes at another time
    extract(store)
    assert content(store) == before
    pixels = np.asarray(Image.open(image)).copy()
    pixels[:20] = 0
    Image.fromarray(pixels).save(image)
    extract(store)
    after = content(store)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"shard-00002.safetensors", "manifest.json"}


@pytest.mark.parametrize("feature_maps", [False, True])
def test_training_refuses_edited_images(dataset, tmp_path, feature_maps):  # noqa: F811
    extract(tmp_path / "store", feature_maps=feature_maps)
    cfg, directory = config("DATASETS.TOKEN_STORES_TRAIN", (str(tmp_path / "store"),)), tmp_path / "data" / "images"
    (directory / "4.png").touch()  # the same bytes at another time
    build_train_loader(cfg)
    for edit in (lambda data: data + b"0", lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]):
        whole = (directory / "2.png").read_bytes()
        (directory / "2.png").write_bytes(edit(whole))
        message = r"of 6 images that were checked 1 have changed .*2\.png; run tools/extract_tokens.py again"
        with pytest.raises(ValueError, match=message):
            build_train_loader(cfg)
        (directory / "2.png").write_bytes(whole)
    if feature_maps:  # then training reads no images, which need not be there
        (directory / "2.png").unlink()
    build_train_loader(cfg)


def test_edited_images_of_large_datasets_are_sampled(store, dataset, tmp_path, monkeypatch):  # noqa: F811
    for image in (tmp_path / "data" / "images").iterdir():
        image.write_bytes(image.read_bytes()[:-1] + b"0")
    monkeypatch.setattr("regionspot.data.image_check._COMPARED", 4)
    monkeypatch.setattr("regionspot.data.image_check._READ", 2)
    with pytest.raises(ValueError, match="of 4 images that were checked 2 have changed"):
        build_train_loader(config("DATASETS.TOKEN_STORES_TRAIN", (str(store),), "DATALOADER.SKIP_UNREADABLE", True))


def test_edited_annotations_one_error_message(store, dataset, tmp_path):  # noqa: F811
    path = tmp_path / "data" / "annotations.json"
    path.write_text(path.read_text() + " ")
    messages = set()
    for use in (
        extract,
        lambda directory: build_train_loader(config("DATASETS.TOKEN_STORES_TRAIN", (str(directory),))),
    ):
        with pytest.raises(ValueError, match="of another annotations: .*; delete it and run .*extract_tokens") as error:
            use(store)
        messages.add(str(error.value))
    assert len(messages) == 1


def test_store_of_another_dataset_is_refused(store, tmp_path, register):
    other = write_dataset(tmp_path / "other" / "data", 6, first=20)
    register("test_stores_2", other, other.parent / "images")
    before = content(store)
    with pytest.raises(ValueError, match="of another dataset: expected test_stores_2, got test_stores"):
        extract_tokens(tiny_model().recognizer, "test_stores_2", store, Extraction(shard_images=2), False)
    assert content(store) == before


def test_store_files_respect_umask(dataset, tmp_path):  # noqa: F811
    before = os.umask(0o027)
    try:
        extract(tmp_path / "store")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "store").iterdir()} == {0o640}
