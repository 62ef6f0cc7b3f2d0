"""A data set with one fault of each kind, and one without any."""

import json

import clip
import numpy as np
import pytest
from PIL import Image

from regionspot.data.dataset_check import check_class_names, check_dataset, is_usable
from regionspot.vocabulary import TEMPLATE_SETS, clean_name

from ..helpers import NAMES, write_dataset


@pytest.fixture
def directory(tmp_path):
    return write_dataset(tmp_path, 8).parent


def edit(directory, change):
    """Change the annotations; return the data set's name."""
    path = directory / "annotations.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return f"{path}:{directory / 'images'}"


def test_flawless_data_set(directory):
    report = check_dataset(edit(directory, lambda content: None), workers=2)
    assert is_usable(report) and report["unusable"] == [] and set(report["left_out"].values()) == {0}
    annotations = json.loads((directory / "annotations.json").read_text())["annotations"]
    numbers = np.bincount([annotation["image_id"] for annotation in annotations])[1:]
    assert (report["images"], report["regions"], report["classes"]) == (8, len(annotations), 4)
    statistics = report["statistics"]
    assert statistics["regions_of_image"] == np.percentile(numbers, [0, 25, 50, 75, 100]).round(2).tolist()
    sides = [annotation["area"] ** 0.5 for annotation in annotations]
    assert statistics["side_in_pixels"] == np.percentile(sides, [0, 25, 50, 75, 100]).round(2).tolist()
    assert (statistics["small"], statistics["medium"], statistics["large"]) == (len(annotations), 0, 0)
    ids = dict(zip(NAMES, (3, 1, 10, 7)))
    for name, count in report["regions_of_classes"].items():
        assert count == sum(annotation["category_id"] == ids[name] for annotation in annotations)


def test_unusable_images(directory):
    images = directory / "images"
    (images / "0.png").unlink()
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:200])
    (images / "3.png").write_text("no image")
    Image.new("RGB", (30, 20)).save(images / "5.png")
    report = check_dataset(edit(directory, lambda content: None), workers=1)
    assert not is_usable(report)
    assert [image["image_id"] for image in report["unusable"]] == [1, 3, 4, 6]
    for image, name, word in zip(report["unusable"], (0, 2, 3, 5), ("no such file", "2.png", "3.png", "20")):
        assert image["file_name"] == str(images / f"{name}.png") and word in image["problem"]


def test_left_out_annotations(directory):
    def change(content):
        first = [next(a for a in content["annotations"] if a["image_id"] == i) for i in (1, 2, 3, 4)]
        first[0]["iscrowd"] = 1
        first[1]["bbox"] = [5, 5, 0, 7]
        first[2]["bbox"] = [70, 5, 9, 9]  # the images are 64 pixels wide
        first[3]["bbox"] = [60, 0, 40, 16]  # cut to 4 x 16
        content["annotations"] = [*first, *(a for a in content["annotations"] if a["image_id"] > 5)]

    report = check_dataset(edit(directory, change))
    assert is_usable(report)
    assert report["left_out"] == {"crowds": 1, "boxes without area": 1, "boxes outside the image": 1}
    assert report["images_without_regions"] == 4 and report["statistics"]["side_in_pixels"][0] == 8


def test_names_that_clip_refuses(directory):
    def change(content):
        for category, name in zip(content["categories"], (" ", "cup", "cup", "very " * 80 + "long")):
            category["name"] = name

    report = check_dataset(edit(directory, change))
    assert report["names"] == {"empty": [" "], "too_long": ["very " * 80 + "long"], "duplicates": ["cup"]}
    assert not is_usable(report)


def test_name_length_in_longest_prompt():
    too_long = [bool(check_class_names(["cup " * count])["too_long"]) for count in range(40, 75)]
    assert too_long == sorted(too_long) and not too_long[0] and too_long[-1]
    for count in range(60, 72):  # a template may have more tokens than one of more letters
        name, is_refused = "cup " * count, False
        try:
            for template in TEMPLATE_SETS["all"]:
                clip.tokenize(template.format(clean_name(name)))
        except RuntimeError:
            is_refused = True
        assert bool(check_class_names([name])["too_long"]) == is_refused


def test_data_set_without_images(directory):
    report = check_dataset(edit(directory, lambda content: content.update(images=[], annotations=[])))
    assert report["images"] == 0 and set(report["left_out"].values()) == {0}
