"""Proposal files, and what the model makes of them."""

import json

import pytest

from regionspot.data import build_test_loader
from regionspot.data.proposals import ProposalFile

from ..helpers import tiny_config, tiny_model, write_dataset

NAME = "test_proposals"


@pytest.fixture
def dataset(tmp_path, register):
    return register(NAME, write_dataset(tmp_path / "data", 6), tmp_path / "data" / "images")


def config(*overrides):
    return tiny_config("DATASETS.TRAIN", (NAME,), "DATASETS.TEST", (NAME,), "SOLVER.IMS_PER_BATCH", 6, *overrides)


def test_proposal_file_takes_the_place_of_the_annotated_boxes(dataset, tmp_path):
    boxes = [[5, 6, 30, 40], [50, 0, 200, 20], [3, 3, 3, 9]]
    (tmp_path / "p.json").write_text(json.dumps({"1": {"boxes": boxes, "scores": [0.9, 0.5, 0.4]}}))
    cfg = config("DATASETS.PROPOSAL_FILES_TEST", (str(tmp_path / "p.json"),), "INPUT.MIN_SIZE_TEST", 96)
    batches = list(build_test_loader(cfg, dataset))
    proposals = batches[0][0]["proposals"]
    assert proposals.proposal_boxes.tensor.tolist() == [[10, 12, 60, 80], [100, 0, 128, 40]]  # cut, scaled, none empty
    assert proposals.scores.tolist() == pytest.approx([0.9, 0.5]) and proposals.image_size == (96, 128)
    assert [len(batch[0]["proposals"]) for batch in batches] == [2, 0, 0, 0, 0, 0]
    model = tiny_model("TEST.DETECTIONS_PER_IMAGE", 300)
    outputs = [model(batch)[0]["instances"] for batch in batches]
    assert [len(output) for output in outputs] == [8, 0, 0, 0, 0, 0]
    assert outputs[0].scores.sum().item() == pytest.approx(1.4, abs=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "got list"),
        ('{"1": {}}', "image 1 has no readable boxes"),
        ('{"1": {"boxes": [[1, 2, 3]]}}', "image 1 has no readable boxes"),
        ('{"1": {"boxes": [[1, 2, 3, NaN]]}}', "finite boxes"),
        ('{"1": {"boxes": [[1, 2, 3, 4]], "scores": [7]}}', r"scores in \[0, 1\]"),
        ('{"1": {"boxes": [[1, 2, 3, 4]], "scores": []}}', "as many scores"),
    ],
)
def test_wrong_proposal_files_are_refused(tmp_path, content, message):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        ProposalFile(tmp_path / "p.json")
    with pytest.raises(FileNotFoundError):
        ProposalFile(tmp_path / "no.json")
