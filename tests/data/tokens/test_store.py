"""Token stores: what they hold, what they are refused for, and extraction that is interrupted."""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import time

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from PIL import Image
from safetensors.torch import load_file

from regionspot.data import RegionSpotDatasetMapper, build_train_loader
from regionspot.data.tokens import StoreWriter, TokenStore, find_damage, pack_images
from regionspot.data.training_set import describe_annotations
from regionspot.engine.extract import Extraction, check_image_ids, extract_tokens
from regionspot.modeling.identity import describe_sam
from regionspot.structures import Prompts

from ...helpers import tiny_config, tiny_model, write_dataset
from ...processes import call_in_two_processes

NAME = "test_stores"


@pytest.fixture
def dataset(tmp_path, register):
    return register(NAME, write_dataset(tmp_path / "data", 6), tmp_path / "data" / "images")


def config(*overrides):
    return tiny_config("DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,), "SOLVER.IMS_PER_BATCH", 6, *overrides)


def extract(directory, *overrides, **extraction):
    model = tiny_model(*overrides)
    model.recognizer.weight_sources.update(sam="sam.pth", clip_model="clip.pth")
    options = {"shard_images": 2, "batch_size": 2, **extraction}
    assert extract_tokens(model.recognizer, NAME, directory, Extraction(**options), show_progress=False)
    return model


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("features", "maps"), [("feature_map+class_token", True), ("feature_map+class_token", False), ("none", False)]
)
def test_cached_training_equals_online_training(dataset, tmp_path, features, maps, monkeypatch):
    overrides = ("MODEL.REGIONSPOT.CLIP.FEATURES", features)
    cfg, model = config(*overrides), extract(tmp_path / "store", *overrides, feature_maps=maps)
    online, cached = (RegionSpotDatasetMapper(cfg, True, token_store=s) for s in (None, TokenStore(tmp_path / "store")))
    records = DatasetCatalog.get(dataset)
    model.recognizer.knowledge_integration.eval()
    model.training = True
    expected = model([online(record) for record in records])["loss_cls"]
    batch = [cached(record) for record in records]
    monkeypatch.setattr(model.recognizer.localizer, "encode_images", lambda *_: pytest.fail("SAM was run"))
    if maps:
        monkeypatch.setattr(model.recognizer.vision_language, "encode_images", lambda *_: pytest.fail("CLIP was run"))
        assert "image" not in batch[0]
    torch.testing.assert_close(model(batch)["loss_cls"], expected, atol=2e-3, rtol=2e-3)


def test_store_holds_all_stages_and_flips(dataset, tmp_path):
    stages = ("prompt_encoder", "transformer", "mlp")
    model = extract(tmp_path / "store", stages=stages, flip=True)
    recognizer = model.recognizer
    plain = RegionSpotDatasetMapper(config(), False)
    mirrored = RegionSpotDatasetMapper(augmentations=[T.RandomFlip(prob=1.0)], image_format="RGB")
    for record in DatasetCatalog.get(dataset):
        boxes = plain(record)["instances"].gt_boxes.tensor
        for flipped, mapper in ((False, plain), (True, mirrored)):
            inputs = mapper(record)
            prompts = [Prompts(boxes=inputs["instances"].gt_boxes.tensor)]
            [located] = recognizer.locate(recognizer.encode_images([inputs["image"]]), prompts, stages=stages)
            for stage in stages:
                stored = TokenStore(tmp_path / "store", stage).get(record["image_id"], boxes, flipped)["tokens"]
                torch.testing.assert_close(stored, located.stage_tokens[stage], atol=2e-3, rtol=2e-3)


def test_images_in_any_order_keep_their_tokens(tmp_path):
    """Ids descend in the first shard and are mixed with those of the second."""
    origin = {"stages": ["transformer"], "clip": None, "flip": False, "sam": {}, "annotations": {}}
    writer = StoreWriter(tmp_path, origin, 2)
    for shard, ids in enumerate(([9, 2, 5], [1, 7])):
        boxes = [torch.full((image_id % 3 + 1, 4), float(image_id)) for image_id in ids]
        images = [
            {"image_id": image_id, "boxes": x, "labels": x[:, 0], "tokens.transformer": 2 * x}
            for image_id, x in zip(ids, boxes)
        ]
        writer.write(shard, pack_images(images), len(ids))
    writer.finish()
    store = TokenStore(tmp_path)
    assert store.image_ids.tolist() == [1, 2, 5, 7, 9]
    for image_id in (9, 2, 5, 1, 7):
        boxes = torch.full((image_id % 3 + 1, 4), float(image_id))
        assert torch.equal(store.get(image_id, boxes)["tokens"], 2 * boxes)


def test_flipped_tokens_come_from_store(dataset, tmp_path):
    extract(tmp_path / "flips", flip=True, feature_maps=True)
    extract(tmp_path / "plain")
    cfg = config("INPUT.RANDOM_FLIP", "horizontal")
    store = TokenStore(tmp_path / "flips")
    mapper = RegionSpotDatasetMapper(cfg, True, token_store=store)
    record = DatasetCatalog.get(dataset)[0]
    boxes = RegionSpotDatasetMapper(config(), False)(record)["instances"].gt_boxes.tensor
    expected = [store.get(record["image_id"], boxes, flipped)["tokens"] for flipped in (False, True)]
    seen = set()
    for seed in range(8):
        np.random.seed(seed)
        mapped = mapper(record)
        flipped = not torch.equal(mapped["instances"].gt_boxes.tensor, boxes)
        assert torch.equal(mapped["tokens"], expected[flipped])
        seen.add(flipped)
    assert seen == {False, True}
    with pytest.raises(ValueError, match="covers no augmentation, but the config asks for RandomFlip"):
        RegionSpotDatasetMapper(cfg, True, token_store=TokenStore(tmp_path / "plain"))


@pytest.mark.parametrize("flips", [0, 1, 2, 3])
def test_flipped_features_match_online_features(dataset, tmp_path, flips):
    """Feature map and tokens equal those of the encoders for the image after as many flips."""
    recognizer = extract(tmp_path / "store", flip=True, feature_maps=True).recognizer
    options = {"augmentations": [T.RandomFlip(prob=1.0)] * flips, "image_format": "RGB"}
    record = DatasetCatalog.get(dataset)[0]
    stored = RegionSpotDatasetMapper(**options, token_store=TokenStore(tmp_path / "store"))(record)
    online = RegionSpotDatasetMapper(**options)(record)
    assert torch.equal(stored["instances"].gt_boxes.tensor, online["instances"].gt_boxes.tensor)
    with torch.no_grad():
        maps = recognizer.vision_language.encode_images([online["image"], online["image"].flip(2)])
        [tokens] = recognizer.position_tokens([online["image"]], [online["instances"].gt_boxes])
    assert (maps[0] - maps[1]).abs().max() > 0.1
    torch.testing.assert_close(stored["feature_map"], maps[0], atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(stored["tokens"], tokens, atol=4e-3, rtol=4e-3)


def test_box_without_area_when_flipped_has_no_token(tmp_path, register):
    """In float32: 640 - 0.0001 and 640 - 0.00012 are the same number."""
    path = write_dataset(tmp_path / "data", 1)
    annotated = json.loads(path.read_text())
    annotated["images"][0].update(width=640, height=48)
    Image.new("RGB", (640, 48)).save(path.parent / "images" / "0.png")
    annotated["annotations"] = [
        {**annotated["annotations"][0], "id": i + 1, "bbox": [x, 4, width, 20]}
        for i, (x, width) in enumerate([(30, 9), (1e-4, 2e-5), (300, 40)])
    ]
    path.write_text(json.dumps(annotated))
    [record] = DatasetCatalog.get(register(NAME, path, path.parent / "images"))
    model = extract(tmp_path / "store", flip=True)
    cfg = config("INPUT.RANDOM_FLIP", "horizontal", "SOLVER.IMS_PER_BATCH", 1)
    store = TokenStore(tmp_path / "store")
    boxes = torch.tensor([[30, 4, 39, 24], [1e-4, 4, 1.2e-4, 24], [300, 4, 340, 24]])
    numbers = set()
    for seed in range(8):
        np.random.seed(seed)
        mapped = RegionSpotDatasetMapper(cfg, True, token_store=store)(record)
        flipped = len(mapped["instances"]) == 2
        rows = [0, 2] if flipped else [0, 1, 2]
        assert torch.equal(mapped["tokens"], store.get(record["image_id"], boxes, flipped)["tokens"][rows])
        model.train()([mapped])
        numbers.add(len(rows))
    assert numbers == {2, 3}


def test_batch_size_does_not_change_store(dataset, tmp_path):
    for size in (1, 4):
        extract(tmp_path / str(size), shard_images=6, batch_size=size, feature_maps=True, flip=True)
    one, several = (load_file(tmp_path / str(size) / "shard-00000.safetensors") for size in (1, 4))
    assert one.keys() == several.keys()
    for key, value in one.items():
        torch.testing.assert_close(several[key], value, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["INPUT.MIN_SIZE_TRAIN", (64,)], "ResizeShortestEdge"),
        (["INPUT.CROP.ENABLED", True], "RandomCrop"),
        (["INPUT.RANDOM_FLIP", "vertical"], "RandomFlip"),
    ],
)
def test_uncovered_augmentations_are_refused(dataset, tmp_path, overrides, names):
    extract(tmp_path / "store", flip=True)
    cfg = config("DATASETS.TOKEN_STORES_TRAIN", (str(tmp_path / "store"),), *overrides)
    with pytest.raises(ValueError, match=f"the horizontal flip only.*{names}"):
        build_train_loader(cfg)


def test_finished_store_is_kept_or_refused(dataset, tmp_path):
    directory = tmp_path / "store"
    extract(directory)
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    extract(directory)
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    for overrides, options, message in (
        ((), {"stages": ("mlp",)}, "another stages: expected .'mlp'., got .'transformer'."),
        ((), {"flip": True}, "another flip"),
        (("MODEL.REGIONSPOT.SAM.MULTIMASK", True), {}, "another sam: expected sam.pth .*multimask True"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(directory, *overrides, **options)


def test_store_of_other_origin_is_refused(dataset, tmp_path):
    model = extract(tmp_path / "store")
    store = TokenStore(tmp_path / "store")
    record = DatasetCatalog.get(dataset)[0]
    with pytest.raises(KeyError, match="no image 99"):
        RegionSpotDatasetMapper(config(), True, token_store=store)({**record, "image_id": 99})
    with pytest.raises(ValueError, match="other boxes"):
        RegionSpotDatasetMapper(config(), True, token_store=store)({**record, "annotations": record["annotations"][1:]})
    model.recognizer.weight_sources["sam"] = "copy.pth"
    store.check_origin({"sam": describe_sam(model.recognizer), "annotations": describe_annotations(NAME)})
    model.recognizer.weight_sources["sam"] = "other.pth"
    torch.nn.init.zeros_(model.recognizer.localizer.sam.mask_decoder.iou_token.weight)
    with pytest.raises(ValueError, match=r"another sam: expected other.pth \(\w+.*got sam.pth"):
        store.check_origin({"sam": describe_sam(model.recognizer)})
    rounded = tiny_model("MODEL.REGIONSPOT.PRECISION", "bf16").recognizer
    with pytest.raises(ValueError, match=r"another sam: expected .*in bfloat16 \(\w+.*got sam.pth"):
        store.check_origin({"sam": describe_sam(rounded)})
    path = tmp_path / "data" / "annotations.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match=r"another annotations: expected annotations.json \(\w+"):
        build_train_loader(config("DATASETS.TOKEN_STORES_TRAIN", (str(tmp_path / "store"),)))
    with pytest.raises(ValueError, match="no tokens of stage 'mlp': expected one of transformer"):
        TokenStore(tmp_path / "store", "mlp")
    with pytest.raises(FileNotFoundError, match="extract_tokens.py"):
        TokenStore(tmp_path / "nothing")


def test_images_without_regions_are_omitted(dataset, tmp_path):
    path = tmp_path / "data" / "annotations.json"
    annotations = json.loads(path.read_text())
    annotations["annotations"] = [a for a in annotations["annotations"] if a["image_id"] in (1, 6)]
    path.write_text(json.dumps(annotations))
    extract(tmp_path / "store", feature_maps=True)  # its middle shard is empty
    assert TokenStore(tmp_path / "store").image_ids.tolist() == [1, 6]
    loader = build_train_loader(
        config("DATASETS.TOKEN_STORES_TRAIN", (str(tmp_path / "store"),), "SOLVER.IMS_PER_BATCH", 2)
    )
    assert {inputs["image_id"] for inputs in next(iter(loader))} == {1, 6}


def test_images_missing_from_store_are_counted(dataset, tmp_path, caplog):
    extract(tmp_path / "store", shard_images=3)
    manifest = tmp_path / "store" / "manifest.json"
    cut = json.loads(manifest.read_text())
    cut["shards"] = cut["shards"][:1]
    manifest.write_text(json.dumps(cut))
    cfg = config("DATASETS.TOKEN_STORES_TRAIN", (str(tmp_path / "store"),), "SOLVER.IMS_PER_BATCH", 3)
    loader = build_train_loader(cfg)
    assert "3 images have no tokens" in caplog.text
    assert {inputs["image_id"] for inputs in next(iter(loader))} == {1, 2, 3}


def test_number_of_workers_does_not_change_stream(dataset, tmp_path):
    extract(tmp_path / "store", flip=True)
    overrides = ["DATASETS.TOKEN_STORES_TRAIN", (str(tmp_path / "store"),), "INPUT.RANDOM_FLIP", "horizontal"]
    streams = []
    for workers in (0, 2):
        loader = build_train_loader(config(*overrides, "DATALOADER.NUM_WORKERS", workers))
        iterator = iter(loader)
        streams.append([inputs for _ in range(3) for inputs in next(iterator)])
    for one, two in zip(*streams):
        assert one["image_id"] == two["image_id"] and torch.equal(one["tokens"], two["tokens"])
    assert torch.equal(
        pickle.loads(pickle.dumps(TokenStore(tmp_path / "store")))._shards[0]["boxes"].sum(), _sum(tmp_path)
    )


def _sum(tmp_path):
    return TokenStore(tmp_path / "store")._shards[0]["boxes"].sum()


def test_verify_names_damaged_shards(dataset, tmp_path):
    extract(tmp_path / "store")
    assert list(find_damage(tmp_path / "store")) == []
    path = tmp_path / "store" / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    (tmp_path / "store" / "shard-00002.safetensors").unlink()
    (tmp_path / "store" / "shard-00009.safetensors").write_bytes(b"")
    problems = list(find_damage(tmp_path / "store"))
    assert len(problems) == 3
    assert "shard-00001.safetensors is damaged: expected SHA-256" in problems[0]
    assert "shard-00002.safetensors is missing" in problems[1] and "not in the manifest" in problems[2]
    with pytest.raises(FileNotFoundError, match="shard-00002"):
        TokenStore(tmp_path / "store")
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="shard-00001.safetensors is damaged"):
        TokenStore(tmp_path / "store")


def test_killed_extraction_resumes_exactly(dataset, tmp_path):
    extract(tmp_path / "undisturbed")
    context, rng, killed = multiprocessing.get_context("fork"), random.Random(3), 0
    while killed < 10:
        process = context.Process(target=extract, args=(tmp_path / "store",))
        process.start()
        time.sleep(rng.uniform(0.01, 0.12))
        process.kill()
        process.join()
        killed += 1
        if (tmp_path / "store" / "manifest.json").is_file():  # it was done: the remaining kills start over
            shutil.rmtree(tmp_path / "store")
    extract(tmp_path / "store")
    assert content(tmp_path / "store") == content(tmp_path / "undisturbed")


def test_processes_share_the_shards(dataset, tmp_path):
    extract(tmp_path / "one", shard_images=1)
    call_in_two_processes(_extract_shared, tmp_path / "two")
    extract(tmp_path / "two", shard_images=1)
    assert content(tmp_path / "two") == content(tmp_path / "one")


def _extract_shared(directory):
    model = tiny_model()
    model.recognizer.weight_sources.update(sam="sam.pth", clip_model="clip.pth")
    extract_tokens(model.recognizer, NAME, directory, Extraction(shard_images=1, batch_size=2), False)


def test_machines_without_common_disk(dataset, tmp_path):
    model = extract(tmp_path / "one")
    for rank in (0, 1):
        extraction = Extraction(shard_images=2, batch_size=2, machine=(rank, 2))
        done = extract_tokens(model.recognizer, NAME, tmp_path / "two", extraction, False)
        assert done == (rank == 1)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    with pytest.raises(ValueError, match="rank below the number"):
        Extraction(machine=(2, 2))


def test_missing_shard_is_written_again(dataset, tmp_path):
    extract(tmp_path / "store")
    before = content(tmp_path / "store")
    (tmp_path / "store" / "shard-00001.safetensors").unlink()
    (tmp_path / "store" / "shard-00002.safetensors").write_bytes(b"cut")
    extract(tmp_path / "store")
    assert content(tmp_path / "store") == before


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        "{}",
        '{"format": "regionspot-tokens-1", "shards": [{}]}',
        '{"format": "regionspot-tokens-2"}',
        "[" * 100_000,
    ],
)
def test_damaged_manifest_is_refused(dataset, tmp_path, text):
    extract(tmp_path / "store")
    (tmp_path / "store" / "manifest.json").write_text(text)
    for use in (TokenStore, lambda directory: list(find_damage(directory)), extract):
        with pytest.raises(ValueError, match=r"manifest.json(:| is) (damaged|of format)|of another (format|dataset)"):
            use(tmp_path / "store")


def test_store_of_version_1_is_read_and_completed(dataset, tmp_path):
    extract(tmp_path / "store")
    expected = content(tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    old = {"format": "regionspot-tokens-1"}
    for key, value in json.loads(path.read_text()).items():
        if key == "image_size":
            old["prompt_frame"] = f"XYXY boxes of the picture, cut to it, in SAM's input of longest side {value}"
            old["image_transform"] = (
                f"upright by EXIF, RGB, longest side to {value} (PIL, bilinear), padded to a square"
            )
        elif key != "format":
            old[{"shard_images": "images of a shard", "num_shards": "number of shards"}.get(key, key)] = value
    path.write_text(json.dumps(old))
    assert TokenStore(tmp_path / "store").manifest == json.loads(expected["manifest.json"])
    with pytest.raises(ValueError, match="another flip"):
        extract(tmp_path / "store", flip=True)
    (tmp_path / "store" / "shard-00001.safetensors").unlink()
    extract(tmp_path / "store")
    assert content(tmp_path / "store") == expected


def test_manifest_with_wrong_types_is_refused(dataset, tmp_path):
    extract(tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    whole = json.loads(path.read_text())
    changes = [{"stages": None}, {"stages": "mlp"}, {"stages": [None]}, {"images": None}, {"boxes": "1"}]
    entries = [{"file": "../shard-00000.safetensors"}, {"file": "/shard-00000.safetensors"}, {"bytes": None}]
    changes += [{"shards": [{**whole["shards"][0], **entry}]} for entry in entries]
    for change in changes:
        path.write_text(json.dumps(whole | change))
        for use in (TokenStore, lambda directory: list(find_damage(directory))):
            with pytest.raises(ValueError, match="manifest.json is damaged"):
                use(tmp_path / "store")


def test_unreadable_images(dataset, tmp_path, caplog):
    image = tmp_path / "data" / "images" / "2.png"
    whole, stamp = image.read_bytes(), image.stat().st_mtime_ns
    extract(tmp_path / "whole")
    image.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"1 of 3 shards of test_stores are not done: .*2\.png.*--skip-damaged"):
        extract(tmp_path / "store")
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 2  # the others are done
    extract(tmp_path / "skipped", skip_damaged=True)
    assert TokenStore(tmp_path / "skipped").image_ids.tolist() == [1, 2, 4, 5, 6] and "2.png" in caplog.text
    image.write_bytes(whole)
    os.utime(image, ns=(stamp, stamp))  # which the store holds
    extract(tmp_path / "store")
    assert content(tmp_path / "store") == content(tmp_path / "whole")


@pytest.mark.parametrize(("ids", "message"), [(["a", "b"], "expected integers"), ([1, 1], "image id 1 occurs 2 times")])
def test_unsupported_image_ids_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        check_image_ids(np.array(ids), "mine")


def test_flipped_thin_box_keeps_its_token(dataset, tmp_path):
    path = tmp_path / "data" / "annotations.json"
    annotations = json.loads(path.read_text())
    annotations["annotations"][0]["bbox"] = [0, 5, 2e-5, 10]
    path.write_text(json.dumps(annotations))
    extract(tmp_path / "store", flip=True)
    store = TokenStore(tmp_path / "store")
    mapper = RegionSpotDatasetMapper(augmentations=[T.RandomFlip(prob=1.0)], image_format="RGB", token_store=store)
    mapped = mapper(DatasetCatalog.get(dataset)[0])
    assert len(mapped["tokens"]) == len(mapped["instances"])


def test_stored_regions_are_the_annotated_ones(dataset, tmp_path):
    extract(tmp_path / "store")
    store = TokenStore(tmp_path / "store")
    for record in DatasetCatalog.get(dataset):
        boxes, labels = store.regions(record["image_id"])
        corners = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in record["annotations"])]
        assert boxes.tolist() == corners
        assert labels.tolist() == [entry["category_id"] for entry in record["annotations"]]
    with pytest.raises(KeyError, match="no image 99"):
        store.regions(99)
