"""Proposal files, and their way into the model."""

import json
import logging
import pickle

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from safetensors.numpy import save_file

from regionspot.data import build_test_loader
from regionspot.data.coco_io import json_file
from regionspot.data.proposals import FORMATS, ProposalFile, select_proposals, write_proposals

from ..helpers import tiny_config, tiny_model, write_dataset

NAME = "test_proposals"
SIZES = {1: (48, 64), 2: (30, 20), 9: (48, 64)}


@pytest.fixture
def dataset(tmp_path, register):
    return register(NAME, write_dataset(tmp_path / "data", 6), tmp_path / "data" / "images")


def config(*overrides):
    return tiny_config("DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,), "SOLVER.IMS_PER_BATCH", 6, *overrides)


def loader(path, dataset, *overrides):
    return build_test_loader(config("DATASETS.PROPOSAL_FILES_TEST", (str(path),), *overrides), dataset)


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def random_proposals(tmp_path, seed=0, images=6, num_boxes=40, with_scores=True, with_labels=True):
    """Boxes of float32 as they come, ids in any order, in the authors' format and as ``ProposalArrays``."""
    rng = np.random.default_rng(seed)
    content = {}
    for image_id in rng.permutation(images) + 1:
        low = rng.uniform(-20, 70, (num_boxes, 2))
        boxes = np.concatenate([low, low + rng.uniform(-5, 40, (num_boxes, 2))], axis=1).astype(np.float32)
        entry = {"boxes": boxes.tolist()}
        if with_scores:
            scores = rng.uniform(0, 1, num_boxes).astype(np.float32)
            scores[:4] = [0, 1, 1e-40, 0.5]
            entry["scores"] = scores.tolist()
        if with_labels:
            entry["labels"] = rng.integers(0, 1203, num_boxes).tolist()
        content[str(image_id)] = entry
    return content, ProposalFile(write_json(tmp_path / f"random{seed}.json", content)).arrays


def test_proposals_replace_annotated_boxes(dataset, tmp_path):
    boxes = [[5, 6, 30, 40], [50, 0, 200, 20], [3, 3, 3, 9]]
    write_json(tmp_path / "p.json", {"1": {"boxes": boxes, "scores": [0.9, 0.5, 0.4]}})
    batches = list(loader(tmp_path / "p.json", dataset, "INPUT.MIN_SIZE_TEST", 96))
    proposals = batches[0][0]["proposals"]
    assert proposals.proposal_boxes.tensor.tolist() == [
        [10, 12, 60, 80],
        [100, 0, 128, 40],
    ]  # clipped, scaled, none empty
    assert proposals.scores.tolist() == pytest.approx([0.9, 0.5]) and proposals.image_size == (96, 128)
    assert [len(batch[0]["proposals"]) for batch in batches] == [2, 0, 0, 0, 0, 0]
    model = tiny_model("TEST.DETECTIONS_PER_IMAGE", 300)
    outputs = [model(batch)[0]["instances"] for batch in batches]
    assert [len(output) for output in outputs] == [8, 0, 0, 0, 0, 0]
    assert outputs[0].scores.sum().item() == pytest.approx(1.4, abs=1e-4)


def test_one_proposal_file_per_test_set(dataset, tmp_path, register):
    other = register("test_others", tmp_path / "data" / "annotations.json", tmp_path / "data" / "images")
    paths = tuple(str(write_json(tmp_path / f"{x}.json", {"1": {"boxes": [[x, 0, 30, 30]]}})) for x in (3, 7))
    cfg = config("DATASETS.TEST", (dataset, other), "DATASETS.PROPOSAL_FILES_TEST", paths)
    proposals = [next(iter(build_test_loader(cfg, name)))[0]["proposals"] for name in (dataset, other)]
    assert [x.proposal_boxes.tensor[0, 0].item() for x in proposals] == [3, 7]


def test_formats_give_identical_boxes(dataset, tmp_path):
    content, _ = random_proposals(tmp_path)
    paths = {
        format: tmp_path / f"{format}.bin" for format in FORMATS
    }  # written by hand, with names that do not tell the format
    write_json(paths["glip"], content)
    rows = []
    for image_id, entry in content.items():
        for (x0, y0, x1, y1), score, label in zip(entry["boxes"], entry["scores"], entry["labels"]):
            box = [x0, y0, x1 - x0, y1 - y0]
            rows.append({"image_id": int(image_id), "bbox": box, "score": score, "category_id": label})
    write_json(paths["coco"], [rows[i] for i in np.argsort(np.arange(len(rows)) % 40, kind="stable")])
    columns = {
        "boxes": [np.array(entry["boxes"], np.float32) for entry in content.values()],
        "scores": [np.array(entry["scores"], np.float32) for entry in content.values()],
        "labels": [np.array(entry["labels"]) for entry in content.values()],
    }
    pickled = {"ids": list(content), "bbox_mode": BoxMode.XYXY_ABS, "objectness_logits": columns["scores"], **columns}
    del pickled["scores"]
    paths["detectron2"].write_bytes(pickle.dumps(pickled))
    tensors = {key: np.concatenate(value) for key, value in columns.items()}
    tensors |= {"image_ids": np.array([int(i) for i in content]), "offsets": np.arange(7) * 40}
    save_file(tensors, paths["safetensors"], metadata={"format": "regionspot-proposals-1"})
    seen = {}
    for format, path in paths.items():
        assert ProposalFile(path).format == format
        seen[format] = [batch[0]["proposals"] for batch in loader(path, dataset, "INPUT.MIN_SIZE_TEST", 77)]
    assert sum(map(len, seen["glip"])) > 100
    for format in FORMATS:
        for one, other in zip(seen["glip"], seen[format]):
            assert one.image_size == other.image_size and one.get_fields().keys() == other.get_fields().keys()
            for key in ("scores", "proposal_labels"):
                assert one.get(key).dtype == other.get(key).dtype and torch.equal(one.get(key), other.get(key))
            one, other = one.proposal_boxes.tensor, other.proposal_boxes.tensor
            assert one.dtype == other.dtype == torch.float32
            assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def test_boxes_keep_their_scores_and_labels(tmp_path):
    content, _ = random_proposals(tmp_path, seed=3)
    file = ProposalFile(tmp_path / "random3.json")
    for key, entry in content.items():
        proposals = file.get(int(key), (48, 64))
        clipped = np.clip(np.array(entry["boxes"], np.float32), 0, [64, 48, 64, 48])
        has_area = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
        assert 0 < has_area.sum() < len(has_area)
        np.testing.assert_array_equal(proposals.proposal_boxes.tensor, clipped[has_area])
        np.testing.assert_array_equal(proposals.scores, np.array(entry["scores"], np.float32)[has_area])
        np.testing.assert_array_equal(proposals.proposal_labels, np.array(entry["labels"])[has_area])


def test_scores_and_labels_may_be_missing(tmp_path, dataset):
    for with_scores, with_labels in [(False, False), (True, False), (False, True)]:
        _, arrays = random_proposals(tmp_path, with_scores=with_scores, with_labels=with_labels)
        for format in FORMATS:
            write_proposals(tmp_path / format, format, arrays)
            fields = ProposalFile(tmp_path / format).get(1, (48, 64)).get_fields()
            expected = {"proposal_boxes"}
            expected |= {"scores"} if with_scores else set()
            expected |= {"proposal_labels"} if with_labels else set()
            assert set(fields) == expected
    batch = next(iter(loader(tmp_path / "glip", dataset)))
    assert len(tiny_model()(batch)[0]["instances"])  # the class probability alone


def test_thresholds_are_exact(tmp_path):
    """A score at the threshold stays, an IoU at the limit stays, what rounding put beside [0, 1] is no logit."""
    below = float(np.nextafter(np.float32(0.3), np.float32(0)))
    entry = {"boxes": [[0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 1.9]], "scores": [0.5, 0.3, below]}
    arrays = ProposalFile(write_json(tmp_path / "p.json", {"1": entry})).arrays
    assert len(select_proposals(arrays, min_score=0.3).boxes) == 2
    selected = select_proposals(arrays, nms_iou=0.5)
    assert selected.boxes[:, 3].tolist() == [4, 2]  # IoU 0.5 with the first, and the third of 0.95 with the second
    assert (
        len(select_proposals(arrays, nms_iou=0.499).boxes) == 2 and len(select_proposals(arrays, nms_iou=1).boxes) == 3
    )
    assert select_proposals(arrays, top_k=1).scores.tolist() == [0.5]
    with pytest.raises(ValueError, match="top-k: expected 1 or more"):
        select_proposals(arrays, top_k=0)
    for low, high, kind in ((-1e-4, 1 + 1e-4, "probabilities"), (-1.1e-4, 1, "logits"), (0, 1 + 1.1e-4, "logits")):
        entry = {"boxes": [[0, 0, 4, 4]] * 2, "scores": [low, high]}
        arrays = ProposalFile(write_json(tmp_path / "p.json", {"1": entry})).arrays
        assert arrays.scores_from == kind
    assert arrays.num_not_finite == 0
    entry = {"boxes": [[0, 0, 4, 999_999_000], [0, 0, 4, 1e9], [-1e9, 0, 4, 4]], "scores": [0.5] * 3}
    arrays = ProposalFile(write_json(tmp_path / "p.json", {"1": entry})).arrays
    assert (len(arrays.boxes), arrays.num_not_finite) == (1, 2)


def test_scores_outside_unit_interval_are_logits(tmp_path):
    logits = np.array([-3.5, 0.25, 0.75, 2000, -2000])
    entry = {"boxes": [[0, 0, 9, 9]] * 5, "scores": logits.tolist()}
    file = ProposalFile(write_json(tmp_path / "p.json", {"1": entry, "2": {"boxes": [], "scores": []}}))
    np.testing.assert_array_equal(file.scores, (1 / (1 + np.exp(-logits.clip(-700)))).astype(np.float32))
    assert file.summarize([1], [(48, 64)]).endswith("scores: logits -> sigmoid")
    entry["scores"] = [0.25, 1.00000012, 0, 1, -1e-9]  # what float32 does to probabilities
    file = ProposalFile(write_json(tmp_path / "p.json", {"1": entry}))
    assert file.scores.tolist() == [0.25, 1, 0, 1, 0] and file.arrays.scores_from == "probabilities"


def test_summary_counts_dropped_boxes(tmp_path):
    nan, inf = float("nan"), float("inf")
    boxes = [[1, 1, 9, 9], [nan, 1, 9, 9], [1, 1, inf, 9], [1, -inf, 9, 9], [70, 1, 90, 9], [5, 5, 5, 9], [9, 9, 1, 1]]
    scores = [0.5, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    content = {"1": {"boxes": boxes, "scores": scores}, "7": {"boxes": [[1, 2, 3, 4]], "scores": [nan]}}
    content["2"] = {"boxes": [[-9, -9, 0, 5], [0, 0, 1e300, 1], [-5, -5, 500, 500]], "scores": [1, 1, 1]}
    path = write_json(tmp_path / "p.json", content)
    file = ProposalFile(path)
    assert file.summarize(list(SIZES), list(SIZES.values())) == (
        f"proposals {path} (glip, sha256 {file.sha256[:12]}): 6 boxes; 2 of 3 images have an entry, 1 have none; "
        "1 unknown image ids; boxes dropped: 2 outside the image, 2 without area, 5 NaN or infinite; "
        "scores: probabilities"
    )
    assert [len(file.get(i, size)) for i, size in SIZES.items()] == [1, 1, 0]
    assert file.get(2, (30, 20)).proposal_boxes.tensor.tolist() == [[0, 0, 20, 30]]
    assert file.count_missing([1, 9, 10]) == 2
    with pytest.raises(ValueError, match="none of the 2 images.* 3 images 1, 2, 7, the data set's are 5, 6: is it"):
        file.summarize([5, 6], [(1, 1)] * 2)


@pytest.mark.parametrize("ids", [(1, 2, 9), (9, 1, 2), (2, 9, 1)])
def test_summary_with_images_in_any_order(tmp_path, ids):
    content = {str(image_id): {"boxes": [[21, 5, 60, 29], [1, 31, 19, 47]]} for image_id in SIZES}
    file = ProposalFile(write_json(tmp_path / "p.json", content))
    assert "boxes dropped: 2 outside the image, 0 without" in file.summarize(ids, [SIZES[i] for i in ids])


def test_loader_summarizes_proposals(tmp_path, dataset, caplog):
    caplog.set_level(logging.INFO, "regionspot")
    loader(write_json(tmp_path / "p.json", {str(i): {"boxes": []} for i in range(1, 7)}), dataset)
    loader(write_json(tmp_path / "q.json", {"3": {"boxes": [[1, 1, 2, 2]]}, "99": {"boxes": []}}), dataset)
    records = [record for record in caplog.records if record.message.startswith("proposals ")]
    assert [record.levelname for record in records] == ["INFO", "WARNING"]
    assert "1 of 6 images have an entry, 5 have none; 1 unknown image ids" in records[1].message
    with pytest.raises(ValueError, match="is it the right file"):
        loader(write_json(tmp_path / "p.json", {"99": {"boxes": []}}), dataset)
    with pytest.raises(ValueError, match="one file for each of 1 test sets, or none; got 2"):
        build_test_loader(config("DATASETS.PROPOSAL_FILES_TEST", ("a", "b")), dataset)
    with pytest.raises(ValueError, match="MODEL.LOAD_PROPOSALS"):
        loader(tmp_path / "q.json", dataset, "MODEL.LOAD_PROPOSALS", True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("hello", "got a file that begins with b'hello'"),
        ("{", "not valid JSON"),
        ('{"1": {"boxes": [[1, 2, 3, 4]]}', "not valid JSON.*cut short"),
        ('[{"image_id": 1, "bbox": [1, 2, 3, 4]}, ', "not valid JSON.*cut short"),
        ('{"1": {}}', "image 1: object missing required field `boxes`"),
        ('{"1": {"boxes": [[1, 2, 3]]}}', r"image 1: boxes\[0\]: expected `array` of length 4"),
        ('{"1": {"boxes": [[1, 2, 3, 4], [1, 2, 3, "4"]]}}', r"image 1: boxes\[1\]\[3\]: expected `float`, got `str`"),
        ('{"1": {"boxes": [[1, 2, 3, 4]], "scores": []}}', "image 1: expected as many scores.* 1 boxes and 0 scores"),
        ('{"1": {"boxes": [[1,2,3,4]]}, "2": {"boxes": [[1,2,3,4]], "scores": [1]}}', "image 2: expected as many"),
        ('{"1": {"boxes": [[1,2,3,4]], "labels": ["cup"]}}', r"image 1: labels\[0\]: expected `int`, got `str`"),
        ('{"cup.jpg": {"boxes": []}}', "expected image ids .integers. as keys, got 'cup.jpg'"),
        ('{"1": {"boxes": []}, "01": {"boxes": []}}', "image id 1 occurs twice"),
        ('{"images": [], "annotations": [], "categories": []}', "got annotations"),
        ('{"1": ' + "[" * 100000, "nested too deep"),
        ('[{"image_id": 1, "bbox": [1, 2, 3, 4]}, {"image_id": 1}]', r"entry 1: object missing required field `bbox`"),
        ('[{"image_id": "1", "bbox": [1, 2, 3, 4]}]', r"entry 0.image_id: expected `int`, got `str`"),
        (
            '[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 1}, {"image_id": 1, "bbox": [1, 2, 3, 4]}]',
            "1 of the first 2",
        ),
        ("[[1, 2, 3, 4]]", r"entry 0: expected `object`, got `array`"),
    ],
)
def test_invalid_json_is_refused(tmp_path, content, message):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        ProposalFile(tmp_path / "p.json")
    assert str(tmp_path / "p.json") in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        ProposalFile(tmp_path / "no.json")


def test_files_without_boxes(tmp_path):
    for text in ("{}", "[]", " [ ]", "\ufeff{}", '{"5": {"boxes": [], "scores": []}}'):
        (tmp_path / "p.json").write_text(text)
        assert len(ProposalFile(tmp_path / "p.json").get(5, (4, 4))) == 0


@pytest.mark.parametrize("num_bytes", [64, 200, 1 << 23])
def test_chunks_split_anywhere(tmp_path, monkeypatch, num_bytes):
    monkeypatch.setattr(json_file, "CHUNK_BYTES", num_bytes)
    entries = [
        {"image_id": i % 3, "note": '}, {"x"', "more": [{}, {"a": [{}, {}]}], "bbox": [i, i, 2, 2], "score": i / 99}
        for i in range(50)
    ]
    plain = [{key: entry[key] for key in ("image_id", "bbox", "score")} for entry in entries]
    for content in (plain, plain[:30] + entries, plain + entries[:1] + plain):
        for indent in (None, 2):
            (tmp_path / "p.json").write_text(json.dumps(content, indent=indent))
            file = ProposalFile(tmp_path / "p.json")
            assert sorted(file.boxes[:, 0].tolist()) == sorted(entry["bbox"][0] for entry in content)
        content = [*content, {"image_id": 1, "bbox": [1, 2, 3]}]
        with pytest.raises(ValueError, match=rf"entry {len(content) - 1}.bbox: expected"):
            ProposalFile(write_json(tmp_path / "p.json", content))
        content[-1] = {"image_id": 1, "bbox": [1, 2, 3, float("nan")], "score": float("-inf")}
        assert ProposalFile(write_json(tmp_path / "p.json", content)).arrays.num_not_finite == 1


def test_masks_are_kept_on_request(tmp_path):
    entries = [{"image_id": i, "bbox": [i, i, 2, 2], "score": 0.5} for i in (3, 1, 2, 1)]
    for i, entry in enumerate(entries[:3]):
        entry["segmentation"] = {"size": [48, 64], "counts": f"abc{i}"}
    path = write_json(tmp_path / "p.json", entries)
    assert ProposalFile(path).arrays.rles is None
    arrays = ProposalFile(path, with_masks=True).arrays
    assert [rle and rle["counts"] for rle in arrays.rles] == ["abc1", None, "abc2", "abc0"]
    write_proposals(tmp_path / "q.json", "coco", select_proposals(arrays, top_k=1))
    again = ProposalFile(tmp_path / "q.json", with_masks=True).arrays
    assert [rle["counts"] for rle in again.rles] == ["abc1", "abc2", "abc0"] and again.rles[0]["size"] == [48, 64]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": None}, "a tensor 'boxes', which is missing"),
        ({"boxes": np.zeros((3, 5), np.float32)}, r"boxes: expected F32 \(N, 4\), got F32 \(3, 5\)"),
        ({"boxes": np.zeros((3, 4))}, "got F64"),
        ({"scores": np.zeros(2, np.float32)}, "scores: expected 3 numbers, got 2"),
        ({"offsets": np.array([0, 5, 3])}, "offsets: expected numbers that grow from 0 to 3"),
        ({"offsets": np.array([0, 3])}, "offsets: expected 3 numbers, got 2"),
        ({"image_ids": np.array([4, 4])}, "image id 4 occurs twice"),
    ],
)
def test_invalid_tensors_are_refused(tmp_path, change, message):
    tensors = {"image_ids": np.array([4, 2]), "offsets": np.array([0, 1, 3]), "boxes": np.ones((3, 4), np.float32)}
    tensors["boxes"][:, 2:] = [[5, 6], [7, 8], [9, 9]]
    path, metadata = tmp_path / "p.safetensors", {"format": "regionspot-proposals-1"}
    save_file(tensors, path, metadata=metadata)
    assert ProposalFile(path).get(4, (9, 9)).proposal_boxes.tensor.tolist() == [[1, 1, 5, 6]]
    tensors = {key: value for key, value in (tensors | change).items() if value is not None}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        ProposalFile(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="expected safetensors of format 'regionspot-proposals-1', got None"):
        ProposalFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged safetensors"):
        ProposalFile(path)
