"""Token stores with the proposals that match annotated boxes."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog

from regionspot.config import load_config
from regionspot.data import RegionSpotDatasetMapper, build_train_loader
from regionspot.data.proposals import ProposalFile
from regionspot.data.tokens import TokenStore
from regionspot.engine import RegionSpotTrainer
from regionspot.engine.extract import Extraction, extract_tokens
from regionspot_cli.commands import COMMANDS

from ...helpers import TINY, draw_scene, frozen_overrides, tiny_config, tiny_model, write_dataset, write_frozen_parts

NAME = "test_stored_proposals"


@pytest.fixture
def dataset(tmp_path, register):
    """Scenes with a box that is partly outside, one without area and a very thin one; proposals of all kinds."""
    path = write_dataset(tmp_path / "data", 4)
    content = json.loads(path.read_text())
    odd = [[-6, 3, 20, 25], [50, 8, 0, 9], [0, 5, 1.8e-5, 10]]
    for index, box in enumerate(odd):
        content["annotations"].append({**content["annotations"][0], "id": 100 + index, "bbox": box})
    path.write_text(json.dumps(content))
    entries = {}
    for index in range(3):  # none for the last image
        boxes = draw_scene(index)[1]
        near, loose = boxes + [-1, 1, 1, 0.5], boxes + [-9, -9, 9, 9]
        entries[str(index + 1)] = {"boxes": [*near.tolist(), *loose.tolist(), *(boxes + 0.25).tolist()]}
    # partly outside, thinner than an annotated box may be, without area, on two annotated boxes
    entries["1"]["boxes"] += [[-30, 2, 14, 28], [0, 5, 0.95e-5, 15], [9, 9, 9, 20], [0, 3, 13, 28]]
    (tmp_path / "boxes.json").write_text(json.dumps(entries))
    return register(NAME, path, tmp_path / "data" / "images")


def extract(tmp_path, name="store", **extraction):
    model = tiny_model()
    options = {"shard_images": 2, "proposals": ProposalFile(tmp_path / "boxes.json"), **extraction}
    assert extract_tokens(model.recognizer, NAME, tmp_path / name, Extraction(**options), show_progress=False)
    return model


def config(tmp_path, *overrides, store="store"):
    files = ("DATASETS.PROPOSAL_FILES_TRAIN", (str(tmp_path / "boxes.json"),)) if "no file" not in overrides else ()
    stores = ("DATASETS.TOKEN_STORES_TRAIN", (str(tmp_path / store),)) if store else ()
    others = [part for part in overrides if part != "no file"]
    return tiny_config("DATASETS.TRAIN", (NAME,), "SOLVER.IMS_PER_BATCH", 4, *files, *stores, *others)


def mappers(tmp_path, *overrides):
    """Return the mappers without and with the store."""
    cfg, proposals = config(tmp_path, *overrides), ProposalFile(tmp_path / "boxes.json")
    stores = (None, TokenStore(tmp_path / "store"))
    return [RegionSpotDatasetMapper(cfg, True, token_store=store, proposal_file=proposals) for store in stores]


def iou(one, other):
    sides = [max(min(one[i + 2], other[i + 2]) - max(one[i], other[i]), 0) for i in (0, 1)]
    inter = sides[0] * sides[1]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return inter / (sum(areas) - inter)


def test_regions_are_those_computed_plainly(dataset, tmp_path):
    """Annotated boxes, then the proposals with an IoU of at least 0.5 with one, in the file's order, in its class."""
    extract(tmp_path)
    entries, num_matched = json.loads((tmp_path / "boxes.json").read_text()), 0
    for record in DatasetCatalog.get(dataset):
        regions = []
        for entry in record["annotations"]:
            x, y, w, h = entry["bbox"]
            box = [max(x, 0), max(y, 0), min(x + w, 64), min(y + h, 48)]
            if box[2] - box[0] > 1e-5 and box[3] - box[1] > 1e-5:
                regions.append((box, entry["category_id"]))
        matched = []
        for x0, y0, x1, y1 in entries.get(str(record["image_id"]), {"boxes": []})["boxes"]:
            box = [max(x0, 0), max(y0, 0), min(x1, 64), min(y1, 48)]
            if box[2] - box[0] <= 1e-5 or box[3] - box[1] <= 1e-5:
                continue
            overlaps = [iou(box, annotated) for annotated, _ in regions]
            if max(overlaps) >= 0.5:
                matched.append((box, regions[int(np.argmax(overlaps))][1]))
        num_matched += len(matched)
        boxes, classes = zip(*regions, *matched)
        stored_boxes, stored_classes = TokenStore(tmp_path / "store").regions(record["image_id"])
        torch.testing.assert_close(stored_boxes, torch.tensor(boxes, dtype=torch.float32), atol=1e-5, rtol=0)
        assert stored_classes.tolist() == list(classes)
    assert num_matched > 12


@pytest.mark.parametrize("maps", [False, True])
def test_training_equals_training_without_store(dataset, tmp_path, maps):
    model = extract(tmp_path, feature_maps=maps)
    model.recognizer.knowledge_integration.eval()
    model.training = True
    batches = []
    for mapper in mappers(tmp_path):
        batches.append([mapper(record) for record in DatasetCatalog.get(dataset)])
    for online, cached in zip(*batches):
        assert torch.equal(online["instances"].gt_boxes.tensor, cached["instances"].gt_boxes.tensor)
        assert torch.equal(online["instances"].gt_classes, cached["instances"].gt_classes)
        assert len(cached["tokens"]) == len(cached["instances"]) and "proposals" not in cached
    online, cached = (model(batch)["loss_cls"] for batch in batches)
    torch.testing.assert_close(cached, online, atol=2e-3, rtol=2e-3)
    with torch.no_grad():
        expected = model.recognizer.position_tokens(
            [inputs["image"] for inputs in batches[0]], [inputs["instances"].gt_boxes for inputs in batches[0]]
        )
    for inputs, tokens in zip(batches[1], expected):
        torch.testing.assert_close(inputs["tokens"], tokens, atol=4e-3, rtol=4e-3)


def test_flips_and_jitter_cover_proposals(dataset, tmp_path):
    recognizer = extract(tmp_path, flip=True, jitter=0.05, jitter_copies=2).recognizer
    overrides = ("INPUT.RANDOM_FLIP", "horizontal", "INPUT.BOX_JITTER", 0.05)
    _, mapper = mappers(tmp_path, *overrides)
    np.random.seed(0)
    store, is_flipped, num_boxes, num_annotated = TokenStore(tmp_path / "store"), set(), 0, 0
    for record in [*DatasetCatalog.get(dataset)] * 3:
        inputs = mapper(record)
        boxes, (stored, _) = inputs["instances"].gt_boxes.tensor, store.regions(record["image_id"])
        with torch.no_grad():
            [tokens] = recognizer.position_tokens([inputs["image"]], [inputs["instances"].gt_boxes])
        torch.testing.assert_close(inputs["tokens"], tokens, atol=4e-3, rtol=4e-3)
        flipped = torch.stack([64 - stored[:, 2], stored[:, 1], 64 - stored[:, 0], stored[:, 3]], dim=1)
        distances = [float((boxes - x).abs().mean()) for x in (stored, flipped)]
        is_flipped.add(distances[1] < distances[0])
        assert 1e-3 < min(distances) < 3  # boxes are moved, a little
        num_boxes, num_annotated = num_boxes + len(boxes), num_annotated + len(record["annotations"])
    assert is_flipped == {False, True} and num_boxes > num_annotated


def test_proposals_match_boxes_as_annotated(dataset, tmp_path):
    """Which proposals match does not depend on the errors of this step."""
    online = RegionSpotDatasetMapper(
        config(tmp_path, "INPUT.BOX_JITTER", 0.4, store=""), True, proposal_file=ProposalFile(tmp_path / "boxes.json")
    )
    record, classes = DatasetCatalog.get(dataset)[0], set()
    for seed in range(8):
        np.random.seed(seed)
        classes.add(tuple(online(record)["instances"].gt_classes.tolist()))
    assert len(classes) == 1


def test_other_proposals_are_refused(dataset, tmp_path):
    extract(tmp_path, "plain", proposals=None)
    extract(tmp_path)
    no_file = (
        r"expected annotated ones alone, got those of boxes.json \(\w+, iou 0.5\), too; .*`regionspot extract --output"
    )
    with pytest.raises(ValueError, match=no_file):
        build_train_loader(config(tmp_path, "no file"))
    other_iou = r"expected those of boxes.json \(\w+, iou 0.7\), too, got those of boxes.json \(\w+, iou 0.5\), too"
    with pytest.raises(ValueError, match=other_iou):
        build_train_loader(config(tmp_path, "MODEL.REGIONSPOT.PROPOSALS.IOU_THRESH_TRAIN", 0.7))
    without = r"expected those of boxes.json .*, got annotated ones alone; .* extract --proposals .* --output DIR`"
    with pytest.raises(ValueError, match=without):
        build_train_loader(config(tmp_path, store="plain"))
    (tmp_path / "boxes.json").write_text((tmp_path / "boxes.json").read_text() + " ")
    with pytest.raises(ValueError, match=r"expected those of boxes.json .*, got those of boxes.json"):
        build_train_loader(config(tmp_path))
    with pytest.raises(ValueError, match="another proposals: expected boxes.json"):
        extract(tmp_path)


def test_wrong_proposals_are_refused_by_extraction(dataset, tmp_path):
    (tmp_path / "boxes.json").write_text(json.dumps({"77": {"boxes": [[1, 2, 3, 4]]}}))
    with pytest.raises(ValueError, match="none of the 4 images of the data set has an entry"):
        extract(tmp_path)
    with pytest.raises(ValueError, match="IOU_THRESH_TRAIN: expected an IoU above 0, at most 1, got 0"):
        extract(tmp_path, match_iou=0)


def test_training_step_with_stored_proposals(dataset, tmp_path):
    model = tiny_model(names=None)
    write_frozen_parts(model.recognizer, tmp_path)
    proposals = ProposalFile(tmp_path / "boxes.json")
    extraction = Extraction(feature_maps=True, proposals=proposals)
    extract_tokens(model.recognizer, NAME, tmp_path / "store", extraction, show_progress=False)
    losses = []
    for store in ("", "store"):
        output = tmp_path / f"output-{store}"
        output.mkdir()
        solver = ("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), "DATASETS.TEST", (), "OUTPUT_DIR", str(output))
        dropout = ("MODEL.REGIONSPOT.INTEGRATION.DROPOUT", 0.0)
        torch.manual_seed(0)
        trainer = RegionSpotTrainer(config(tmp_path, *frozen_overrides(tmp_path), *solver, *dropout, store=store))
        trainer.resume_or_load(resume=False)
        trainer.train()
        losses.append(trainer.storage.history("total_loss").latest())
    assert losses[0] == pytest.approx(losses[1], abs=2e-3, rel=2e-3)


@pytest.mark.parametrize("source", ["option", "config"])
def test_extract_command_takes_jitter_and_proposals_of_config(dataset, tmp_path, capsys, source):
    """Training with the config, and the lines that the command prints, accepts the store."""
    write_frozen_parts(tiny_model(names=None).recognizer, tmp_path)
    plus, iou = tmp_path / "plus.yaml", ["MODEL.REGIONSPOT.PROPOSALS.IOU_THRESH_TRAIN", 0.6]
    overrides, inputs = ["INPUT.BOX_JITTER", 0.2], ["--config-file", plus, "--datasets", NAME]
    if source == "option":
        inputs += ["--proposals", tmp_path / "boxes.json"]
    else:
        files = ("other.json", str(tmp_path / "boxes.json"))  # that of another data set is not asked for
        overrides += ["DATASETS.TRAIN", ("other", NAME), "DATASETS.PROPOSAL_FILES_TRAIN", files]
    plus.write_text(tiny_config(*overrides, *frozen_overrides(tmp_path)).dump())
    COMMANDS["extract"].call(*inputs, "--output", tmp_path / "tokens", *iou)
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(f"_BASE_: plus.yaml\n{printed[printed.index('DATASETS:') :]}")
    cfg = load_config(tmp_path / "printed.yaml", ["SOLVER.IMS_PER_BATCH", "2"])
    [path] = cfg.DATASETS.TOKEN_STORES_TRAIN
    assert TokenStore(path).manifest["jitter"] == 0.2 and TokenStore(path).num_copies == 3
    assert TokenStore(path).manifest["proposals"]["source"] == "boxes.json"
    assert cfg.INPUT.BOX_JITTER == 0.2 and next(iter(build_train_loader(cfg)))


def test_extract_command_checks_all_inputs_first(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("regionspot_cli.extract.load_model", lambda _: pytest.fail("loaded a model"))
    (tmp_path / "other.json").write_text(json.dumps({"77": {"boxes": [[1, 2, 3, 4]]}}))
    command = ["--config-file", TINY, "--datasets", NAME, NAME, "--proposals", tmp_path / "boxes.json"]
    with pytest.raises(ValueError, match=r"other.json: none of the 4 images of the data set has an entry"):
        COMMANDS["extract"].call(*command, tmp_path / "other.json", "--output", tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"--jitter: expected a share .* got 0.7"):
        COMMANDS["extract"].call(*command, tmp_path / "boxes.json", "--output", tmp_path / "tokens", "--jitter", 0.7)


def test_remedy_has_all_that_training_asks_for(dataset, tmp_path):
    extract(tmp_path, "plain", proposals=None, flip=True)
    iou = ("MODEL.REGIONSPOT.PROPOSALS.IOU_THRESH_TRAIN", 0.7)
    remedy = "extract --flip --jitter 0.2 --jitter-copies 3 --proposals .*boxes.json --output DIR MODEL.* 0.7`"
    with pytest.raises(ValueError, match=remedy):
        build_train_loader(config(tmp_path, *iou, "INPUT.BOX_JITTER", 0.2, store="plain"))


def test_impossible_iou_is_refused_without_a_store(dataset, tmp_path):
    for iou in (0.0, 1.5):
        with pytest.raises(ValueError, match=f"IOU_THRESH_TRAIN: expected an IoU above 0, at most 1, got {iou}"):
            build_train_loader(config(tmp_path, "MODEL.REGIONSPOT.PROPOSALS.IOU_THRESH_TRAIN", iou, store=""))
