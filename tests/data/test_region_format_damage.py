"""Damaged files of regions: one line that names the place."""

import pytest

from regionspot.data.region_formats import read_regions

from .test_region_formats import CVAT, LABELME, VOC, coco, rectangle, task, write

BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "xxxxxxxxxx"><!ENTITY y "&x;&x;&x;">]><annotation>&y;</annotation>'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"images": [', "a.json: not valid JSON .*truncated"),
        ("a.json", "", "the file is empty"),
        ("a.json", {"hello": 1}, "a.json: expected JSON of one of the formats coco, .* got the keys hello"),
        ("a.json", [], "no boxes; expected at least one"),
        ("a.json", {"cup.jpg": [[1, 2, 3]]}, r"a.json: cup.jpg: expected a list of boxes \[x0, y0, x1, y1\], got"),
        ("a.json", {"cup.jpg": [[1, 2, 3, "4"]]}, "cup.jpg: expected a list of boxes"),
        ("a.json", [{"image": "x.jpg", "label": []}], "not JSON-MIN"),
        ("a.json", coco(annotations=[{"image_id": 3, "category_id": 99, "bbox": [1, 2, 3, 4]}]), "category id 99"),
        ("a.json", coco(annotations=[{"image_id": 3, "category_id": 4, "bbox": [1, 2, 3]}]), r"annotations\[0\].bbox"),
        ("a.json", {**LABELME, "shapes": [{"label": "cup", "points": [[1]]}]}, r"shapes\[0\].points\[0\]: .*length"),
        ("a.json", {**LABELME, "shapes": [{"label": 5, "points": []}]}, r"label: expected `str`, got `int`"),
        ("a.json", [task("/data/upload/cup.jpg", rectangle("a", 0, 1, 1))], "task 0: expected numbers x, y, width"),
        ("a.json", [task("no image")], "task 0: expected an image in data"),
        ("a.json", [{"data": {}, "annotations": 3}], "task 0.annotations: expected `array`, got `int`"),
        ("a.jsonl", '{"image": "a.jpg", "regions": []}\n{"image"', "a.jsonl: line 2: not valid JSON"),
        ("a.xml", "<annotation><object>", "a.xml: damaged, or not XML"),
        ("a.xml", '<?xml version="1.0" encoding="foo"?><annotation/>', "not XML .unknown encoding: foo"),
        ("a.jsonl", '\n\n{"image"', "a.jsonl: line 3: not valid JSON"),
        ("a.xml", BOMB, "a.xml: expected XML without a document type"),
        ("a.xml", "<html></html>", "a.xml: expected XML of Pascal VOC or CVAT, got the root element 'html'"),
        ("a.xml", VOC.replace("<xmin>3</xmin>", ""), "a.xml: <object>: expected a number in <bndbox/xmin>, got None"),
        ("a.xml", VOC.replace("50.5", "nan"), "a.xml: box 0: expected finite numbers"),
        ("a.xml", CVAT.replace('xtl="10.5"', 'xtl="x"'), "image a/cup.jpg: <box>: expected a number as xtl, got 'x'"),
        ("a.xml", CVAT.replace("30,5;", "30;"), 'image a/cup.jpg: expected points "x,y;x,y"'),
        ("a.xml", VOC.replace("<height>100", "<height>inf"), "expected height and width in pixels, got inf and 200"),
        ("a.xml", CVAT.replace('height="100"', 'height="nan"'), "a/cup.jpg: expected height and width in pixels"),
        ("a.json", {**LABELME, "imageHeight": 10**30}, "expected height and width in pixels, got 1e.30"),
        ("d/a.txt", "0 0.5 0.5 0.5", "a.txt: line 1: expected class cx cy width height, got"),
        ("d/a.txt", "cup 0.5 0.5 0.5 0.5", "a.txt: line 1: expected class cx cy"),
        ("d/a.txt", "0 0.5 nan 0.5 0.5", "a.txt: line 1: expected class cx cy"),
        ("d/a.txt", "0 50 50 30 20", "a.txt: line 1: expected parts of the image's sides, from 0 to 1"),
        ("d/readme.md", "nothing", "expected .json of labelme, .txt of YOLO or .xml .* in it, got none"),
        ("a.txt", "0 0.5 0.5 0.5 0.5", "expected the directory of YOLO's labels, got one file"),
    ],
)  # fmt: skip
def test_damaged_files_name_the_place(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        read_regions(path.parent if name.startswith("d/") else path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
