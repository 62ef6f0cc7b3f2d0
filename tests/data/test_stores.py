"""Stored features and proposal files, and training and evaluation with them."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from regionspot.checkpoint import RegionSpotCheckpointer
from regionspot.data import RegionSpotDatasetMapper, build_test_loader, build_train_loader, register_json_dataset
from regionspot.data.proposals import ProposalFile
from regionspot.data.token_store import TokenStore
from regionspot.engine.extract import extract_features, token_origin

from ..helpers import tiny_config, tiny_model, write_dataset

NAME = "test_stores"


@pytest.fixture
def dataset(tmp_path):
    register_json_dataset(NAME, write_dataset(tmp_path / "data", 6), tmp_path / "data" / "images")
    yield NAME
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def config(*overrides):
    return tiny_config("DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,), "SOLVER.IMS_PER_BATCH", 6, *overrides)


@pytest.mark.parametrize("features", ["feature_map+class_token", "none"])
def test_training_with_stored_features_equals_training_without(dataset, tmp_path, features, monkeypatch):
    cfg = config("MODEL.REGIONSPOT.CLIP.FEATURES", features)
    model = tiny_model("MODEL.REGIONSPOT.CLIP.FEATURES", features)
    extract_features(cfg, model.recognizer, dataset, tmp_path / "store.safetensors")
    store = TokenStore(tmp_path / "store.safetensors", token_origin(model.recognizer, dataset))
    online, cached = (RegionSpotDatasetMapper(cfg, True, token_store=s) for s in (None, store))
    records = DatasetCatalog.get(dataset)
    model.recognizer.knowledge_integration.eval()
    model.training = True
    expected = model([online(record) for record in records])["loss_cls"]
    batch = [cached(record) for record in records]
    for part in (model.recognizer.localizer, model.recognizer.vision_language):
        monkeypatch.setattr(part, "encode_images", lambda *_: pytest.fail("a frozen part was run"))
    assert ("image" in batch[0]) == (features == "none")
    torch.testing.assert_close(model(batch)["loss_cls"], expected, atol=2e-3, rtol=2e-3)


def test_store_is_kept_and_one_of_other_parts_is_written_anew(dataset, tmp_path):
    path, model = tmp_path / "store.safetensors", tiny_model()
    extract_features(config(), model.recognizer, dataset, path)
    before = path.stat().st_mtime_ns
    extract_features(config(), model.recognizer, dataset, path)
    assert path.stat().st_mtime_ns == before
    other = tiny_model("MODEL.REGIONSPOT.TOKEN_STAGE", "mlp")
    with pytest.raises(ValueError, match="another token stage: expected mlp.*got transformer"):
        TokenStore(path, token_origin(other.recognizer, dataset))
    extract_features(config(), other.recognizer, dataset, path)
    assert TokenStore(path).tokens.shape[1] == 4


def test_store_refuses_other_images_boxes_and_augmentations(dataset, tmp_path):
    path = tmp_path / "store.safetensors"
    extract_features(config(), tiny_model().recognizer, dataset, path)
    store = TokenStore(path)
    [record, *_] = DatasetCatalog.get(dataset)
    with pytest.raises(KeyError, match="no image 99"):
        RegionSpotDatasetMapper(config(), True, token_store=store)({**record, "image_id": 99})
    with pytest.raises(ValueError, match="other boxes"):
        RegionSpotDatasetMapper(config(), True, token_store=store)({**record, "annotations": record["annotations"][1:]})
    with pytest.raises(ValueError, match="no augmentation"):
        build_train_loader(config("DATASETS.TOKEN_STORES_TRAIN", (str(path),), "INPUT.RANDOM_FLIP", "horizontal"))
    with pytest.raises(ValueError, match="unscaled"):
        build_train_loader(config("DATASETS.TOKEN_STORES_TRAIN", (str(path),), "INPUT.MIN_SIZE_TRAIN", (64,)))
    with pytest.raises(FileNotFoundError, match="extract the tokens"):
        build_train_loader(config("DATASETS.TOKEN_STORES_TRAIN", ("no.safetensors",)))
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged"):
        TokenStore(path)


def test_proposal_file_takes_the_place_of_the_annotated_boxes(dataset, tmp_path):
    boxes = [[5, 6, 30, 40], [50, 0, 200, 20], [3, 3, 3, 9]]
    (tmp_path / "p.json").write_text(json.dumps({"1": {"boxes": boxes, "scores": [0.9, 0.5, 0.4]}}))
    cfg = config("DATASETS.PROPOSAL_FILES_TEST", (str(tmp_path / "p.json"),), "INPUT.MIN_SIZE_TEST", 96)
    batches = list(build_test_loader(cfg, dataset))
    proposals = batches[0][0]["proposals"]
    assert proposals.proposal_boxes.tensor.tolist() == [[10, 12, 60, 80], [100, 0, 128, 40]]  # cut, scaled, none empty
    assert proposals.scores.tolist() == pytest.approx([0.9, 0.5]) and proposals.image_size == (96, 128)
    assert [len(batch[0]["proposals"]) for batch in batches] == [2, 0, 0, 0, 0, 0]
    model = tiny_model("TEST.DETECTIONS_PER_IMAGE", 300)
    outputs = [model(batch)[0]["instances"] for batch in batches]
    assert [len(output) for output in outputs] == [8, 0, 0, 0, 0, 0]
    assert outputs[0].scores.sum().item() == pytest.approx(1.4, abs=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "got list"),
        ('{"1": {}}', "image 1 has no readable boxes"),
        ('{"1": {"boxes": [[1, 2, 3]]}}', "image 1 has no readable boxes"),
        ('{"1": {"boxes": [[1, 2, 3, NaN]]}}', "finite boxes"),
        ('{"1": {"boxes": [[1, 2, 3, 4]], "scores": [7]}}', r"scores in \[0, 1\]"),
        ('{"1": {"boxes": [[1, 2, 3, 4]], "scores": []}}', "as many scores"),
    ],
)
def test_wrong_proposal_files_are_refused(tmp_path, content, message):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        ProposalFile(tmp_path / "p.json")
    with pytest.raises(FileNotFoundError):
        ProposalFile(tmp_path / "no.json")


def test_packed_token_rows_are_unpacked(tmp_path):
    from safetensors.torch import save_file

    from miniworld.weights import pack_weights

    model = tiny_model(names=None)
    clip_model, sam = model.recognizer.vision_language.clip_model, model.recognizer.localizer.sam
    for name, part in (("clip", clip_model), ("sam", sam)):
        save_file(pack_weights(part.state_dict()), tmp_path / f"{name}.safetensors")
    other = tiny_model(names=None)
    sources = {f"{name}_weights": str(tmp_path / f"{name}.safetensors") for name in ("sam", "clip")}
    RegionSpotCheckpointer(other, **sources).load("")
    for names in (["striped red star"], ["plain blue ring"]):
        expected = model.recognizer.classifier.text_encoder.encode(names)
        torch.testing.assert_close(other.recognizer.classifier.text_encoder.encode(names), expected, atol=5e-3, rtol=0)
