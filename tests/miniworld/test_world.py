"""The drawn world: the same every time, and valid LVIS."""

import json
import multiprocessing

import numpy as np
import pytest
import torch
from lvis import LVIS
from PIL import Image
from safetensors.torch import save_file

from miniworld.__main__ import COMMANDS
from miniworld.annotate import write_split
from miniworld.categories import BASE, CATEGORIES, FREQUENCIES, NAMES, NOVEL
from miniworld.experiment import CONFIGS, miniworld_config
from miniworld.generator import draw_captioned, draw_scene
from miniworld.packing import pack_weights, used_tokens
from miniworld.tables import format_runs
from regionspot.checkpoint.checkpointer import RegionSpotCheckpointer
from regionspot.checkpoint.formats import load_checkpoint_file
from regionspot.modeling.geometric_ensemble import GeometricEnsemble
from regionspot.modeling.vision_language.clip import VOCAB_SIZE

from ..helpers import tiny_model


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    return directory, {split: LVIS(str(write_split(directory, split, 40))) for split in ("train", "test")}


def test_scene_depends_on_seed_split_and_index():
    first, again = draw_scene("train", 5), draw_scene("train", 5)
    assert np.array_equal(first.image, again.image) and np.array_equal(first.masks, again.masks)
    for other in (draw_scene("train", 6), draw_scene("test", 5), draw_scene("train", 5, seed=1)):
        assert not np.array_equal(first.image, other.image)
    assert np.array_equal(draw_captioned(3).image, draw_captioned(3).image)


def test_30_percent_of_120_categories_are_novel():
    assert len(set(NAMES)) == 120 and len(NOVEL) == 36 and len(BASE) == 84
    for k in range(3):  # every pattern, color and shape is to be learned from base classes
        values = {category[k] for category in CATEGORIES}
        assert {CATEGORIES[i][k] for i in BASE} == {CATEGORIES[i][k] for i in NOVEL} == values
    assert {FREQUENCIES[i] for i in NOVEL} == {"r"} and {FREQUENCIES[i] for i in BASE} == {"c", "f"}


def test_files_match_drawn_scenes(written):
    directory, splits = written
    for split, lvis in splits.items():
        assert len(lvis.imgs) == 40
        for image_id in (1, 7, 40):
            scene = draw_scene(split, image_id - 1)
            assert np.array_equal(np.asarray(Image.open(directory / lvis.imgs[image_id]["file_name"])), scene.image)
            annotations = lvis.load_anns(lvis.get_ann_ids([image_id]))
            kept = [i for i, label in enumerate(scene.classes) if split == "test" or label in BASE]
            assert [a["category_id"] - 1 for a in annotations] == scene.classes[kept].tolist()
            for annotation, i in zip(annotations, kept):
                mask = lvis.ann_to_mask(annotation).astype(bool)
                assert np.array_equal(mask, scene.masks[i]) and annotation["area"] == mask.sum()
                x, y, w, h = map(int, annotation["bbox"])
                assert (
                    mask[y : y + h, x : x + w].sum() == mask.sum()
                    and mask[y : y + h, x].any()
                    and mask[y, x : x + w].any()
                )


def test_split_independent_of_processes(written, tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")  # nothing need be imported again
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    path = write_split(tmp_path, "test", 40, workers=2)
    assert path.read_bytes() == (written[0] / "test.json").read_bytes()
    for image in sorted((tmp_path / "test").iterdir()):
        assert image.read_bytes() == (written[0] / "test" / image.name).read_bytes()


def test_novel_categories_annotated_in_test_only(written):
    _, splits = written
    seen = {split: {a["category_id"] - 1 for a in lvis.anns.values()} for split, lvis in splits.items()}
    assert not seen["train"] & set(NOVEL) and seen["test"] & set(NOVEL)
    listed = {split: [category - 1 for category in lvis.cats] for split, lvis in splits.items()}
    assert listed["train"] == BASE and listed["test"] == list(range(120))


def test_negative_categories_absent_from_image(written):
    for split, lvis in written[1].items():
        for image in lvis.imgs.values():
            present = set(draw_scene(split, image["id"] - 1).classes + 1)
            assert len(image["neg_category_ids"]) == 30 and not present & set(image["neg_category_ids"])
            assert set(image["not_exhaustive_category_ids"]) <= present


def test_existing_split_is_kept(written, monkeypatch):
    directory, _ = written
    monkeypatch.setattr("miniworld.annotate.write_scene", lambda *_: pytest.fail("drawn again"))
    write_split(directory, "test", 40)
    assert json.loads((directory / "test.json").read_text())["info"]["number"] == 40


def test_packed_token_rows_are_unpacked(tmp_path):
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


def test_packed_token_rows_below_a_prefix_are_unpacked(tmp_path):
    embedding = torch.randn(VOCAB_SIZE, 2).half()
    save_file(pack_weights({"text.token_embedding.weight": embedding}), tmp_path / "siglip.safetensors")
    loaded = load_checkpoint_file(tmp_path / "siglip.safetensors")
    assert list(loaded) == ["text.token_embedding.weight"]
    used, unused = used_tokens(), torch.ones(VOCAB_SIZE, dtype=torch.bool)
    unused[used] = False
    assert torch.equal(loaded["text.token_embedding.weight"][used], embedding[used])
    assert not loaded["text.token_embedding.weight"][unused].any()


def test_table_of_runs_leaves_missing_numbers_empty():
    runs = {"full": [{"base_top1": 0.5, "AP": 70.0}, {"base_top1": 0.6, "AP": 72.0}], "older": [{"base_top1": 0.25}]}
    lines = format_runs(runs, {"base_top1": "base", "AP": "AP"}, published={"full": "23.7", "older": ""}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])]
    assert cells[0] == ["", "base", "AP", "the paper's AP"]
    assert cells[1:] == [["full", "55.0 ± 5.0", "71.0 ± 1.0", "23.7"], ["older", "25.0 ± 0.0", "", ""]]


def test_base_names_of_the_ensemble_are_those_of_training(tmp_path):
    cfg = miniworld_config(CONFIGS / "plus" / "ensemble-base-novel.yaml", tmp_path)
    assert GeometricEnsemble.from_config(cfg).base_names == {NAMES[index] for index in BASE}


def test_ablations_refuse_unknown_rows(tmp_path):
    with pytest.raises(ValueError, match=r"--rows: expected some of RegionSpot-mini, .*; got plus/nothing"):
        COMMANDS["ablations"].call("--output", tmp_path, "--rows", "RegionSpot-mini", "plus/nothing")
    assert not any(tmp_path.iterdir())
