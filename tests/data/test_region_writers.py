"""What writers write: labeling tools' formats and tables, which the readers of regions read back."""

import csv
import json
import os
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pycocotools.mask as mask_api
import pytest
from PIL import Image
from pycocotools.coco import COCO

from regionspot.data.region_formats import read_regions
from regionspot.data.region_writers import (
    CropWriter,
    LabelmeWriter,
    YoloWriter,
    write_coco_dataset,
    write_coco_results,
    write_table,
)
from regionspot.data.region_writers.image_writers import safe_file_name
from regionspot.data.region_writers.polygons import rle_polygons
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot_cli.commands import COMMANDS

NAMES = ["cup", 'a "big", spoon', "猫/cat", "$x$"]
SIZE = (60, 80)
IMAGES = ["a/my cup.jpg", "b/my cup.jpg", "ünï.png", "empty.jpg"]


def make_mask(rng, box):
    """A mask that touches all sides of the box of whole pixels, with a hole."""
    x0, y0, x1, y1 = box
    mask = np.zeros(SIZE, np.uint8)
    rows, columns = np.mgrid[y0:y1, x0:x1]
    inside = ((columns + 0.5 - (x0 + x1) / 2) / ((x1 - x0) / 2)) ** 2 + (
        (rows + 0.5 - (y0 + y1) / 2) / ((y1 - y0) / 2)
    ) ** 2 <= 1.05
    mask[y0:y1, x0:x1] = inside
    return mask


def make_regions(seed, num_regions=4):
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 40, (num_regions, 2))
    boxes = np.concatenate([low, low + rng.integers(8, 20, (num_regions, 2))], axis=1)
    masks = [make_mask(rng, box) for box in boxes.tolist()]
    rles = [mask_api.encode(np.asfortranarray(mask)) for mask in masks]
    classes = np.arange(num_regions) % len(NAMES)
    return SimpleNamespace(
        boxes=(boxes + rng.uniform(0, 1, boxes.shape)).astype(np.float32),
        classes=classes,
        class_names=[NAMES[label] for label in classes],
        scores=rng.uniform(0, 1, num_regions).astype(np.float32),
        unknown=np.zeros(num_regions, bool),
        rles=[{"size": rle["size"], "counts": rle["counts"].decode()} for rle in rles],
        masks=masks,
    )


@pytest.fixture
def images():
    return {name: make_regions(index, 0 if name == "empty.jpg" else 4) for index, name in enumerate(IMAGES)}


def as_dicts(images, first_id=11):
    for image_id, (name, regions) in enumerate(images.items(), first_id):
        yield {
            "name": name,
            "image_id": image_id,
            "height": SIZE[0],
            "width": SIZE[1],
            "error": None,
            "boxes": regions.boxes.tolist(),
            "classes": regions.classes.tolist(),
            "class_names": regions.class_names,
            "scores": regions.scores.tolist(),
            "unknown": regions.unknown.tolist(),
            "predicted_ious": [0.5] * len(regions.boxes),
            "masks": [rle["counts"] for rle in regions.rles],
            "embeddings": [[0.25, float(row)] for row in range(len(regions.boxes))],
        }


def write_all(writer, images):
    for name, regions in images.items():
        writer.write(name, SIZE, regions, image=np.zeros((*SIZE, 3), np.uint8))
    writer.finish()


def read_all(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def check_round_trip(source, images, atol=0.0, with_scores=True, **options):
    regions = read_regions(source, **options)
    for name, expected in images.items():
        actual = regions.regions_of(name, SIZE)
        np.testing.assert_allclose(actual.boxes, expected.boxes, rtol=0, atol=atol)
        assert actual.labels == expected.class_names
        if with_scores:
            np.testing.assert_array_equal(actual.scores, expected.scores)
    return regions


@pytest.mark.parametrize("writer", [LabelmeWriter, YoloWriter, CropWriter])
def test_writing_again_gives_the_same_bytes(tmp_path, images, writer):
    write_all(writer(tmp_path, NAMES), images)
    written = read_all(tmp_path)
    write_all(writer(tmp_path, NAMES), images)
    assert read_all(tmp_path) == written and len(written) >= 4


def test_labelme_round_trip(tmp_path, images):
    write_all(LabelmeWriter(tmp_path, NAMES), images)
    assert sorted(read_all(tmp_path)) == ["a/my cup.json", "b/my cup.json", "empty.json", "ünï.json"]
    check_round_trip(tmp_path, images)


def test_labelme_opens_the_image(tmp_path, images):
    record = SimpleNamespace(
        name="a/my cup.jpg", path=str(tmp_path / "photos" / "a" / "my cup.jpg"), stem="a/my cup.jpg"
    )
    writer = LabelmeWriter(tmp_path / "out", NAMES)
    writer(record, np.zeros((*SIZE, 3), np.uint8), images["a/my cup.jpg"])
    target = tmp_path / "out" / "a" / "my cup.jpg.json"
    place = json.loads(target.read_text())["imagePath"]
    assert os.path.normpath(target.parent / place) == record.path
    check_round_trip(target, {record.path: images["a/my cup.jpg"]})


def test_labelme_polygons(tmp_path, images):
    write_all(LabelmeWriter(tmp_path, NAMES, with_masks=True), images)
    content = json.loads((tmp_path / "a" / "my cup.json").read_text())
    for shape, mask in zip(content["shapes"], images["a/my cup.jpg"].masks, strict=True):
        assert shape["shape_type"] == "polygon" and shape["group_id"] is None
        check_polygons([np.ravel(shape["points"]).tolist()], mask)


def check_polygons(polygons, mask, least=0.9):
    drawn = mask_api.decode(mask_api.merge(mask_api.frPyObjects(polygons, *SIZE)))
    iou = (drawn & mask).sum() / (drawn | mask).sum()
    assert iou >= least, iou
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])
    rows, columns = np.nonzero(mask)
    assert points.min(axis=0).tolist() == [columns.min(), rows.min()]
    assert points.max(axis=0).tolist() == [columns.max() + 1, rows.max() + 1]


def test_polygons_of_masks():
    mask = np.zeros(SIZE, np.uint8)
    assert rle_polygons(mask_api.encode(np.asfortranarray(mask))) == []
    mask[10:20, 5:30] = 1
    [polygon] = rle_polygons(mask_api.encode(np.asfortranarray(mask)))
    check_polygons([polygon], mask, 1.0)
    mask[40, 50] = mask[59, 79] = 1
    polygons = rle_polygons(mask_api.encode(np.asfortranarray(mask)))
    assert len(polygons) == 3 and all(len(polygon) >= 6 for polygon in polygons)
    check_polygons(polygons, mask, 1.0)
    mask[12:18, 8:12] = 0  # a hole is filled
    assert rle_polygons(mask_api.encode(np.asfortranarray(mask))) == polygons


def test_yolo_round_trip(tmp_path, images):
    images["a/my cup.jpg"].unknown[1] = True
    write_all(YoloWriter(tmp_path, NAMES, with_scores=True), images)
    assert sorted(read_all(tmp_path)) == [
        "data.yaml",
        *("labels/a/my cup.txt", "labels/b/my cup.txt", "labels/empty.txt", "labels/ünï.txt"),
    ]
    known = images.pop("a/my cup.jpg")
    regions = check_round_trip(tmp_path, images, atol=1e-5, with_scores=False)
    actual = regions.regions_of("a/my cup.jpg", SIZE)
    np.testing.assert_allclose(actual.boxes, known.boxes[[0, 2, 3]], atol=1e-5)
    np.testing.assert_allclose(actual.scores, known.scores[[0, 2, 3]], atol=1e-8)
    assert actual.labels == [NAMES[0], NAMES[2], NAMES[3]]
    write_all(YoloWriter(tmp_path / "train", NAMES), images)
    text = (tmp_path / "train" / "labels" / "ünï.txt").read_text()
    assert all(len(line.split()) == 5 for line in text.splitlines())


def test_crops_are_in_directories_of_their_class(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)
    regions = make_regions(0)
    regions.boxes[0] = [10.2, 5, 30, 20.5]
    regions.boxes[1] = [79.9, 59.9, 80, 60]
    writer = CropWriter(tmp_path, NAMES)
    writer.write("a/my cup.jpg", SIZE, regions, image=image)
    crop = np.asarray(Image.open(tmp_path / "cup" / "a" / "my cup-0000.png"))
    assert (crop == image[5:21, 10:30]).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(safe_file_name, NAMES))
    tiny = np.asarray(Image.open(tmp_path / safe_file_name(NAMES[1]) / "a" / "my cup-0001.png"))
    assert (tiny == image[59:, 79:]).all()
    CropWriter(tmp_path / "wide", NAMES, margin=0.5, suffix=".jpg").write("x.png", SIZE, regions, image=image)
    wide = Image.open(tmp_path / "wide" / "cup" / "x-0000.jpg")
    assert wide.size == (40, 29) and wide.format == "JPEG"  # clipped at the top


def test_names_are_safe_and_stay_different():
    names = ["a/b", "a_b", "a:b", "..", ".", "", "con", "x" * 300, "x" * 301, "a ", "a", "猫", "\ud800"]
    safe = [safe_file_name(name) for name in names]
    assert len(set(safe)) == len(names)
    for name in safe:
        assert name not in ("", ".", "..") and not set(name) & set('/\\:*?"<>|') and len(name) < 100
    assert safe_file_name("wooden table") == "wooden table" and safe[names.index("猫")] == "猫"
    for name in ("../cup.jpg", "/cup.jpg", ""):
        with pytest.raises(ValueError, match="expected a path relative"):
            LabelmeWriter("none", NAMES).write(name, SIZE, make_regions(0))


def test_coco_results_round_trip(tmp_path, images):
    dataset = tmp_path / "dataset.json"
    write_coco_dataset(as_dicts(images), dataset, NAMES)
    write_coco_results(as_dicts(images), tmp_path / "results.json")
    entries = json.loads((tmp_path / "results.json").read_text())
    assert len(entries) == 12 and entries[0]["segmentation"] == images[IMAGES[0]].rles[0]
    images.pop("empty.jpg")
    check_round_trip(tmp_path / "results.json", images, annotations=dataset)
    write_coco_results(as_dicts(images), tmp_path / "ids.json", category_ids=[9, 7, 5, 3])
    assert [entry["category_id"] for entry in json.loads((tmp_path / "ids.json").read_text())[:4]] == [9, 7, 5, 3]


def test_unknown_regions_and_unread_images_are_left_out(tmp_path, images):
    images[IMAGES[0]].unknown[:] = [True, True, True, False]
    unread = {"name": "x.jpg", "image_id": 99, "height": 0, "width": 0, "error": "damaged", "boxes": []}
    unread |= {"classes": [], "class_names": [], "scores": []}
    write_coco_dataset([*as_dicts(images), unread], tmp_path / "dataset.json", NAMES)
    write_coco_results([*as_dicts(images), unread], tmp_path / "results.json")
    content = json.loads((tmp_path / "dataset.json").read_text())
    assert [image["id"] for image in content["images"]] == [11, 12, 13, 14]
    assert len(content["annotations"]) == len(json.loads((tmp_path / "results.json").read_text())) == 9
    write_coco_dataset([], tmp_path / "dataset.json", NAMES)
    assert json.loads((tmp_path / "dataset.json").read_text())["annotations"] == []


def test_coco_dataset_in_pycocotools(tmp_path, images):
    write_coco_dataset(as_dicts(images), tmp_path / "dataset.json", NAMES)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]
    check_round_trip(tmp_path / "dataset.json", images, with_scores=False)
    with redirect_stdout(None):
        coco = COCO(str(tmp_path / "dataset.json"))
    assert [category["name"] for category in coco.loadCats([1, 2, 3, 4])] == NAMES
    masks = [mask for regions in images.values() for mask in regions.masks]
    annotations = coco.loadAnns(sorted(coco.getAnnIds()))
    assert [annotation["id"] for annotation in annotations] == list(range(1, 13))
    for annotation, mask in zip(annotations, masks, strict=True):
        assert (coco.annToMask(annotation) == mask).all() and annotation["area"] == mask.sum()
    assert len(GroundTruth(tmp_path / "dataset.json").image_ids) == 4


def test_coco_dataset_as_polygons_and_boxes(tmp_path, images):
    masks = [mask for regions in images.values() for mask in regions.masks]
    write_coco_dataset(as_dicts(images), tmp_path / "polygons.json", NAMES, segmentation="polygons")
    annotations = json.loads((tmp_path / "polygons.json").read_text())["annotations"]
    for annotation, mask in zip(annotations, masks, strict=True):
        check_polygons(annotation["segmentation"], mask)
    write_coco_dataset(as_dicts(images), tmp_path / "boxes.json", NAMES, segmentation="none")
    annotation = json.loads((tmp_path / "boxes.json").read_text())["annotations"][0]
    x, y, w, h = annotation["bbox"]
    assert annotation["segmentation"] == [[x, y, x + w, y, x + w, y + h, x, y + h]] and annotation["area"] == w * h
    with pytest.raises(ValueError, match="segmentation: expected one of rle, polygons, none, got 'mask'"):
        write_coco_dataset([], tmp_path / "x.json", NAMES, segmentation="mask")


def test_results_evaluate_as_perfect_on_their_dataset(tmp_path, images, capsys):
    write_coco_dataset(as_dicts(images), tmp_path / "dataset.json", NAMES)
    write_coco_results(as_dicts(images), tmp_path / "results.json")
    arguments = ["--annotations", str(tmp_path / "dataset.json"), "--predictions", str(tmp_path / "results.json")]
    with pytest.raises(SystemExit) as ended:
        COMMANDS["evaluate-predictions"].run(arguments)
    assert ended.value.code == 0
    output = capsys.readouterr().out
    rows = [line for line in output.splitlines() if line.startswith(("bbox", "| bbox", "segm", "| segm"))]
    assert len(rows) >= 2 and all("100.0" in row for row in rows[:2]), output


def test_csv_keeps_names_and_numbers(tmp_path, images):
    write_table(as_dicts(images), tmp_path / "regions.csv")
    with (tmp_path / "regions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for row, (name, index) in zip(rows, [(name, index) for name in IMAGES[:3] for index in range(4)]):
        regions = images[name]
        assert (row["image"], row["region"], row["label"]) == (name, str(index), regions.class_names[index])
        assert [np.float32(row[key]) for key in ("x0", "y0", "x1", "y1")] == regions.boxes[index].tolist()
        assert np.float32(row["score"]) == regions.scores[index] and row["unknown"] == "False"
    with pytest.raises(ValueError, match="ends in .csv or .parquet"):
        write_table([], tmp_path / "regions.xlsx")
    with pytest.raises(ValueError, match="embeddings are written to .parquet only"):
        write_table([], tmp_path / "regions.csv", with_embeddings=True)


def test_parquet_has_the_rows_of_csv(tmp_path, images):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_table(as_dicts(images), tmp_path / "regions.csv")
    write_table(as_dicts(images), tmp_path / "regions.parquet", with_embeddings=True)
    table = parquet.read_table(tmp_path / "regions.parquet")
    with (tmp_path / "regions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert table.column_names == [*rows[0], "embedding"] and table.num_rows == 12
    for actual, expected in zip(table.to_pylist(), rows):
        assert actual["label"] == expected["label"] and actual["x1"] == np.float32(expected["x1"])
        assert actual["unknown"] is False and actual["embedding"] == [0.25, float(expected["region"])]


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'regionspot\[parquet\]'"):
        write_table([], tmp_path / "regions.parquet")
    assert not any(tmp_path.iterdir())


def test_results_are_streamed(tmp_path):
    """A million regions of one list would take gigabytes; here each image's dict is freed before the next is made."""
    alive = []

    class Image(dict):
        def __del__(self):
            alive.pop()

    def stream():
        for image_id in range(50):
            alive.append(image_id)
            yield Image(next(as_dicts({"a.jpg": make_regions(0)}, image_id)))
            assert len(alive) <= 2

    for write in (
        lambda: write_coco_results(stream(), tmp_path / "a.json"),
        lambda: write_coco_dataset(stream(), tmp_path / "b.json", NAMES),
        lambda: write_table(stream(), tmp_path / "c.csv"),
    ):
        write()
    assert len(json.loads((tmp_path / "a.json").read_text())) == 200
