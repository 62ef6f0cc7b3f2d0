"""Token stores with jittered copies of the boxes."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from safetensors.torch import load_file

from regionspot.data import RegionSpotDatasetMapper, build_train_loader
from regionspot.data.tokens import TokenStore
from regionspot.engine import RegionSpotTrainer
from regionspot.engine.extract import Extraction, extract_tokens
from regionspot.structures import Prompts

from ...helpers import frozen_overrides, tiny_config, tiny_model, write_dataset, write_frozen_parts
from ...processes import call_in_two_processes

NAME = "test_jittered_stores"
STAGES = ("prompt_encoder", "transformer")
JITTER = {"jitter": 0.1, "jitter_copies": 2}
SIZE = (48, 64)  # of the drawn scenes


@pytest.fixture
def dataset(tmp_path, register):
    return register(NAME, write_dataset(tmp_path / "data", 4), tmp_path / "data" / "images")


def extract(directory, **extraction):
    model = _named_model()
    options = {"shard_images": 2, "batch_size": 2, **JITTER, **extraction}
    assert extract_tokens(model.recognizer, NAME, directory, Extraction(**options), show_progress=False)
    return model


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def annotated_boxes(record):
    corners = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in record["annotations"])]
    return torch.tensor(corners, dtype=torch.float32)


def copies_of(boxes, image_id, strength=0.1, num_copies=2):
    """Return the list of jittered (n, 4) boxes of an image, in plain steps."""
    result, sides = [], (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    for copy in range(num_copies):
        errors = torch.from_numpy(np.random.default_rng([image_id, copy]).normal(0, strength, boxes.shape))
        moved = (boxes + errors * sides).float()
        moved[:, 0::2] = moved[:, 0::2].clamp(0, SIZE[1])
        moved[:, 1::2] = moved[:, 1::2].clamp(0, SIZE[0])
        assert (moved[:, 2:] - moved[:, :2] > 1).all()
        result.append(moved)
    return result


def test_copies_have_tokens_of_jittered_boxes(dataset, tmp_path):
    recognizer = extract(tmp_path / "store", stages=(*STAGES, "mask"), flip=True).recognizer
    reader = RegionSpotDatasetMapper(augmentations=[], image_format="RGB")
    for record in DatasetCatalog.get(dataset):
        image, boxes = reader(record)["image"], annotated_boxes(record)
        expected = [boxes, *copies_of(boxes, record["image_id"])]
        for flipped in (False, True):
            encoded = recognizer.encode_images([image.flip(2) if flipped else image])
            seen = []
            for index, jittered in enumerate(expected):
                prompts = jittered.clone()
                if flipped:
                    prompts[:, 0::2] = SIZE[1] - jittered[:, [2, 0]]
                [located] = recognizer.locate(encoded, [Prompts(boxes=prompts)], stages=(*STAGES, "mask"))
                chosen = torch.full((len(boxes),), index)
                for stage, tokens in located.stage_tokens.items():
                    store = TokenStore(tmp_path / "store", stage)
                    features = store.get(record["image_id"], boxes, flipped, chosen)
                    torch.testing.assert_close(features["boxes"], jittered, atol=1e-5, rtol=0)
                    # a cell of 16 x 16 may change with a logit that is 0 but for rounding
                    atol = 0.1 if stage == "mask" else 2e-3
                    torch.testing.assert_close(features["tokens"], tokens, atol=atol, rtol=2e-3)
                seen.append(located.stage_tokens["prompt_encoder"])
            # otherwise copies and regions could be mixed up
            rows = torch.cat(seen)
            distances = torch.cdist(rows, rows) + 9 * torch.eye(len(rows))
            assert distances.min() > 0.05


def test_each_image_is_encoded_once(dataset, tmp_path, monkeypatch):
    model = tiny_model()
    encode, counts = model.recognizer.localizer.encode_images, []
    monkeypatch.setattr(
        model.recognizer.localizer, "encode_images", lambda images: counts.append(len(images)) or encode(images)
    )
    extraction = Extraction(flip=True, jitter=0.1, jitter_copies=5)
    extract_tokens(model.recognizer, NAME, tmp_path / "store", extraction, show_progress=False)
    assert sum(counts) == 2 * 4  # four images and their flips


def chosen_copies(store, record, inputs, flipped=False):
    """Return which copy each region's tokens are of, the same for all stages and the boxes."""
    boxes, rows = annotated_boxes(record), []
    for index in range(store.num_copies + 1):
        features = store.get(record["image_id"], boxes, flipped, torch.full((len(boxes),), index))
        rows.append(torch.cat([features["tokens"], features["boxes"]], dim=1))
    actual = torch.cat([inputs["tokens"], inputs["instances"].gt_boxes.tensor], dim=1)
    is_equal = torch.stack(rows) == actual  # (1 + K, n, D)
    assert (is_equal.all(dim=2).sum(dim=0) == 1).all(), "tokens of several copies, or of none"
    return is_equal.all(dim=2).float().argmax(dim=0).tolist()


def test_every_copy_is_taken_equally_often(dataset, tmp_path):
    extract(tmp_path / "store", stages=STAGES)
    store, records = TokenStore(tmp_path / "store", *STAGES), DatasetCatalog.get(dataset)
    record = next(record for record in records if len(record["annotations"]) >= 2)
    mapper = RegionSpotDatasetMapper(augmentations=[], image_format="RGB", token_store=store, box_jitter=0.1)
    np.random.seed(0)
    counts = np.zeros((3, 3), int)
    for _ in range(450):
        first, second, *_ = chosen_copies(store, record, mapper(record))
        counts[first, second] += 1
    # 50 for each pair of copies, with a standard deviation of 6.7: regions are independent, too
    assert counts.min() > 20 and counts.max() < 80


def test_jittered_tokens_are_of_their_boxes(dataset, tmp_path):
    """The loss of stored copies, also of flipped images, is that of an image with their boxes."""
    model = extract(tmp_path / "store", flip=True)
    store = TokenStore(tmp_path / "store")
    cfg = tiny_config("INPUT.BOX_JITTER", 0.1, "INPUT.RANDOM_FLIP", "horizontal")
    mapper = RegionSpotDatasetMapper(cfg, True, token_store=store)
    np.random.seed(1)
    batch = [mapper(record) for record in DatasetCatalog.get(dataset) for _ in range(4)]
    images = [{key: value for key, value in inputs.items() if key != "tokens"} for inputs in batch]
    annotated = {record["image_id"]: annotated_boxes(record) for record in DatasetCatalog.get(dataset)}
    for inputs in images:
        assert len(inputs["instances"]) == len(annotated[inputs["image_id"]])
    model.recognizer.knowledge_integration.eval()
    model.training = True
    for stored, online in zip(batch, images):
        torch.testing.assert_close(model([stored])["loss_cls"], model([online])["loss_cls"], atol=2e-3, rtol=2e-3)
    with torch.no_grad():
        tokens = model.recognizer.position_tokens(
            [inputs["image"] for inputs in images], [inputs["instances"].gt_boxes for inputs in images]
        )
    for stored, expected in zip(batch, tokens):
        torch.testing.assert_close(stored["tokens"], expected, atol=2e-3, rtol=2e-3)


def test_annotated_boxes_of_store_with_jitter(dataset, tmp_path):
    """Without BOX_JITTER the same is read as from a store without copies, and no random number is drawn."""
    extract(tmp_path / "jittered")
    extract(tmp_path / "plain", jitter=0.0, jitter_copies=0)
    jittered, plain = (
        RegionSpotDatasetMapper(tiny_config(), True, token_store=TokenStore(tmp_path / name))
        for name in ("jittered", "plain")
    )
    for record in DatasetCatalog.get(dataset):
        state = np.random.get_state()[1].copy()
        one, other = jittered(record), plain(record)
        torch.testing.assert_close(one["tokens"], other["tokens"], atol=2e-3, rtol=2e-3)
        assert torch.equal(one["instances"].gt_boxes.tensor, annotated_boxes(record))
        assert np.array_equal(np.random.get_state()[1], state)


def _extract_shared(directory):
    extract_tokens(_named_model().recognizer, NAME, directory, Extraction(shard_images=1, **JITTER), False)


def _named_model():
    model = tiny_model()
    model.recognizer.weight_sources.update(sam="sam.pth", clip_model="clip.pth")
    return model


def test_resumed_and_shared_extraction_writes_same_bytes(dataset, tmp_path):
    extract(tmp_path / "one", shard_images=1, batch_size=1)
    call_in_two_processes(_extract_shared, tmp_path / "two")
    _extract_shared(tmp_path / "two")
    assert content(tmp_path / "two") == content(tmp_path / "one")
    for shard in (0, 2):
        (tmp_path / "two" / f"shard-0000{shard}.safetensors").unlink()
    _extract_shared(tmp_path / "two")
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_batches_do_not_change_the_copies(dataset, tmp_path):
    for size in (1, 4):
        extract(tmp_path / str(size), shard_images=4, batch_size=size, flip=True)
    one, several = (load_file(tmp_path / str(size) / "shard-00000.safetensors") for size in (1, 4))
    assert one.keys() == several.keys() and torch.equal(one["jittered_boxes"], several["jittered_boxes"])
    assert {"jittered_tokens.transformer", "flipped_jittered_tokens.transformer"} <= one.keys()
    for key, value in one.items():
        torch.testing.assert_close(several[key], value, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize(
    ("extraction", "message"),
    [
        (
            {"jitter": 0.0, "jitter_copies": 0},
            "got no jittered copies; set INPUT.BOX_JITTER to 0.0, or",
        ),
        ({}, "got jittered copies of strength 0.1; set INPUT.BOX_JITTER to 0.1 or 0.0, or"),
    ],
)
def test_store_of_other_jitter_is_refused(dataset, tmp_path, extraction, message):
    extract(tmp_path / "store", **extraction)
    stores = ("DATASETS.TOKEN_STORES_TRAIN", (str(tmp_path / "store"),))
    with pytest.raises(
        ValueError, match=message + ".*regionspot extract --jitter 0.2 --jitter-copies [23] --output DIR"
    ):
        build_train_loader(tiny_config("DATASETS.TRAIN", (NAME,), *stores, "INPUT.BOX_JITTER", 0.2))


def test_manifest_names_strength_and_copies(dataset, tmp_path):
    extract(tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["jitter"] == 0.1 and manifest["jitter_copies"] == 2
    for options, message in (
        ({"jitter_copies": 3}, "another jitter_copies: expected 3, got 2"),
        ({"jitter": 0.2}, "another jitter: expected 0.2, got 0.1"),
        ({"jitter": 0.0, "jitter_copies": 0}, "another jitter: expected None, got 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(tmp_path / "store", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jitter": 0.1}, "expected --jitter and a positive --jitter-copies, or neither; got 0.1 and 0"),
        ({"jitter_copies": 3}, "or neither; got 0.0 and 3"),
        ({"jitter": 0.1, "jitter_copies": -1}, "got 0.1 and -1"),
        ({"jitter": float("nan"), "jitter_copies": 1}, "--jitter: expected .*got nan"),
        ({"jitter": 0.5, "jitter_copies": 1}, "--jitter: expected .*less than 0.5, got 0.5"),
    ],
)
def test_impossible_jitter_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Extraction(**options)


def test_training_step_from_jittered_copies(dataset, tmp_path):
    model = tiny_model(names=None)
    write_frozen_parts(model.recognizer, tmp_path)
    extraction = Extraction(feature_maps=True, flip=True, **JITTER)
    extract_tokens(model.recognizer, NAME, tmp_path / "store", extraction, show_progress=False)
    data = ("DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (), "DATASETS.TOKEN_STORES_TRAIN", (str(tmp_path / "store"),))
    solver = ("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), "INPUT.RANDOM_FLIP", "horizontal")
    losses = []
    for strength in (0.0, 0.1):
        output = tmp_path / f"output-{strength}"
        output.mkdir()
        options = ("INPUT.BOX_JITTER", strength, "OUTPUT_DIR", str(output))
        torch.manual_seed(0)
        trainer = RegionSpotTrainer(tiny_config(*frozen_overrides(tmp_path), *data, *solver, *options))
        trainer.resume_or_load(resume=False)
        trainer.train()
        losses.append(trainer.storage.history("total_loss").latest())
    assert np.isfinite(losses).all() and losses[0] != losses[1]
