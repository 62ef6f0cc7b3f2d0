"""datasets/prepare_*.py on small generated inputs in the official formats."""

import importlib
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from regionspot.data.datasets import JsonDataset
from regionspot.data.datasets.builtin import odinw_paths
from regionspot_cli.prepare import PREPARE

SIZES = {"00ff": (40, 30), "0a00": (64, 48), "beef": (33, 21)}
CLASSES = '/m/0b,Tortoise\n/m/0a,Container\n/m/09,"Bow, and arrow"\n'
HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
ROWS = [
    "beef,xclick,/m/0a,1,0.1,0.5,0.25,0.75,0,0,0,0,0",
    "00ff,xclick,/m/09,1,0,1,0,1,0,0,1,0,0",
    "beef,activemil,/m/0b,1,0.333333,0.666667,0,0.5,-1,-1,-1,-1,-1",
    "0a00,xclick,/m/0a,1,0.5,0.5,0.1,0.2,0,0,0,0,0",
]


@pytest.fixture
def prepare_openimages():
    """The module, which imports pandas: only where these tests run."""
    return importlib.import_module("regionspot_cli.prepare_openimages")


@pytest.fixture
def openimages(tmp_path):
    """A root with the validation split of OpenImages in its official format."""
    directory = tmp_path / "openimages"
    (directory / "validation").mkdir(parents=True)
    (directory / "class-descriptions-boxable.csv").write_text(CLASSES)
    (directory / "validation-annotations-bbox.csv").write_text("\n".join([HEADER, *ROWS]) + "\n")
    for name, size in SIZES.items():
        Image.new("RGB", size).save(directory / "validation" / f"{name}.jpg")
    return tmp_path


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """Let processes be forked, which takes less time than importing pandas again."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)


def convert(root, *arguments):
    PREPARE["openimages"].call("--root", str(root), "--splits", "val", "--workers", "1", *arguments)
    return json.loads((root / "openimages" / "openimages_v6_val.json").read_text())


def left_over(root):
    return [path for path in root.rglob("*") if path.name.endswith(".tmp")]


def test_openimages_becomes_coco_json(openimages, capsys):
    content = convert(openimages)
    assert content["images"] == [
        {"id": index, "file_name": f"{name}.jpg", "width": width, "height": height}
        for index, (name, (width, height)) in enumerate(sorted(SIZES.items()), 1)
    ]
    assert [(c["id"], c["name"]) for c in content["categories"]] == [
        (1, "Tortoise"), (2, "Container"), (3, "Bow, and arrow")
    ]  # fmt: skip
    keys = ("id", "image_id", "category_id", "iscrowd", "bbox", "area")
    assert [tuple(a[key] for key in keys) for a in content["annotations"]] == [
        (1, 3, 2, 0, [3.3, 5.25, 13.2, 10.5], 138.6),
        (2, 1, 3, 1, [0, 0, 40, 30], 1200),
        (3, 3, 1, 0, [11, 0, 11, 10.5], 115.5),
        (4, 2, 2, 0, [32, 4.8, 0, 4.8], 0),
    ]
    assert "3 images, 4 boxes (1 of groups, 1 without area), 3 classes" in capsys.readouterr().out
    dataset = JsonDataset(
        openimages / "openimages" / "openimages_v6_val.json", openimages / "openimages" / "validation"
    )
    assert all(Path(record["file_name"]).is_file() for record in dataset) and not left_over(openimages)


def test_chunks_and_processes_make_the_same_file(openimages, prepare_openimages, monkeypatch):
    expected = convert(openimages)
    (openimages / "openimages" / "image_sizes_validation.npz").unlink()
    monkeypatch.setattr(prepare_openimages, "CHUNK", 1)
    assert convert(openimages, "--workers", "2") == expected


def test_rotated_images_have_their_displayed_size(openimages, prepare_openimages):
    exif = Image.Exif()
    exif[prepare_openimages.ORIENTATION] = 6
    Image.new("RGB", (40, 30)).save(openimages / "openimages" / "validation" / "00ff.jpg", exif=exif)
    assert (convert(openimages)["images"][0]["width"], convert(openimages)["images"][0]["height"]) == (30, 40)


def test_interrupted_reading_of_headers_resumes(openimages, prepare_openimages, monkeypatch):
    read, paths = prepare_openimages.read_header, []

    def interrupted(path):
        if len(paths) == 2:
            raise KeyboardInterrupt
        paths.append(Path(path).stem)
        return read(path)

    monkeypatch.setattr(prepare_openimages, "read_header", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(openimages)
    assert not (openimages / "openimages" / "openimages_v6_val.json").exists() and not left_over(openimages)
    monkeypatch.setattr(prepare_openimages, "read_header", lambda path: paths.append(Path(path).stem) or read(path))
    content = convert(openimages)
    assert paths == sorted(SIZES) and len(content["images"]) == 3  # each was read once
    assert convert(openimages) == content and len(paths) == 3


def test_sizes_are_saved_while_reading(openimages, prepare_openimages, monkeypatch):
    directory, cache = openimages / "openimages" / "validation", openimages / "cache.npz"
    written = []
    monkeypatch.setattr(prepare_openimages, "write_sizes", lambda _, __, sizes: written.append((sizes > 0).sum() // 2))
    prepare_openimages.read_sizes(directory, np.array(sorted(SIZES)), cache, interval=-1)
    assert written == [1, 2, 3, 3]


def test_missing_and_damaged_images_can_be_skipped(openimages, capsys):
    directory = openimages / "openimages" / "validation"
    (directory / "00ff.jpg").unlink()
    (directory / "beef.jpg").write_bytes(b"no image")
    with pytest.raises(FileNotFoundError, match=r"2 of 3 images .* 00ff.jpg, beef.jpg \(damaged\).*--skip-missing"):
        convert(openimages)
    content = convert(openimages, "--skip-missing")
    assert "left out" in capsys.readouterr().out
    assert [image["id"] for image in content["images"]] == [2] and len(content["annotations"]) == 1
    for name in ("00ff", "beef"):
        Image.new("RGB", SIZES[name]).save(directory / f"{name}.jpg")
    assert len(convert(openimages)["annotations"]) == 4  # what was missing is looked for again


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("validation-annotations-bbox.csv", "/m/0b", "/m/zz", r"1 label names are not in .*\(/m/zz\)"),
        ("validation-annotations-bbox.csv", "0.333333", "333.0", "line 4: expected sides as fractions"),
        ("validation-annotations-bbox.csv", "0.333333", "nan", "expected OpenImages' columns"),
        ("validation-annotations-bbox.csv", "0.333333", "", "expected OpenImages' columns"),
        ("validation-annotations-bbox.csv", "XMin", "Left", "expected OpenImages' columns"),
        ("class-descriptions-boxable.csv", ",Container", "", "expected lines 'LabelName,name'"),
        ("class-descriptions-boxable.csv", "/m/0a", "/m/0b", "each LabelName once"),
    ],
)
def test_csvs_of_another_format_are_refused(openimages, file, old, new, message):
    path = openimages / "openimages" / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message) as caught:
        convert(openimages)
    assert file in str(caught.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{file}: no such file"):
        convert(openimages)


def test_benchmark_converts_official_csvs(tmp_path, prepare_openimages):
    (tmp_path / "openimages").mkdir()
    prepare_openimages.generate(tmp_path / "openimages", 1000)
    PREPARE["openimages"].call("--root", str(tmp_path), "--splits", "train")
    dataset = JsonDataset(tmp_path / "openimages" / "openimages_v6_train.json", tmp_path)
    assert (len(dataset), len(dataset.boxes), len(dataset.class_names)) == (119, 1000, 601)


def write_lvis(root, directories):
    images = [
        {
            "id": 10 + index,
            "coco_url": f"http://images.cocodataset.org/{directory}/{index:012d}.jpg",
            "height": 20,
            "width": 30,
            "neg_category_ids": [2],
            "not_exhaustive_category_ids": [1],
        }
        for index, directory in enumerate(directories)
    ]
    annotations = [
        {"id": k, "image_id": 10 + k % len(directories), "category_id": 1, "bbox": [1.25, 2, 3, 4], "area": 9.5,
         "segmentation": [[1.05, 2, 3, 4, 5, 6]]}
        for k in range(2 * len(directories))
    ]  # fmt: skip
    categories = [{"id": i, "name": f"c{i}", "frequency": "r", "synset": f"c.n.0{i}"} for i in (1, 2)]
    content = {"info": {"v": 1}, "images": images, "annotations": annotations, "categories": categories, "licenses": []}
    (root / "lvis").mkdir(parents=True)
    (root / "lvis" / "lvis_v1_val.json").write_text(json.dumps(content))
    return content


def test_minival_is_val_in_val2017(tmp_path, capsys):
    content = write_lvis(tmp_path, ["val2017", "train2017", "val2017"])
    PREPARE["lvis_minival"].call("--root", str(tmp_path))
    output = capsys.readouterr().out
    assert "warning: expected 4,809 images of LVIS v1, got 2" in output and "2 images, 4 boxes, 2 classes" in output
    minival = json.loads((tmp_path / "lvis" / "lvis_v1_minival.json").read_text())
    assert minival == {
        **content,
        "images": [image for image in content["images"] if image["id"] != 11],
        "annotations": [annotation for annotation in content["annotations"] if annotation["image_id"] != 11],
    }
    assert not left_over(tmp_path)


def test_minival_of_another_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="lvis_v1_val.json: no such file"):
        PREPARE["lvis_minival"].call("--root", str(tmp_path))
    write_lvis(tmp_path, ["train2017"])
    with pytest.raises(ValueError, match="none of its 1 images has a coco_url in val2017"):
        PREPARE["lvis_minival"].call("--root", str(tmp_path))
    assert [path.name for path in (tmp_path / "lvis").iterdir()] == ["lvis_v1_val.json"]


def roboflow(directory, name, first=("fish", "none"), used=1, num_images=2):
    directory.mkdir(parents=True, exist_ok=True)
    for index in range(num_images):
        Image.new("RGB", (9, 8)).save(directory / f"{index}.jpg")
    categories = [(0, *first), (1, "fish", "fish"), (2, "puffin", "fish")]
    content = {
        "info": {"year": "2020"},
        "categories": [{"id": i, "name": n, "supercategory": s} for i, n, s in categories],
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 8, "width": 9} for i in range(num_images)],
        "annotations": [
            {"id": 0, "image_id": 0, "category_id": used, "bbox": [1, 1, 2, 2], "area": 4, "segmentation": [],
             "iscrowd": 0}
        ],
    }  # fmt: skip
    (directory / name).write_text(json.dumps(content))
    return content


def test_odinw_from_roboflow_files(tmp_path, capsys):
    paths = odinw_paths(tmp_path)
    aquarium, pothole, pistols = (paths[f"odinw_{name}"] for name in ("Aquarium_test", "pothole_val", "pistols_train"))
    content = roboflow(aquarium[1], "_annotations.coco.json")
    roboflow(pothole[1], "_annotations.coco.json", used=0)
    roboflow(pistols[1], pistols[0].name)
    (pistols[1] / "1.jpg").unlink()
    PREPARE["odinw"].call("--root", str(tmp_path))
    output = capsys.readouterr().out
    made = json.loads(aquarium[0].read_text())
    assert made == {**content, "categories": content["categories"][1:]}
    assert "odinw_Aquarium_test: 2 images, 1 boxes, 2 classes (made now)" in output
    assert len(json.loads(pothole[0].read_text())["categories"]) == 3  # category 0 has a box
    assert "odinw_pistols_train: 2 images, 1 boxes, 3 classes; 1 images are missing, such as" in output
    assert output.count("annotations_without_background.json") == 39 - 3 and "odinw_Raccoon_val: " in output
    before = aquarium[0].stat().st_mtime_ns
    PREPARE["odinw"].call("--root", str(tmp_path))
    assert aquarium[0].stat().st_mtime_ns == before and not left_over(tmp_path)
    assert "odinw_Aquarium_test" in DatasetCatalog


def test_invalid_odinw_is_reported_and_not_written(tmp_path, capsys):
    paths = odinw_paths(tmp_path)
    (json_file, directory), (other, other_directory) = paths["odinw_Raccoon_val"], paths["odinw_pothole_val"]
    roboflow(directory, "_annotations.coco.json", used=9)
    roboflow(other_directory, "_annotations.coco.json")
    (other_directory / "_annotations.coco.json").write_text("{")
    with pytest.raises(SystemExit):
        PREPARE["odinw"].call("--root", str(tmp_path))
    output = capsys.readouterr().out
    assert "odinw_Raccoon_val: annotations" in output and "category id 9" in output
    assert "odinw_pothole_val: annotations" in output and "expected Roboflow's COCO JSON" in output
    assert not json_file.exists() and not other.exists() and not left_over(tmp_path)


@pytest.mark.parametrize("command", PREPARE.values(), ids=PREPARE)
def test_help(command, capsys):
    with pytest.raises(SystemExit):
        command.call("--help")
    assert "--root" in capsys.readouterr().out
