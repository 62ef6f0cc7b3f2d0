"""Files of results: their layouts, and the errors for damaged ones."""

import copy
import json
import math
import random
import re

import numpy as np
import pycocotools.mask as mask_utils
import pytest

from regionspot.data.coco_io import Results, json_file, read_results
from regionspot.data.coco_io import results as results_module
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.lvis_metrics import evaluate_lvis

from ...evaluation.reference import make_world, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Annotations, and detections with masks of which some are shared."""
    annotations, predictions = make_world(0, images=4, detections=8, masks=True, empty=0, near=1.0)
    predictions = sorted(predictions, key=lambda entry: entry["image_id"])[:20]
    predictions += [{**entry, "category_id": annotations["categories"][0]["id"]} for entry in predictions[-2:]]
    path, _ = write_world(tmp_path_factory.mktemp("world"), annotations, predictions)
    return GroundTruth(path), predictions


def read(directory, content):
    path = directory / "results.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_results(path)


@pytest.mark.parametrize("form", ["list", "lines", "lines and spaces", "indented", "mark"])
def test_file_layouts(tmp_path, world, form):
    _, entries = world
    lines = "\n".join(map(json.dumps, entries))
    text = {
        "list": json.dumps(entries),
        "lines": lines,
        "lines and spaces": "\n" + lines.replace("\n", "\r\n\r\n") + "\r\n",
        "indented": json.dumps(entries, indent=2),
        "mark": "\ufeff" + json.dumps(entries),
    }[form]
    results = read(tmp_path, text.encode())
    assert results.image_ids.tolist() == [entry["image_id"] for entry in entries]
    assert results.category_ids.tolist() == [entry["category_id"] for entry in entries]
    assert results.scores.tolist() == [entry["score"] for entry in entries]
    assert results.boxes.tolist() == [entry["bbox"] for entry in entries]
    for entry, region in zip(entries, results.regions):
        rle = results.rles[region]
        assert (rle["size"], rle["counts"].decode()) == (entry["segmentation"]["size"], entry["segmentation"]["counts"])
    assert len(results.rles) == len(entries) - 2  # equal ones are shared


def test_files_of_many_chunks(tmp_path, monkeypatch, world):
    monkeypatch.setattr(json_file, "CHUNK_BYTES", 400)
    monkeypatch.setattr(results_module, "_BLOCK", 100)
    _, entries = world
    for text in (json.dumps(entries), "\n".join(map(json.dumps, entries))):
        assert read(tmp_path, text.encode()).scores.tolist() == [entry["score"] for entry in entries]
    entries = [*entries[:10], {**entries[0], "score": "high"}, *entries[10:]]
    for text in (json.dumps(entries), "\n".join(map(json.dumps, entries))):
        with pytest.raises(ValueError, match=r"entry 10.score: expected `float`, got `str`"):
            read(tmp_path, text.encode())
    with pytest.raises(ValueError, match="line 12 is not valid JSON"):
        read(tmp_path, "\n".join(map(json.dumps, entries[:10] + entries[11:13])).encode()[:-3])


def test_boxes_of_masks(tmp_path, world):
    _, entries = world
    entries = [{key: value for key, value in entry.items() if key != "bbox"} for entry in entries]
    results = read(tmp_path, entries)
    assert results.has_mask_boxes
    assert results.boxes.tolist() == [mask_utils.toBbox(entry["segmentation"]).tolist() for entry in entries]
    assert results.areas("bbox").tolist() == [mask_utils.area(entry["segmentation"]) for entry in entries]


def test_uncompressed_masks(tmp_path, world):
    _, entries = world
    size = entries[0]["segmentation"]["size"]
    counts = [5, 20, size[0] * size[1] - 25]
    results = read(tmp_path, [{**entries[0], "segmentation": {"size": size, "counts": counts}}])
    assert results.mask_areas.tolist() == [20]


def test_no_masks(tmp_path, world):
    truth, entries = world
    entries = [{**entry, "segmentation": None} for entry in entries]
    results = read(tmp_path, entries)
    assert results.regions is None
    assert evaluate_lvis(truth, results).metrics()["AP"] > 0
    with pytest.raises(ValueError, match="task segm needs masks"):
        evaluate_lvis(truth, results, "segm")


def test_some_masks(tmp_path, world):
    truth, entries = world
    results = read(tmp_path, [entries[0], {**entries[1], "segmentation": None}])
    evaluate_lvis(truth, results)
    with pytest.raises(ValueError, match="entry 1 has no segmentation while others have"):
        evaluate_lvis(truth, results, "segm")


def test_empty_list(tmp_path):
    assert len(read(tmp_path, b" [ ] ")) == 0


WRONG_ENTRIES = {
    "no score": ({"score": ...}, r"entry 1: .*missing required field `score`"),
    "no image": ({"image_id": ...}, r"entry 1: .*`image_id`"),
    "null score": ({"score": None}, r"entry 1.score: expected `float`"),
    "a word": ({"image_id": "one"}, r"entry 1.image_id: expected `int`"),
    "huge id": ({"image_id": 2**70}, r"entry 1.image_id"),
    "three numbers": ({"bbox": [1, 2, 3]}, r"entry 1.bbox: expected `array` of length 4"),
    "words in the box": ({"bbox": [1, 2, 3, "4"]}, r"entry 1.bbox"),
    "negative width": ({"bbox": [1, 2, -3, 4]}, r"entry 1: .*width and height >= 0, got"),
    "no box, but others": ({"bbox": None}, r"entry 1 has no bbox"),
    "polygon": ({"segmentation": [[1, 2, 3, 4, 5, 6]]}, r"entry 1: expected a mask as compressed RLE"),
    "no counts": ({"segmentation": {"size": [9, 9]}}, r"entry 1: expected a mask as compressed RLE"),
    "no size": ({"segmentation": {"counts": "00"}}, r"entry 1: expected a mask as compressed RLE"),
    "no text": ({"segmentation": {"size": [3, 3], "counts": ""}}, r"entry 1: expected a mask"),
    "sum": ({"segmentation": {"size": [3, 3], "counts": "11"}}, r"entry 1: the mask's RLE is damaged.*3 x 3"),
    "endless": ({"segmentation": {"size": [3, 3], "counts": "o" * 50}}, r"entry 1: the mask's RLE is damaged"),
    "runs on": ({"segmentation": {"size": [3, 3], "counts": "9o"}}, r"entry 1: the mask's RLE is damaged"),
    "negative run": ({"segmentation": {"size": [3, 3], "counts": "O:"}}, r"entry 1: the mask's RLE is damaged"),
    "other signs": ({"segmentation": {"size": [3, 3], "counts": "9 "}}, r"entry 1: the mask's RLE is damaged"),
    "no ASCII": ({"segmentation": {"size": [3, 3], "counts": "9é"}}, r"entry 1: the mask's RLE is damaged"),
    "half a sign": ({"segmentation": {"size": [3, 3], "counts": "\ud800"}}, "not valid JSON"),
    "huge": ({"segmentation": {"size": [2**40, 2**40], "counts": "0"}}, r"entry 1: expected a mask"),
    "zero": ({"segmentation": {"size": [0, 3], "counts": "0"}}, r"entry 1: expected a mask"),
    "wrong runs": ({"segmentation": {"size": [3, 3], "counts": [1, 2]}}, r"entry 1: expected RLE whose counts sum"),
    "negative runs": ({"segmentation": {"size": [3, 3], "counts": [-1, 10]}}, r"entry 1: expected RLE"),
}


@pytest.mark.parametrize("kind", WRONG_ENTRIES)
@pytest.mark.parametrize("lines", [False, True])
def test_invalid_entries(tmp_path, world, kind, lines):
    _, entries = world
    change, words = WRONG_ENTRIES[kind]
    wrong = {key: value for key, value in {**entries[1], **change}.items() if value is not ...}
    entries = [entries[0], wrong, entries[2]]
    text = "\n".join(map(json.dumps, entries)) if lines else json.dumps(entries)
    with pytest.raises(ValueError, match=words) as error:
        read(tmp_path, text.encode())
    assert "results.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"  \n", "expected a JSON list"),
        (b"hello", "expected a JSON list"),
        (b"\x80\x04\x95pickle", "expected a JSON list"),
        (b"[", "truncated; was the run that wrote it cut"),
        (b'[{"image_id": 1, "category_id": 1, "score": NaN, "bbox": [1, 2, 3, 4]}]', "NaN and Infinity are not JSON"),
        (b'[{"image_id": 1, "category_id": 1, "score": 1e999, "bbox": [1, 2, 3, 4]}]', "out of range"),
        (b"[" * 100000, "entry 0: expected `object`, got `array`"),
        (b'[{"x": ' + b"[" * 100000, "recursion"),
        (b"[1, 2]", r"entry 0: expected `object`, got `int`"),
        (b"{}", "missing required field"),
        (b'{"images": [], "annotations": [], "categories": []}', "got an annotation file"),
    ],
)
def test_invalid_files(tmp_path, content, words):
    with pytest.raises(ValueError, match=words):
        read(tmp_path, content)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="predictions .*nothing.json: no such file"):
        read_results(tmp_path / "nothing.json")


@pytest.mark.parametrize(("key", "words"), [("image_id", "another data set"), ("category_id", "ids of the annotation")])
def test_unknown_ids(tmp_path, world, key, words):
    truth, entries = world
    entries = [entries[0], *({**entry, key: 424242} for entry in entries[:3])]
    with pytest.raises(ValueError, match=rf"entry 1 has .* id 424242.*3 of 4 entries, 1 ids.*{words}"):
        evaluate_lvis(truth, read(tmp_path, entries))


def test_masks_of_another_size(tmp_path, world):
    truth, entries = world
    rle = mask_utils.encode(np.zeros((5, 7), np.uint8, order="F"))
    wrong = {**entries[2], "segmentation": {"size": [5, 7], "counts": rle["counts"].decode()}}
    results = read(tmp_path, [*entries[:2], wrong])
    assert evaluate_lvis(truth, results).metrics()["AP"] >= 0
    with pytest.raises(ValueError, match=r"entry 2: expected a mask of its image's height and width .*got \[5, 7\]"):
        evaluate_lvis(truth, results, "segm")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scores": [0.5, np.nan]}, "entry 1: expected a finite score, got nan"),
        ({"boxes": [[0, 0, 1, 1], [0, 0, np.inf, 1]]}, "entry 1: expected a bbox of finite"),
        ({"boxes": [[0, 0, 1, 1], [0, 0, -1, 1]]}, "entry 1: expected bbox as"),
        ({"boxes": [[0, 0, 1], [0, 0, 1]]}, "expected image_ids"),
        ({"scores": [0.5]}, "expected image_ids"),
        ({"image_ids": [1.0, 2.5]}, "integers"),
        ({"regions": [0, 0]}, "both regions and rles"),
        ({"regions": [0, 1], "rles": [{"size": [2, 2], "counts": "4"}]}, "entry 1: expected a region"),
        ({"regions": [-1, 0], "rles": [{"size": [2, 2], "counts": b"5"}]}, "entry 1: the mask's RLE is damaged"),
        ({"regions": [0], "rles": [{"size": [2, 2], "counts": b"4"}]}, "expected regions of shape"),
    ],
)
def test_invalid_arrays(change, words):
    good = {"image_ids": [1, 2], "category_ids": [1, 1], "scores": [0.5, 1], "boxes": [[0, 0, 1, 1], [0, 0, 2, 2]]}
    Results(**good)
    with pytest.raises(ValueError, match=re.escape(words)):
        Results(**{**good, **change})


def test_masks_of_pycocotools_are_accepted():
    rng = np.random.default_rng(0)
    rles = []
    for _ in range(300):
        height, width = (int(x) for x in rng.integers(1, 400, 2))
        mask = rng.random((height, width)) < rng.choice([0, 0.01, 0.5, 1])
        mask[: height // 2] |= rng.random() < 0.5
        rles.append(mask_utils.encode(np.asfortranarray(mask.astype(np.uint8))))
    rles.append(
        {"size": [50000, 80000], "counts": mask_utils.frPyObjects([[0, 0, 9, 0, 9, 9]], 50000, 80000)[0]["counts"]}
    )
    ones = np.ones(len(rles), int)
    results = Results(ones, ones, ones, np.ones((len(rles), 4)), np.arange(len(rles)), rles)
    assert results.mask_areas.tolist() == [mask_utils.area(rle) for rle in rles]


def damaged_bytes(rng, content):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(max(len(content), 1))
        kind = rng.randrange(6)
        if kind == 0:
            content[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            content[at : at + rng.choice([1, 3, 50])] = b""
        elif kind == 2:
            content[at:at] = bytes([rng.randrange(32, 127)])
        elif kind == 3:
            content[at:at] = content[rng.randrange(len(content) + 1) :][: rng.choice([1, 10, 400])]
        elif kind == 4:
            del content[at if rng.random() < 0.3 else len(content) :]
        else:
            content[at : at + 1] = rng.choice([b"0", b"9", b"-", b"e", b'"', b"{", b"]", b",", b"\n", b"o", b"null"])
    return bytes(content)


STRANGE = [None, True, "", "x", -1, 0, 1, 2**31, 2**63, 1e300, -1e300, 1.5, [], {}, [[]], [1, 2, 3, 4], [0, 0, 0, 0]]
STRANGE += [[1e308] * 4, [-1e308, 0, 1.7e308, 1], {"size": [1, 1], "counts": "1"}, {"size": [10, 10], "counts": "T3"}]


def damaged_entries(rng, entries):
    entries = json.loads(json.dumps(entries))
    for _ in range(rng.choice([1, 1, 2, 5])):
        entry = rng.choice(entries)
        target = (
            entry if rng.random() < 0.6 or not isinstance(entry.get("segmentation"), dict) else entry["segmentation"]
        )
        key = rng.choice([*target, "counts", "extra"])
        kind = rng.randrange(4)
        if kind == 0:
            target.pop(key, None)
        elif kind == 1 and isinstance(target.get(key), str):
            target[key] = damaged_bytes(rng, target[key].encode()).decode("latin1")
        elif kind == 2 and isinstance(target.get(key), list) and target[key]:
            target[key][rng.randrange(len(target[key]))] = copy.deepcopy(rng.choice(STRANGE))
        else:
            target[key] = copy.deepcopy(rng.choice(STRANGE))
    return json.dumps(entries).encode()


@pytest.mark.parametrize("form", ["list", "lines", "entries", "masks only"])
def test_damaged_result_files(tmp_path, world, form):
    truth, entries = world
    rng = random.Random(form)
    if form == "masks only":
        entries = [{key: value for key, value in entry.items() if key != "bbox"} for entry in entries]
    whole = ("\n".join(map(json.dumps, entries)) if form == "lines" else json.dumps(entries)).encode()
    refused = evaluated = 0
    for _ in range(1000):
        content = damaged_entries(rng, entries) if form in ("entries", "masks only") else damaged_bytes(rng, whole)
        try:
            results = read(tmp_path, content)
            values = [evaluate_lvis(truth, results, task).metrics() for task in ("bbox", "segm")]
        except ValueError as error:
            message = str(error)
            assert message.startswith("predictions ") and "results.json" in message and len(message) < 600
            refused += 1
        else:
            assert len(results) or content.strip() == b"[]"
            assert all(math.isnan(value) or 0 <= value <= 100 for metrics in values for value in metrics.values())
            evaluated += 1
    assert refused > 300
    assert evaluated > 30
