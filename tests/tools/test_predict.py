"""`regionspot predict` as a user runs it."""

import json

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes
from PIL import Image
from pycocotools import mask as mask_api

from regionspot.checkpoint.checkpointer import load_model
from regionspot.checkpoint.fetch import hub_file
from regionspot.config import load_config
from regionspot.prediction.regions import parse_points
from regionspot_cli.commands import COMMANDS
from regionspot_cli.weights import leave_absent_weights

from ..helpers import NAMES, ROOT, TINY, draw_scene, frozen_overrides, tiny_config, tiny_model, write_frozen_parts
from ..processes import run_program

OWN_DIRECTORY = "the directory of the image"
BOXES = "-3,30,60,40;8,5,30,20"


@pytest.fixture
def image(tmp_path):
    Image.fromarray(draw_scene(0)[0]).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


def run(image, *arguments):
    output = image.parent / "out"
    with pytest.raises(SystemExit) as ended:
        COMMANDS["predict"].run(
            ["--config-file", str(TINY), "--input", str(image), "--output", str(output), *arguments]
        )
    return ended.value.code, output


def as_regions(image, boxes):
    pixels = torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)
    return [pixels], [Boxes(torch.tensor([[float(x) for x in box.split(",")] for box in boxes.split(";")]))]


def test_image_and_json_output(image, capsys):
    code, output = run(image, "--boxes", BOXES, "--vocabulary", ",".join(NAMES))
    assert code == 0
    content = json.loads((output / "scene.json").read_text())
    assert list(content) == ["image", "height", "width", "vocabulary", "regions"]
    assert (content["image"], content["height"], content["width"], content["vocabulary"]) == (str(image), 48, 64, NAMES)
    assert [region["box"] for region in content["regions"]] == [[0, 30, 60, 40], [8, 5, 30, 20]]
    for region in content["regions"]:
        assert list(region) == ["box", "label", "class_index", "score", "iou", "logits", "mask"]
        logits = np.array(region["logits"])
        assert region["class_index"] == logits.argmax() and region["label"] == NAMES[logits.argmax()]
        assert region["score"] == pytest.approx(np.exp(logits).max() / np.exp(logits).sum(), abs=1e-5)
        assert mask_api.decode(region["mask"]).shape == (48, 64)
    assert Image.open(output / "scene.png").size == (64, 48)
    assert "MEAN NOTHING" in capsys.readouterr().out


def test_baseline_without_weights_of_regionspot(image, capsys, tmp_path):
    """SAM and CLIP have weights, RegionSpot has none: CLIP on mask crops names the regions, and the output says so."""
    write_frozen_parts(tiny_model().recognizer, tmp_path)
    frozen = frozen_overrides(tmp_path)
    code, output = run(image, "--boxes", BOXES, "--vocabulary", ",".join(NAMES), *frozen)
    printed = capsys.readouterr().out
    assert code == 0 and printed.count("CLIP ON MASK CROPS") == 2 and "MEAN NOTHING" not in printed
    baseline = ("MODEL.META_ARCHITECTURE", "CropBaseline", "MODEL.REGIONSPOT.CROP.MASKED", True)
    model = load_model(tiny_config(*baseline, *frozen))
    model.set_vocabulary(NAMES)
    [expected] = model.recognizer.recognize(*as_regions(image, BOXES))
    regions = json.loads((output / "scene.json").read_text())["regions"]
    assert [region["class_index"] for region in regions] == expected.regions.top_classes[:, 0].tolist()
    np.testing.assert_allclose([region["score"] for region in regions], expected.regions.top_scores[:, 0], atol=1e-5)


def test_absent_weights_are_not_fetched(image, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("REGIONSPOT_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *_, **__: pytest.fail("fetched"))
    known = ("MODEL.REGIONSPOT.CLIP.WEIGHTS", "ViT-B/16")
    code, _ = run(image, "--boxes", BOXES, "--vocabulary", "a", "--cached-weights-only", *known)
    printed = capsys.readouterr().out
    assert code == 0 and "MEAN NOTHING" in printed and "CLIP ViT-B/16 (351 MB) are fetched" in printed


def test_absent_tokenizer_is_named_before_the_model_is_built(image, tmp_path, monkeypatch):
    monkeypatch.setenv("REGIONSPOT_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.OpenerDirector.open", lambda *_, **__: pytest.fail("fetched"))
    cfg = load_config(ROOT / "configs" / "models" / "SigLIP-B16.yaml")
    with pytest.raises(FileNotFoundError, match=r"tokenizer of ViT-B-16-SigLIP .*: .*/tokenizer.json, .*config.json"):
        leave_absent_weights(cfg)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = hub_file("timm/ViT-B-16-SigLIP", name).path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert "CLIP ViT-B-16-SigLIP/webli" in leave_absent_weights(cfg)


def test_boxes_from_files_points_and_overrides(image):
    boxes = image.parent / "boxes.json"
    for content in ([[8, 5, 30, 20]], {"scene.png": [[8, 5, 30, 20]], "other.png": []}):
        boxes.write_text(json.dumps(content))
        code, output = run(
            image,
            "--boxes",
            str(boxes),
            "MODEL.REGIONSPOT.VOCABULARY",
            "zebra,cup",
            "MODEL.REGIONSPOT.SCORE_FUNCTION",
            "sigmoid",
        )
        content = json.loads((output / "scene.json").read_text())
        assert code == 0 and content["vocabulary"] == ["zebra", "cup"]
        [region] = content["regions"]
        assert region["score"] == pytest.approx(1 / (1 + np.exp(-max(region["logits"]))), abs=1e-5)
    code, output = run(image, "--points", "10,10 50,40,0;30,20", "--vocabulary", "zebra,cup")
    assert code == 0 and len(json.loads((output / "scene.json").read_text())["regions"]) == 2


def test_names_with_dollars_and_braces_are_drawn(image):
    code, output = run(image, "--boxes", BOXES, "--vocabulary", "$5 {bill$,{},ünï")
    assert code == 0 and (output / "scene.png").is_file()


def test_sixteen_bit_image_is_recognized(image):
    Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64)).save(image)
    assert run(image, "--boxes", BOXES, "--vocabulary", "a")[0] == 0


def test_former_script_works(image):
    arguments = ("--config-file", TINY, "--input", image, "--boxes", BOXES, "--vocabulary", "a,b", "--output", "old")
    output = run_program(image.parent, ROOT / "tools" / "demo.py", *arguments)
    assert "is now tools/predict.py" in output and (image.parent / "old" / "scene.png").is_file()


def test_points_are_parsed_and_padded():
    points, labels = parse_points("10,10 50,40,0;30,20")
    assert points.tolist() == [[[10, 10], [50, 40]], [[30, 20], [0, 0]]] and labels.tolist() == [[1, 0], [1, -1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--boxes", "1,2,3", "--vocabulary", "a"], "four numbers a box"),
        (["--boxes", "1,2,3,x", "--vocabulary", "a"], "expected numbers"),
        (["--boxes", ";", "--vocabulary", "a"], "no boxes; expected at least one"),
        (["--boxes", "5,5,2,2", "--vocabulary", "a"], "no area"),
        (["--boxes", "nan,5,9,9", "--vocabulary", "a"], "NaN"),
        (["--boxes", "500,500,600,600", "--vocabulary", "a"], "outside the image"),
        (["--boxes", "no.json", "--vocabulary", "a"], "no.json: no such file"),
        (["--points", "1", "--vocabulary", "a"], "x,y"),
        (["--points", "5,5,0.5", "--vocabulary", "a"], "label 1"),
        (["--boxes", BOXES, "--vocabulary", "a", "--output", OWN_DIRECTORY], "would overwrite the input"),
        (["--boxes", BOXES, "--vocabulary", "a", "MODEL.DEVICE", "cuda"], "no CUDA"),
        (["--boxes", BOXES], "no class names"),
        (["--boxes", BOXES, "--vocabulary", "@no.txt"], "no such file"),
        (["--boxes", BOXES, "--vocabulary", "a", "--input", "no.png"], "no.png: no such file"),
        (["--boxes", BOXES, "--vocabulary", "a", "--input", __file__], "cannot be read"),
        (["--boxes", BOXES, "--vocabulary", "a", "--config-file", "no.yaml"], "no.yaml"),
        (["--boxes", BOXES, "--vocabulary", "a", "MODEL.WEIGHTS", "no.pth"], "no.pth"),
        (["--boxes", BOXES, "--vocabulary", "a", "MODEL.NO_KEY", "1"], "NO_KEY"),
    ],
)
def test_wrong_input_gives_one_line_and_no_output(image, capsys, arguments, message):
    code, output = run(image, *(str(image.parent) if a is OWN_DIRECTORY else a for a in arguments))
    error = capsys.readouterr().err
    assert code == 1 and message in error.splitlines()[-1] and error.splitlines()[-1].startswith("error: ")
    assert not output.exists() or not list(output.iterdir())
