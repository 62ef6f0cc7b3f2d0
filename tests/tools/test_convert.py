"""`regionspot convert proposals` as a user runs it."""

import itertools
import json
import re
import stat

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou, nms

from regionspot.data.proposals import FORMATS, ProposalFile
from regionspot_cli.commands import COMMANDS

from ..data.test_proposals import random_proposals

CONVERT = COMMANDS["convert"]


def same_bits(one, other):
    for key in ("image_ids", "offsets", "boxes", "scores", "labels"):
        left, right = getattr(one.arrays, key), getattr(other.arrays, key)
        assert left.dtype == right.dtype and left.tobytes() == right.tobytes(), key


def test_conversion_between_all_formats_is_lossless(tmp_path, capsys):
    random_proposals(tmp_path)
    first = ProposalFile(tmp_path / "random0.json")
    (tmp_path / "in").mkdir()
    for format in FORMATS:
        CONVERT.call("proposals", tmp_path / "random0.json", tmp_path / "in" / format, "--to", format)
        assert f"{format} ({format}): 240 boxes of 6 images, of 240 in " in capsys.readouterr().out
    for source, target in itertools.product(FORMATS, FORMATS):
        path = tmp_path / f"{source}-{target}"
        CONVERT.call("proposals", tmp_path / "in" / source, path, "--to", target)
        assert ProposalFile(path).format == target
        same_bits(first, ProposalFile(path))
        assert path.read_bytes() == (tmp_path / "in" / target).read_bytes()  # whatever it was made from
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "random0.json").stat().st_mode)
    assert not list(tmp_path.glob(".*"))


def test_format_from_suffix(tmp_path, capsys):
    random_proposals(tmp_path)
    for name, format in [("a.json", "glip"), ("a.pkl", "detectron2"), ("a.safetensors", "safetensors")]:
        CONVERT.call("proposals", tmp_path / "random0.json", tmp_path / name)
        assert ProposalFile(tmp_path / name).format == format
    with pytest.raises(SystemExit):
        CONVERT.call("proposals", tmp_path / "random0.json", tmp_path / "a.bin")
    assert "--to FORMAT" in capsys.readouterr().err


@pytest.mark.parametrize("with_labels", [False, True])
def test_top_k_nms_and_min_score(tmp_path, with_labels):
    rng = np.random.default_rng(5)
    content = {}
    for image_id in (7, 2):
        low = rng.uniform(0, 20, (60, 2))
        boxes = np.concatenate([low, low + rng.uniform(10, 30, (60, 2))], axis=1).astype(np.float32)
        entry = {"boxes": boxes.tolist(), "scores": rng.integers(0, 99, 60).astype(np.float32).tolist()}
        entry["scores"] = [score / 128 for score in entry["scores"]]
        if with_labels:
            entry["labels"] = rng.integers(0, 3, 60).tolist()
        content[str(image_id)] = entry
    source, target = tmp_path / "p.json", tmp_path / "q.json"
    source.write_text(json.dumps(content))

    CONVERT.call("proposals", source, target, "--top-k", 10)
    for key, entry in json.loads(target.read_text()).items():
        best = sorted(np.argsort(-np.array(content[key]["scores"]), kind="stable")[:10])
        assert entry == {name: [column[i] for i in best] for name, column in content[key].items()}

    CONVERT.call("proposals", source, target, "--nms", 0.5, "--min-score", 0.25, "--top-k", 15)
    for key, entry in json.loads(target.read_text()).items():
        original = content[key]
        labels = np.array(original.get("labels", [0] * 60))
        scores = torch.tensor(original["scores"])
        selected = []
        for label in set(labels.tolist()):
            rows = np.flatnonzero((labels == label) & (scores.numpy() >= 0.25))
            selected += rows[nms(torch.tensor(original["boxes"])[rows], scores[rows], 0.5).numpy()].tolist()
        selected = sorted(sorted(sorted(selected), key=lambda i: -original["scores"][i])[:15])
        assert entry == {name: [column[i] for i in selected] for name, column in original.items()}
        if not with_labels:
            boxes = torch.tensor(entry["boxes"])
            assert (box_iou(boxes, boxes) - torch.eye(len(boxes))).max() <= 0.5


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "no such file"),
        ("{", [], "not valid JSON"),
        ('{"1": {"boxes": [[1, 2, 3, 4]]}}', ["--top-k", "3"], "need scores"),
        ('{"1": {"boxes": [[1, 2, 3, 4]], "scores": [1]}}', ["--top-k", "0"], "expected 1 or more, got 0"),
        ('{"1": {"boxes": [[1, 2, 3, 4]], "scores": [1]}}', ["--nms", "7"], r"expected a number in \[0, 1\], got 7"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, content, arguments, message):
    if content is not None:
        (tmp_path / "p.json").write_text(content)
    with pytest.raises(SystemExit) as caught:
        CONVERT.run(["proposals", str(tmp_path / "p.json"), str(tmp_path / "q.pkl"), *arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error) and not (tmp_path / "q.pkl").exists()
