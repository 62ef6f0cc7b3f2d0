"""regionspot predict: inputs that outputs must not touch, and regions that are of other images."""

import json
from pathlib import Path

import pytest
from PIL import Image

from regionspot.prediction.sources import list_images
from regionspot_cli.commands import COMMANDS

from ..helpers import NAMES, TINY, draw_scene, write_dataset

BOXES = [[3, 30, 60, 40], [8, 5, 30, 20]]


def predict(inputs, output, *options):
    arguments = ["--config-file", TINY, "--input", inputs, "--output", output, "--vocabulary", ",".join(NAMES)]
    COMMANDS["predict"].call(*arguments, "--workers", 0, *options)


def files(output):
    return {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(draw_scene(i)[0]).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("0.json", ["--boxes", "{}", "--format", "json"]),
        ("labelme/0.json", ["--regions", "{}", "--format", "labelme"]),
        ("labelme/0.json", ["--regions", "out/labelme", "--format", "json,labelme"]),
        ("labelme/0.json", ["--regions", "out/labelme", "--format", "labelme", "--output", "photos/../link"]),
        ("annotations.json", ["--input", "{}:photos", "--regions", "gt", "--format", "coco"]),
        ("regions.csv", ["--input", "@{}", "--boxes", "1,2,30,40", "--format", "csv"]),
        ("predict_summary.json", ["--vocabulary", "@{}", "--boxes", "1,2,30,40", "--format", "csv"]),
    ],
)
def test_outputs_never_overwrite_inputs(photos, tmp_path, monkeypatch, file, options):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    path = tmp_path / "out" / file
    path.parent.mkdir(parents=True)
    if file == "annotations.json":
        write_dataset(tmp_path / "data", 1).replace(path)
        (tmp_path / "data" / "images" / "0.png").replace(photos / "0.png")
    elif file == "regions.csv":
        path.write_text("photos/0.png\n")
    elif file == "predict_summary.json":
        path.write_text('["cup", "spoon"]')
    elif "labelme" in file:
        points = {"label": "cup", "shape_type": "rectangle", "points": [[1, 2], [30, 40]]}
        path.write_text(json.dumps({"imagePath": "0.png", "imageHeight": 48, "imageWidth": 64, "shapes": [points]}))
    else:
        path.write_text(json.dumps(BOXES))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="an output would overwrite the input .*give another directory"):
        predict("photos", "out", *(option.format(f"out/{file}") for option in options))
    assert path.read_bytes() == before and files(tmp_path / "out") == {file}


@pytest.mark.parametrize("regions", ["labels", "labels/data.yaml"])
def test_output_in_a_directory_of_regions_is_refused(photos, tmp_path, monkeypatch, regions):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "0.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "labels" / "data.yaml").write_text("names: [cup]\n")
    for output in ("labels", "labels/out"):
        with pytest.raises(ValueError, match="--output .*: it is in the directory of regions labels, .*another"):
            predict("photos", output, "--regions", regions, "--format", "json")


def test_interrupted_overwrite_claims_nothing(photos, tmp_path, monkeypatch):
    output, boxes = tmp_path / "out", ("--boxes", "3,30,60,40")
    predict(photos, output, *boxes, "--format", "json")

    def interrupt(path, missing_ok=False):
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(Path, "unlink", interrupt)
        predict(photos, output, *boxes, "--format", "json,drawing", "--overwrite")
    (output / "0.json").unlink()
    predict(photos, output, *boxes, "--format", "json")
    assert (output / "0.json").is_file()


def test_overwrite_removes_what_the_earlier_run_wrote(photos, tmp_path):
    output = tmp_path / "out"
    boxes = ("--boxes", "3,30,60,40;8,5,30,20")
    predict(photos, output, *boxes, "--format", "drawing,json,labelme,yolo,crops,csv")
    assert {"2.png", "2.json", "labelme/2.json", "yolo/labels/2.txt", "regions.csv"} <= files(output)
    (output / "notes.txt").write_text("mine")
    (output / "labelme" / "notes.json").write_text("mine, too")
    (photos / "2.png").unlink()
    # an image of the new run, which the earlier one has drawn
    predict(output / "1.png", output, *boxes, "--format", "json", "--overwrite")
    left = {name for name in files(output) if not name.startswith(".")}
    own = {"notes.txt", "labelme/notes.json", "yolo/data.yaml"}  # the last is not of an image
    assert left == {"1.png", "1.json", "predict_summary.json", *own}


def test_annotations_of_another_size_cost_the_image(photos, tmp_path):
    path = write_dataset(tmp_path / "data", 3)
    content = json.loads(path.read_text())
    content["images"][1] |= {"height": 64, "width": 48}
    path.write_text(json.dumps(content))
    predict(f"{path}:{tmp_path / 'data' / 'images'}", tmp_path / "out", "--regions", "gt", "--format", "json")
    [failed] = json.loads((tmp_path / "out" / "predict_summary.json").read_text())["unreadable"]
    assert failed["image"] == "1.png" and "height and width (64, 48), got (48, 64)" in failed["reason"]
    assert {"0.json", "2.json"} <= files(tmp_path / "out")


@pytest.mark.parametrize("option", ["--boxes", "--regions"])
def test_name_of_several_images_is_refused(photos, tmp_path, option):
    (photos / "more").mkdir()
    Image.fromarray(draw_scene(3)[0]).save(photos / "more" / "0.png")
    file = tmp_path / "boxes.json"
    rows = {
        "images": [{"id": 1, "file_name": "0.png", "height": 48, "width": 64}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 20]}],
    }
    file.write_text(json.dumps({"0.png": BOXES} if option == "--boxes" else rows))
    assert len(list_images([str(photos)])) == 4
    with pytest.raises(ValueError, match=r"0\.png.*photos/0\.png and .*photos/more/0\.png"):
        predict(photos, tmp_path / "out", option, file, "--format", "json")
    assert not (tmp_path / "out").exists() or not files(tmp_path / "out")
    if option == "--boxes":  # by their paths
        file.write_text(json.dumps({"0.png": BOXES, "more/0.png": BOXES[:1]}))
        predict(photos, tmp_path / "out", option, file, "--format", "json")
        contents = [json.loads((tmp_path / "out" / name).read_text()) for name in ("0.json", "more/0.json")]
        assert [len(content["regions"]) for content in contents] == [2, 1]
