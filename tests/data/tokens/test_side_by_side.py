"""Token stores of several localizers: what manifests say of them, and which one training takes."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from regionspot.config import load_config
from regionspot.data import register_json_dataset
from regionspot.data.tokens import TokenStore
from regionspot.engine.regionspot_trainer import RegionSpotTrainer
from regionspot.modeling.identity import describe_sam
from regionspot.modeling.localizers import LOCALIZER_REGISTRY, SamLocalizer
from regionspot_cli.commands import COMMANDS

from ...helpers import TINY, tiny_config, tiny_model, write_dataset, write_frozen_parts

NAME = "test_side_by_side"


class OtherLocalizer(SamLocalizer):
    """The same weights by another way."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A data set, two SAMs and the stores of both."""
    directory = tmp_path_factory.mktemp("side_by_side")
    register_json_dataset(NAME, write_dataset(directory / "data", 4), directory / "data" / "images")
    recognizer = tiny_model(names=None).recognizer
    write_frozen_parts(recognizer, directory)
    for sam in ("one", "two"):
        torch.save(recognizer.localizer.sam.state_dict(), directory / f"{sam}.pth")
        extract(directory, sam)
        torch.nn.init.normal_(recognizer.localizer.sam.mask_decoder.iou_token.weight)
    yield directory
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def overrides(directory, sam):
    weights = {"SAM": directory / f"{sam}.pth", "CLIP": directory / "clip.pth"}
    return [part for key, path in weights.items() for part in (f"MODEL.REGIONSPOT.{key}.WEIGHTS", str(path))]


def extract(directory, sam, *options):
    base = ["--config-file", TINY, "--datasets", NAME, "--output", directory / "tokens", "--shard-images", 2]
    COMMANDS["extract"].call(*base, *(options or ["--side-by-side"]), *overrides(directory, sam))


def config(directory, sam, *others):
    data = ["DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (), "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 1]
    stores = ["DATASETS.TOKEN_STORES_TRAIN", (str(directory / "tokens" / NAME),), "SOLVER.STEPS", ()]
    return tiny_config(*overrides(directory, sam), *data, *stores, "OUTPUT_DIR", str(directory / "output"), *others)


def stores(directory):
    return sorted((directory / "tokens" / NAME).iterdir())


def test_training_takes_the_store_of_its_localizer(directory):
    assert len(stores(directory)) == 2 and all(path.name.startswith("SamLocalizer-") for path in stores(directory))
    taken = []
    for sam in ("one", "two"):
        trainer = RegionSpotTrainer(config(directory, sam))
        trainer.resume_or_load(resume=False)
        trainer.train()
        [mapper] = trainer.loop.data_loader.dataset.mappers
        manifest, expected = mapper.token_store.manifest["sam"], describe_sam(trainer.recognizer)
        assert manifest["fingerprint"] == expected["fingerprint"] and manifest["source"].endswith(f"{sam}.pth")
        assert (manifest["localizer"], manifest["variant"]) == ("SamLocalizer", "custom")
        taken.append(mapper.token_store.directory)
    assert sorted(taken) == stores(directory)


def test_error_lists_what_is_there(directory):
    three = tiny_model(names=None).recognizer.localizer.sam
    torch.nn.init.ones_(three.mask_decoder.iou_token.weight)
    torch.save(three.state_dict(), directory / "three.pth")
    names = ".*".join(rf"{path.name} of \S+\.pth \(" for path in stores(directory))
    with pytest.raises(ValueError, match=rf"has no token store of \S+three.pth \(.* only {names}.*--side-by-side"):
        RegionSpotTrainer(config(directory, "three"))


def test_other_localizer_of_same_weights_is_refused(directory, monkeypatch):
    monkeypatch.setattr(LOCALIZER_REGISTRY, "_obj_map", {**LOCALIZER_REGISTRY._obj_map, "Other": OtherLocalizer})
    store = TokenStore(stores(directory)[0])
    sam = {**store.manifest["sam"], "localizer": "OtherLocalizer"}
    with pytest.raises(ValueError, match="another sam: expected .*localizer OtherLocalizer.*got .*localizer SamLoc"):
        store.check_origin({"sam": sam})
    with pytest.raises(ValueError, match="localizer OtherLocalizer, variant custom.* only SamLocalizer-"):
        RegionSpotTrainer(config(directory, "one", "MODEL.REGIONSPOT.LOCALIZER.NAME", "Other"))


def test_manifest_without_a_name_still_works(directory, tmp_path):
    path = tmp_path / "old"
    path.mkdir()
    for file in stores(directory)[0].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((path / "manifest.json").read_text())
    expected = dict(manifest["sam"])
    for key in ("localizer", "variant"):
        del manifest["sam"][key]
    (path / "manifest.json").write_text(json.dumps(manifest))
    TokenStore(path).check_origin({"sam": {**expected, "variant": "vit_b"}})
    with pytest.raises(ValueError, match="another sam"):
        TokenStore(path).check_origin({"sam": {**expected, "fingerprint": "0" * 64}})


def test_command_reports_and_keeps_them_apart(directory, capsys):
    extract(directory, "one")  # complete: nothing to do
    printed = capsys.readouterr().out
    assert all(str(path) in printed for path in stores(directory))
    (directory / "printed.yaml").write_text(f"_BASE_: {TINY}\n{printed[printed.index('DATASETS:') :]}")
    parent = str(directory / "tokens" / NAME)
    [store] = load_config(directory / "printed.yaml").DATASETS.TOKEN_STORES_TRAIN
    assert store == parent
    assert COMMANDS["extract"].call("--verify", parent) == 0
    assert capsys.readouterr().out.count("all as written") == 2
    with pytest.raises(ValueError, match="has token stores side by side; add --side-by-side"):
        extract(directory, "one", "--flip")
