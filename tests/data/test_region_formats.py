"""Boxes in the official formats of annotation tools, with their quirks, and damaged ones."""

import json

import numpy as np
import pytest

from regionspot.data.proposals import ProposalFile, write_proposals
from regionspot.data.region_formats import read_regions

SIZE = (100, 200)  # height, width


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def check(regions, image, boxes, labels=None, scores=None, size=SIZE):
    result = regions.regions_of(image, size)
    assert result.has_entry and result.boxes.dtype == np.float32
    np.testing.assert_allclose(result.boxes, np.array(boxes, np.float32).reshape(-1, 4), rtol=1e-6, atol=1e-5)
    assert result.labels == labels
    if scores is None:
        assert result.scores is None
    else:
        np.testing.assert_allclose(result.scores, scores, rtol=1e-6)


def coco(**changes):
    content = {
        "images": [
            {"id": 7, "file_name": "a/cup.jpg", "height": 100, "width": 200},
            {"id": 3, "file_name": "b/cup.jpg", "height": 100, "width": 200},
            {"id": 9, "file_name": "empty.jpg", "height": 100, "width": 200},
        ],
        "categories": [{"id": 20, "name": "cup"}, {"id": 4, "name": "spoon"}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 4, "bbox": [10, 20, 30, 40], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 20, "bbox": [1.5, 2, 3, 4]},
            {"id": 3, "image_id": 3, "category_id": 20, "bbox": [0, 0, 200, 100], "iscrowd": 1},
            {"id": 4, "image_id": 3, "category_id": 20, "bbox": [-5, 90, 30, 40], "iscrowd": 0},
            {"id": 5, "image_id": 3, "category_id": 20, "bbox": [50, 50, 0, 10]},
        ],
    }
    return {**content, **changes}


def test_coco_annotations(tmp_path):
    regions = read_regions(write(tmp_path / "instances.json", coco()))
    assert regions.format == "coco" and len(regions) == 3
    check(regions, "a/cup.jpg", [[1.5, 2, 4.5, 6]], ["cup"])
    check(regions, tmp_path / "b" / "cup.jpg", [[10, 20, 40, 60], [0, 90, 25, 100]], ["spoon", "cup"])
    assert regions.num_dropped == 1, "a box without area"
    check(regions, "empty.jpg", [], [])
    assert len(regions.regions_of("other.jpg", SIZE)) == 0 and not regions.regions_of("new.jpg", SIZE).has_entry
    assert regions.missing == ["other.jpg", "new.jpg"]


def test_file_names_must_be_unique(tmp_path):
    regions = read_regions(write(tmp_path / "instances.json", coco()))
    with pytest.raises(ValueError, match=r"instances.json: cup.jpg: expected one entry .* got 2: a/cup.jpg, b/cup.jpg"):
        regions.regions_of("cup.jpg", SIZE)
    check(regions, "elsewhere/empty.jpg", [], [])
    assert regions.check_names(["a/cup.jpg", "b/cup.jpg", "none.jpg", "empty.jpg"]) == ["none.jpg"]
    with pytest.raises(ValueError, match="the entry empty.jpg fits x/empty.jpg and y/empty.jpg"):
        regions.check_names(["x/empty.jpg", "y/empty.jpg"])
    content = {"cup.jpg": [[0, 0, 5, 5]], "a/cup.jpg": [[0, 0, 9, 9]]}
    regions = read_regions(write(tmp_path / "boxes.json", content))
    check(regions, "cup.jpg", [[0, 0, 5, 5]])
    check(regions, "photos/a/cup.jpg", [[0, 0, 9, 9]])


def test_boxes_of_another_size_are_refused(tmp_path):
    regions = read_regions(write(tmp_path / "instances.json", coco()))
    with pytest.raises(ValueError, match="empty.jpg: expected an image of 200 x 100 pixels.*, got 100 x 200"):
        regions.regions_of("empty.jpg", (200, 100))


def test_results_and_proposals_by_image_id(tmp_path):
    entries = [
        {"image_id": 139, "bbox": [10, 20, 30, 40], "score": 0.25, "category_id": 4},
        {"image_id": 3, "bbox": [0, 0, 50, 60], "score": 0.5, "category_id": 20},
        {"image_id": 139, "bbox": [1, 2, 3, 4], "score": 0.75, "category_id": 20},
    ]
    path = write(tmp_path / "results.json", entries)
    regions = read_regions(path)
    assert regions.format == "proposals"
    check(regions, "val/000000000139.jpg", [[10, 20, 40, 60], [1, 2, 4, 6]], ["4", "20"], [0.25, 0.75])
    assert not regions.regions_of("cup.jpg", SIZE).has_entry
    annotations = write(tmp_path / "instances.json", coco())
    with pytest.raises(ValueError, match="image id 139 is not in .*instances.json"):
        read_regions(path, annotations=annotations)
    path = write(tmp_path / "results.json", [entries[1]])
    check(read_regions(path, annotations=annotations), "b/cup.jpg", [[0, 0, 50, 60]], ["cup"], [0.5])
    for format in ("glip", "safetensors", "detectron2"):
        suffix = {"glip": "json", "safetensors": "safetensors", "detectron2": "pkl"}[format]
        other = tmp_path / f"{format}.{suffix}"
        write_proposals(other, format, ProposalFile(path).arrays)
        check(read_regions(other), "3.jpg", [[0, 0, 50, 60]], ["20"], [0.5])


LABELME = {
    "version": "5.4.1",
    "flags": {},
    "shapes": [
        {"label": "cup", "points": [[60.5, 40], [10, 20]], "group_id": None, "shape_type": "rectangle", "flags": {}},
        {"label": "spoon", "points": [[1, 2], [30, 5], [20, 50]], "shape_type": "polygon", "flags": {}},
        {"label": "plate", "points": [[100, 50], [103, 54]], "shape_type": "circle", "flags": {}},
        {"label": "fork", "points": [[10, 10], [19, 29]], "shape_type": "mask", "mask": "aGVsbG8=", "flags": {}},
        {"label": "tip", "points": [[5, 5]], "shape_type": "point", "flags": {}},
        {"label": "edge", "points": [[5, 5], [9, 9]], "shape_type": "line", "flags": {}},
    ],
    "imagePath": "../images/cup.jpg",
    "imageData": "aGVsbG8=",
    "imageHeight": 100,
    "imageWidth": 200,
}


def test_labelme_files(tmp_path):
    boxes, names = (
        [[10, 20, 60.5, 40], [1, 2, 30, 50], [95, 45, 105, 55], [10, 10, 20, 30]],
        ["cup", "spoon", "plate", "fork"],
    )
    path = write(tmp_path / "labels" / "cup.json", LABELME)
    regions = read_regions(path)
    assert regions.format == "labelme"
    check(regions, "images/cup.jpg", boxes, names)
    for image in ("", "images/former name.jpg"):  # older files do not name it; or both were renamed since
        check(
            read_regions(write(tmp_path / "renamed" / "cup.json", {**LABELME, "imagePath": image})),
            "cup.jpg",
            boxes,
            names,
        )
    windows = {**LABELME, "imagePath": "..\\..\\other\\cup.jpg", "shapes": LABELME["shapes"][:1]}
    write(tmp_path / "labels" / "sub" / "cup.json", windows)
    # X-AnyLabeling writes rectangles with four points, and scores
    shape = {"label": "cup", "score": 0.5, "points": [[1, 2], [5, 2], [5, 9], [1, 9]], "shape_type": "rectangle"}
    write(tmp_path / "labels" / "x.json", {**LABELME, "imagePath": "x.png", "shapes": [shape]})
    regions = read_regions(tmp_path / "labels")
    assert len(regions) == 3
    check(regions, tmp_path / "images" / "cup.jpg", boxes, names, [np.nan] * 4)
    check(regions, tmp_path / "other" / "cup.jpg", boxes[:1], ["cup"], [np.nan])
    check(regions, "x.png", [[1, 2, 5, 9]], ["cup"], [0.5])


def test_yolo_labels(tmp_path):
    labels = tmp_path / "labels" / "train"
    write(labels / "cup.v2.txt", "0 0.5 0.5 0.25 0.5\n\n7 0.1 0.2 0.1 0.2\r\n")
    write(labels / "segments.txt", "7 0.1 0.2 0.3 0.2 0.2 0.6\n7 0.5 0.5 0.5 1 1 1 1 0.5")
    write(labels / "empty.txt", "")
    write(tmp_path / "data.yaml", "path: .\ntrain: images/train\nnames:\n  0: cup\n  7: wooden spoon\n")
    write(tmp_path / "train.txt", "images/train/cup.v2.jpg")
    for path in (tmp_path, labels, tmp_path / "data.yaml"):
        regions = read_regions(path)
        assert regions.format == "yolo" and len(regions) == 3
        check(regions, "images/train/cup.v2.jpg", [[75, 25, 125, 75], [10, 10, 30, 30]], ["cup", "wooden spoon"])
        check(regions, "segments.png", [[20, 20, 60, 60], [100, 50, 200, 100]], ["wooden spoon"] * 2)
        check(regions, "empty.jpg", [], [])
    # exports of several parts, with notes beside them
    for part, x in (("train", "0.5"), ("valid", "0.25")):
        write(tmp_path / "export" / part / "labels" / "a.txt", f"0 {x} 0.5 0.25 0.5")
    for note in ("README.dataset.txt", "README.roboflow.txt"):
        write(tmp_path / "export" / note, "Cups: https://universe.example")
    export = read_regions(tmp_path / "export")
    check(export, tmp_path / "export" / "train" / "images" / "a.jpg", [[75, 25, 125, 75]], ["cup"])
    check(export, tmp_path / "export" / "valid" / "images" / "a.jpg", [[25, 25, 75, 75]], ["cup"])
    (tmp_path / "data.yaml").unlink()
    check(read_regions(labels), "segments.png", [[20, 20, 60, 60], [100, 50, 200, 100]], ["7", "7"])
    write(labels / "classes.txt", "cup\nspoon\n")
    with pytest.raises(ValueError, match=r"cup.v2.txt: line 3: class 7 has no name; the ids with names are 0, 1"):
        read_regions(labels)
    predictions = write(tmp_path / "predicted" / "cup.txt", "0 0.5 0.5 0.25 0.5 0.875\n0 .1 .1 .2 .1 .2 .2 .75")
    check(read_regions(predictions.parent), "cup.jpg", [[75, 25, 125, 75], [20, 10, 40, 20]], ["0", "0"], [0.875, 0.75])


VOC = """<?xml version="1.0"?>
<annotation>
  <folder>VOC2012</folder><filename>2007_000027.jpg</filename>
  <size><width>200</width><height>100</height><depth>3</depth></size><segmented>0</segmented>
  <object><name>person</name><pose>Unspecified</pose><truncated>0</truncated><difficult>0</difficult>
    <bndbox><xmin>1</xmin><ymin>11</ymin><xmax>200</xmax><ymax>50.5</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>
  </object>
  <object><name>dog</name><bndbox><ymin>2</ymin><xmin>3</xmin><ymax>4</ymax><xmax>5</xmax></bndbox></object>
</annotation>"""


def test_pascal_voc_counts_pixels_from_one(tmp_path):
    path = write(tmp_path / "Annotations" / "2007_000027.xml", VOC)
    for source in (path, path.parent, tmp_path):
        regions = read_regions(source)
        assert regions.format == "voc"
        check(regions, "JPEGImages/2007_000027.jpg", [[0, 10, 200, 50.5], [2, 1, 5, 4]], ["person", "dog"])
    for name in ("<filename>2007_000027</filename>", ""):  # without a suffix, or not at all
        path = write(tmp_path / "bare" / "2007_000027.xml", VOC.replace("<filename>2007_000027.jpg</filename>", name))
        check(read_regions(path), "2007_000027.png", [[0, 10, 200, 50.5], [2, 1, 5, 4]], ["person", "dog"])
    renamed = write(
        tmp_path / "new" / "sub" / "renamed.xml",
        VOC.replace("<width>200</width><height>100", "<width>0</width><height>0"),
    )
    regions = read_regions(renamed.parent.parent)
    check(regions, "sub/renamed.jpg", [[0, 10, 50, 50.5], [2, 1, 5, 4]], ["person", "dog"], size=(80, 50))


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta><task><id>4</id><name>cups</name><image>not one</image></task></meta>
  <image id="0" name="a/cup.jpg" width="200" height="100">
    <box label="cup" source="manual" occluded="0" xtl="10.5" ytl="20" xbr="60" ybr="40" z_order="0">
      <attribute name="color">red</attribute></box>
    <box label="cup" occluded="0" xtl="40" ytl="40" xbr="80" ybr="60" rotation="90.0" z_order="0"/>
    <polygon label="spoon" occluded="0" points="1.0,2.0;30,5;20,50" z_order="0"/>
    <points label="tip" occluded="0" points="1,2" z_order="0"/>
    <mask label="plate" occluded="0" rle="3, 4" left="10" top="20" width="30" height="5" z_order="0"/>
    <ellipse label="lid" occluded="0" cx="50" cy="50" rx="10" ry="5" z_order="0"/>
    <ellipse label="coin" occluded="0" cx="50" cy="50" rx="10" ry="10" rotation="45.0" z_order="0"/>
    <ellipse label="coin" occluded="0" cx="50" cy="50" rx="10" ry="5" rotation="90.0" z_order="0"/>
  </image>
  <image id="1" name="cup.jpg" subset="train" width="200" height="100"></image>
</annotations>"""


def test_cvat_for_images(tmp_path):
    regions = read_regions(write(tmp_path / "annotations.xml", CVAT))
    assert regions.format == "cvat" and len(regions) == 2
    boxes = [[10.5, 20, 60, 40], [50, 30, 70, 70], [1, 2, 30, 50], [10, 20, 40, 25], [40, 45, 60, 55]]
    boxes += [[40, 40, 60, 60], [45, 40, 55, 60]]
    check(regions, "a/cup.jpg", boxes, ["cup", "cup", "spoon", "plate", "lid", "coin", "coin"])
    check(regions, "train/cup.jpg", [], [])
    check(regions, "cup.jpg", [], [])
    with pytest.raises(ValueError, match="tracks of a video"):
        read_regions(write(tmp_path / "video.xml", "<annotations><track id='0' label='cup'></track></annotations>"))


def task(image, *results, **more):
    return {
        "id": 1,
        "annotations": [{"id": 5, "was_cancelled": False, "result": list(results)}],
        "data": {"image": image},
    } | more


def rectangle(x, y, width, height, label="cup", rotation=0):
    value = {"x": x, "y": y, "width": width, "height": height, "rotation": rotation, "rectanglelabels": [label]}
    sizes = {"original_width": 200, "original_height": 100, "image_rotation": 0}
    names = {"id": "abc", "from_name": "label", "to_name": "image", "origin": "manual"}
    return {**sizes, **names, "value": value, "type": "rectanglelabels"}


def test_label_studio_export(tmp_path):
    polygon = rectangle(0, 0, 0, 0) | {
        "type": "polygonlabels",
        "value": {"points": [[10, 20], [30, 20], [20, 60]], "polygonlabels": ["spoon"]},
    }
    choice = {"value": {"choices": ["good"]}, "from_name": "quality", "to_name": "image", "type": "choices"}
    canceled = {"was_cancelled": True, "result": [rectangle(0, 0, 1, 1)]}
    uploaded = task(
        "/data/upload/3/0a1b2c3d-my%20cup.jpg",
        rectangle(25, 50, 50, 25),
        choice,
        polygon,
        file_upload="0a1b2c3d-my cup.jpg",
    )
    uploaded["annotations"].insert(0, canceled)
    # 90 degrees about the top left corner: 40 x 20 pixels at (100, 20) become 20 x 40 to its left
    local = task("/data/local-files/?d=photos/b/cup.jpg", rectangle(50, 20, 20, 20, rotation=90), text="//[a cup")
    cloud = task(
        "https://bucket.example/a/cup.jpg?X-Amz=1",
        annotations=[],
        predictions=[{"result": [rectangle(0, 0, 50, 50, "saucer")]}],
    )
    # a region has a result for each of its controls, all with its id and box
    value = {key: x for key, x in uploaded["annotations"][1]["result"][0]["value"].items() if key != "rectanglelabels"}
    controls = [{"id": "abc", "type": kind, "value": {**value, "text": ["x"]}} for kind in ("rectangle", "textarea")]
    uploaded["annotations"][1]["result"] = [controls[0], *uploaded["annotations"][1]["result"], controls[1]]
    regions = read_regions(write(tmp_path / "export.json", [uploaded, local, cloud]))
    assert regions.format == "label-studio" and len(regions) == 3
    check(regions, "my cup.jpg", [[50, 50, 150, 75], [20, 20, 60, 60]], ["cup", "spoon"])
    check(regions, "0a1b2c3d-my cup.jpg", [[50, 50, 150, 75], [20, 20, 60, 60]], ["cup", "spoon"])
    check(regions, "photos/b/cup.jpg", [[80, 20, 100, 60]], ["cup"])
    check(regions, "a/cup.jpg", [[0, 0, 50, 25]], ["saucer"], size=(50, 100))  # percent of any size


def test_own_predictions_and_boxes(tmp_path):
    content = {"image": "photos/cup.jpg", "height": 100, "width": 200, "vocabulary": ["cup"]}
    regions = [
        {"box": [1, 2, 3.5, 4], "label": "cup", "class_index": 0, "score": 0.25, "iou": 0.5, "logits": [1], "mask": {}}
    ]
    write(tmp_path / "out" / "cup.json", {**content, "regions": regions})
    write(tmp_path / "out" / "none.json", {**content, "image": "none.jpg", "regions": []})
    for source in (tmp_path / "out", tmp_path / "out" / "cup.json"):
        assert read_regions(source).format == "predictions"
        check(read_regions(source), "cup.jpg", [[1, 2, 3.5, 4]], ["cup"], [0.25])
    lines = "\n".join(json.dumps({**content, "image": f"{k}.jpg", "regions": regions * k}) for k in range(3)) + "\n"
    check(read_regions(write(tmp_path / "all.jsonl", lines)), "2.jpg", [[1, 2, 3.5, 4]] * 2, ["cup"] * 2, [0.25] * 2)
    boxes = read_regions(write(tmp_path / "boxes.json", {"cup.jpg": [[8, 5, 30, 20]], "a/b.jpg": []}))
    check(boxes, "cup.jpg", [[8, 5, 30, 20]])
    check(boxes, "a/b.jpg", [])
    everywhere = read_regions(write(tmp_path / "list.json", [[8, 5, 30, 20], [190, 90, 210, 110]]))
    for image in ("cup.jpg", "any/other.png"):
        check(everywhere, image, [[8, 5, 30, 20], [190, 90, 200, 100]])
    assert everywhere.check_names(["a.jpg", "b.jpg"]) == [] and everywhere.missing == []


def test_wrong_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json: no such file"):
        read_regions(tmp_path / "none.json")
    write(tmp_path / "d" / "a.json", LABELME)
    write(tmp_path / "d" / "a.txt", "0 .5 .5 .5 .5")
    with pytest.raises(ValueError, match=r"got .json and .txt; give the format"):
        read_regions(tmp_path / "d")
    assert read_regions(tmp_path / "d", "yolo").format == "yolo"
    assert read_regions(tmp_path / "d", "labelme").format == "labelme"
    with pytest.raises(ValueError, match="expected one of the formats auto, coco"):
        read_regions(tmp_path / "d", "voc2")
    with pytest.raises(ValueError, match="expected a file of the format coco, got a directory"):
        read_regions(tmp_path / "d", "coco")
    with pytest.raises(ValueError, match="annotations are for boxes by image id"):
        read_regions(tmp_path / "d", "yolo", annotations=tmp_path / "a.json")
