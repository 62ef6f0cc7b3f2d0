"""Detectors' weights of other forms than Detectron2's."""

import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn

from regionspot.checkpoint.detector import SafeDetectionCheckpointer

CYCLE: dict = {"model": {}}
CYCLE["model"]["more"] = CYCLE


@pytest.mark.parametrize(
    "content",
    [[1, 2], None, {"blobs": [1]}, {"model": [1], "__author__": "x"}, {"model": 5, "__author__": "x"}, CYCLE, "text"],
    ids=repr,
)
def test_pickles_of_another_form_are_refused(tmp_path, content):
    (tmp_path / "detector.pkl").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ValueError, match="detector.pkl: "):
        SafeDetectionCheckpointer(nn.Linear(2, 1)).load(str(tmp_path / "detector.pkl"))


@pytest.mark.parametrize("content", [{"model": [1]}, {"model": 5}, {"model": {1: torch.ones(1)}}], ids=repr)
def test_checkpoints_of_another_form_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "detector.pth")
    with pytest.raises(ValueError, match=re.escape("detector.pth: expected a detector's weights by name")):
        SafeDetectionCheckpointer(nn.Linear(2, 1)).load(str(tmp_path / "detector.pth"))


def test_a_pickle_of_the_model_zoo_is_loaded(tmp_path):
    arrays = {"weight": np.array([[3, 4]], np.float32), "bias": np.array([5], np.float32)}
    (tmp_path / "detector.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, 2))
    model = nn.Linear(2, 1)
    SafeDetectionCheckpointer(model).load(str(tmp_path / "detector.pkl"))
    assert model.weight.tolist() == [[3, 4]] and model.bias.tolist() == [5]
