"""`regionspot visualize` as a user runs it: what is drawn, and where."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes
from PIL import Image

from regionspot.data.tokens import TokenStore
from regionspot.data.tokens.writer import StoreWriter
from regionspot.engine.extract import Extraction, extract_tokens
from regionspot_cli import visualize
from regionspot_cli.commands import COMMANDS

from ..helpers import NAMES, TINY, draw_scene, frozen_overrides, tiny_model, write_dataset, write_frozen_parts

BOXES = "5,5,25,25;30,10,50,30;40,20,60,44"


@pytest.fixture
def files(tmp_path):
    """A directory with an image and the frozen weights of a tiny model."""
    Image.fromarray(draw_scene(0)[0]).save(tmp_path / "scene.png")
    write_frozen_parts(tiny_model().recognizer, tmp_path)
    return tmp_path


@pytest.fixture
def sheets(monkeypatch):
    """The cells of the sheets that are drawn."""
    cells, draw = [], visualize.draw_sheet

    def record(own, columns):
        cells.append(own)
        return draw(own, columns)

    monkeypatch.setattr(visualize, "draw_sheet", record)
    return cells


def run(files, kind, *arguments):
    image = ["--config-file", TINY, "--input", files / "scene.png", "--boxes", BOXES]
    options = [kind, *image, "--output", files / "out" / "sheet.png", *arguments, *frozen_overrides(files)]
    COMMANDS["visualize"].call(*options)
    return Image.open(files / "out" / "sheet.png")


def test_attention_of_chosen_regions(files, sheets):
    sheet = run(files, "attention", "--regions", "3,1", "--vocabulary", ",".join(NAMES))
    [cells] = sheets
    titles = [title for _, title in cells]
    assert titles[0] == "scene.png" and [title.split(":")[0] for title in titles[1:]] == ["region 3", "region 1"]
    assert all(any(name in title for name in NAMES) for title in titles[1:])
    assert sheet.width == 1500 and sheet.height > 300
    all_maps = [np.array(drawing) for drawing, _ in cells[1:]]
    sheets.clear()
    run(files, "attention")
    [cells] = sheets
    assert [title for _, title in cells[1:]] == ["region 1", "region 2", "region 3"]
    assert np.array_equal(cells[3][0], all_maps[0])  # alone in the sheet, but not in the image


def test_models_side_by_side(files, sheets):
    run(files, "compare", "--vocabulary", ",".join(NAMES), "--crops", "box,mask", "--other-weights", "")
    [cells] = sheets
    assert [title for _, title in cells] == ["tiny, no weights", "CLIP on box crops", "CLIP on mask crops"]
    sheets.clear()
    state = tiny_model("SEED", 3).recognizer.knowledge_integration.state_dict()
    torch.save({"model": {f"recognizer.knowledge_integration.{k}": v for k, v in state.items()}}, files / "other.pth")
    run(files, "compare", "--vocabulary", ",".join(NAMES), "--other-weights", files / "other.pth")
    assert [title for _, title in sheets[0]] == ["tiny, no weights", "tiny, other.pth"]


def test_names_are_the_recognizers(files):
    recognizer = tiny_model().recognizer
    image, boxes, _ = draw_scene(0)
    names = visualize.recognize(recognizer, image, boxes)
    [result] = recognizer.recognize([torch.from_numpy(image).permute(2, 0, 1)], [Boxes(torch.from_numpy(boxes))])
    best = result.regions.top_classes[:, 0].tolist()
    scores = result.regions.top_scores[:, 0].tolist()
    assert names == [f"{NAMES[label]} {score:.0%}" for label, score in zip(best, scores)]


def test_regions_of_a_store(tmp_path, register, sheets):
    name = register("test_visualize", write_dataset(tmp_path / "data", 4), tmp_path / "data" / "images")
    extract_tokens(tiny_model().recognizer, name, tmp_path / "store", Extraction(), show_progress=False)
    common = ["tokens", tmp_path / "store", "--dataset", name, "--output", tmp_path / "sheet.png"]
    COMMANDS["visualize"].call(*common)
    COMMANDS["visualize"].call(*common, "--image-ids", 3)
    first, second = sheets
    store = TokenStore(tmp_path / "store")
    counts = [len(store.regions(image_id)[0]) for image_id in (1, 2, 3, 4)]
    expected = [f"image {i}: {n} regions stored, {n} annotated" for i, n in enumerate(counts, 1)]
    assert [title for _, title in first] == expected and [title for _, title in second] == [expected[2]]
    with pytest.raises(KeyError, match="no image 9"):
        COMMANDS["visualize"].call(*common, "--image-ids", 9)
    StoreWriter(tmp_path / "empty", {**store.manifest, "shards": []}, 0).finish()
    with pytest.raises(ValueError, match="the token store has no images"):
        COMMANDS["visualize"].call("tokens", tmp_path / "empty", *common[2:])


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("attention", ["--regions", "4"], "--regions: expected numbers from 1 to 3, got 4"),
        ("attention", ["--boxes", "1,2,3"], "--boxes: expected four numbers a box"),
        ("attention", ["--boxes", "90,90,95,95"], "--boxes"),
        ("attention", ["--input", "none.png"], "image none.png: no such file"),
        ("attention", ["MODEL.REGIONSPOT.CLIP.FEATURES", "none"], "no feature map to attend to"),
        ("compare", [], "vocabulary"),
    ],
)
def test_mistakes_are_one_error(files, kind, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(files, kind, *arguments)
    assert not (files / "out").exists()


def test_wrong_options_end_the_process(files):
    for arguments in (["--regions", "one"], ["--crops", "box"]):  # --crops is of compare
        with pytest.raises(SystemExit):
            run(files, "attention", *arguments)
