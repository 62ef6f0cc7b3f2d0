"""Released checkpoints, our own, those of detectors, and files that are none of them."""

import pickle
import re

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from safetensors.torch import save_file
from torch import nn

from regionspot.checkpoint.checkpointer import RegionSpotCheckpointer, SafeDetectionCheckpointer
from regionspot.checkpoint.key_layout import TRAINED

from ..helpers import as_inputs, released_state, tiny_model


def logits_of(model):
    [instances] = (output["instances"] for output in model([as_inputs(0)]))
    return instances.scores


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A released checkpoint with its frozen parts, one without, and files of these parts alone."""
    directory, model = tmp_path_factory.mktemp("released"), tiny_model()
    state = released_state(model)
    torch.save({"model": state, "iteration": 449999}, directory / "whole.pth")
    torch.save(
        {"model": {k: v for k, v in state.items() if not k.startswith(("model.sam.", "model.clip_model."))}},
        directory / "trained.pth",
    )
    torch.save(
        {k.removeprefix("model.sam."): v for k, v in state.items() if k.startswith("model.sam.")},
        directory / "sam.pth",
    )
    torch.save(
        {k.removeprefix("model.clip_model."): v for k, v in state.items() if k.startswith("model.clip_model.")},
        directory / "clip.pth",
    )
    return directory


@pytest.fixture
def released(files, tmp_path):
    """The files, in the test's own directory."""
    for path in files.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    return tmp_path


def frozen_files(directory):
    return {"sam_weights": str(directory / "sam.pth"), "clip_weights": str(directory / "clip.pth")}


def test_released_checkpoint_without_frozen_parts(released):
    whole, trained = tiny_model(), tiny_model()
    RegionSpotCheckpointer(whole).load(str(released / "whole.pth"))
    RegionSpotCheckpointer(trained, **frozen_files(released)).load(str(released / "trained.pth"))
    expected = released_state(whole)
    for model in (whole, trained):
        for key, value in released_state(model).items():
            assert torch.equal(value, expected[key])
    torch.testing.assert_close(logits_of(whole), logits_of(trained), atol=0, rtol=0)
    key = "recognizer.localizer.sam.mask_decoder.iou_token.weight"
    assert torch.equal(whole.state_dict()[key], expected["model.sam.mask_decoder.iou_token.weight"])


def test_detectron2_reads_released_layout(released):
    by_ours, by_detectron2 = tiny_model(), tiny_model()
    RegionSpotCheckpointer(by_ours).load(str(released / "whole.pth"))
    DetectionCheckpointer(by_detectron2).load(str(released / "whole.pth"))
    torch.testing.assert_close(logits_of(by_ours), logits_of(by_detectron2), atol=0, rtol=0)


def test_saved_checkpoint_holds_trained_parts_only(released, tmp_path):
    model = tiny_model()
    files = frozen_files(released)
    RegionSpotCheckpointer(model, **files).load(str(released / "trained.pth"))
    RegionSpotCheckpointer(model, str(tmp_path / "out")).save("model", iteration=3)
    content = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    assert all(key.startswith(("model.to_clip.", "model.decoder.", "model.projector.")) for key in content["model"])
    assert set(content["frozen"]) == {"sam", "clip_model"}
    other = tiny_model()
    torch.nn.init.normal_(other.recognizer.knowledge_integration.to_clip.weight)
    checkpointer = RegionSpotCheckpointer(other, str(tmp_path / "out"), **files)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 3
    torch.testing.assert_close(logits_of(model), logits_of(other), atol=0, rtol=0)


def test_recorded_frozen_sources_are_loaded(released, tmp_path):
    """A checkpoint fine-tuned from one with SAM and CLIP loads without any other file named."""
    model = tiny_model()
    checkpointer = RegionSpotCheckpointer(model, str(tmp_path / "out"))
    checkpointer.load(str(released / "whole.pth"))
    assert all(model.recognizer.weight_sources.values())
    checkpointer.save("model")
    other = tiny_model()
    RegionSpotCheckpointer(other).load(str(tmp_path / "out" / "model.pth"))
    torch.testing.assert_close(logits_of(model), logits_of(other), atol=0, rtol=0)
    # The same file may also be named as the source of SAM and CLIP.
    third = tiny_model()
    whole = str(released / "whole.pth")
    RegionSpotCheckpointer(third, sam_weights=whole, clip_weights=whole).load(str(released / "trained.pth"))
    torch.testing.assert_close(logits_of(model), logits_of(third), atol=0, rtol=0)


def test_configured_files_precede_recorded_ones(released, tmp_path):
    model, files = tiny_model(), frozen_files(released)
    RegionSpotCheckpointer(model, str(tmp_path / "out"), **files).load(str(released / "trained.pth"))
    recorded = {**files, "sam_weights": str(tmp_path / "once.pth")}
    (tmp_path / "once.pth").write_bytes((released / "sam.pth").read_bytes())
    checkpointer = RegionSpotCheckpointer(model, str(tmp_path / "out"), **recorded)
    checkpointer.load(str(released / "trained.pth"))
    checkpointer.save("model")
    torch.save(tiny_model().recognizer.localizer.sam.state_dict(), tmp_path / "once.pth")  # overwritten since
    other = tiny_model()
    RegionSpotCheckpointer(other, **files).load(str(tmp_path / "out" / "model.pth"))
    torch.testing.assert_close(logits_of(model), logits_of(other), atol=0, rtol=0)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state, model: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state, model: {"state_dict": state},
        lambda state, model: {"model": {key: value.half() for key, value in state.items()}},
        lambda state, model: {"model": model.state_dict()},
    ],
    ids=["DDP", "state_dict", "half", "whole model"],
)
def test_wrapped_checkpoints_load(released, tmp_path, wrap):
    source = tiny_model()
    RegionSpotCheckpointer(source).load(str(released / "whole.pth"))
    torch.save(wrap(released_state(source), source), tmp_path / "wrapped.pth")
    model = tiny_model()
    RegionSpotCheckpointer(model).load(str(tmp_path / "wrapped.pth"))
    torch.testing.assert_close(logits_of(source), logits_of(model), atol=2e-3, rtol=0)


def test_safetensors_checkpoint_loads(released, tmp_path):
    model = tiny_model()
    save_file({key: value.contiguous() for key, value in released_state(model).items()}, tmp_path / "x.safetensors")
    assert RegionSpotCheckpointer(model).load(str(tmp_path / "x.safetensors")) == {}
    assert torch.equal(model.recognizer.knowledge_integration.to_clip.bias, released_state(model)["model.to_clip.bias"])


def test_refused_checkpoint_leaves_model_unchanged(released, tmp_path):
    model = tiny_model()
    RegionSpotCheckpointer(model, **frozen_files(released)).load(str(released / "trained.pth"))
    RegionSpotCheckpointer(model, str(tmp_path / "out")).save("model")
    (released / "sam.pth").unlink()  # or it would be loaded, as the recorded source
    other = tiny_model()
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match="another sam"):
        RegionSpotCheckpointer(other).load(str(tmp_path / "out" / "model.pth"))
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_other_frozen_parts_are_refused(released, tmp_path):
    model = tiny_model()
    RegionSpotCheckpointer(model, **frozen_files(released)).load(str(released / "trained.pth"))
    RegionSpotCheckpointer(model, str(tmp_path / "out")).save("model")
    expected = torch.load(tmp_path / "out" / "model.pth", weights_only=True)["frozen"]["sam"]["fingerprint"][:12]
    torch.save(
        {k: v + 1 for k, v in torch.load(released / "sam.pth", weights_only=True).items()}, tmp_path / "other_sam.pth"
    )
    sources = {**frozen_files(released), "sam_weights": str(tmp_path / "other_sam.pth")}
    with pytest.raises(ValueError, match=rf"another sam: .*{expected}, got \w{{12}} .*other_sam.pth"):
        RegionSpotCheckpointer(tiny_model(), **sources).load(str(tmp_path / "out" / "model.pth"))


def test_interrupted_save_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    checkpointer = RegionSpotCheckpointer(tiny_model(), str(tmp_path))
    checkpointer.save("model_0")

    def save_half(data, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_half)
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0.pth"]
    assert checkpointer.get_checkpoint_file().endswith("model_0.pth")


def save(path, content):
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda d: str(d / "no.pth"), FileNotFoundError, "no such file"),
        (
            lambda d: save(d / "x.pth", {"model": {"backbone.weight": torch.zeros(1)}}),
            ValueError,
            "no RegionSpot checkpoint.*to_clip",
        ),
        (lambda d: save(d / "x.pth", [1, 2]), ValueError, "expected a dict"),
        (lambda d: (d / "x.pth").write_bytes(b"garbage") and str(d / "x.pth"), ValueError, "cannot be read as weights"),
        (
            lambda d: (d / "x.safetensors").write_bytes(b"garbage") and str(d / "x.safetensors"),
            ValueError,
            "cannot be read as weights",
        ),
        (
            lambda d: save(d / "x.pth", {"model": {"model.to_clip.weight": torch.zeros(64, 32)}}),
            ValueError,
            "is missing",
        ),
        (lambda d: save(d / "x.pth", {"model": [1]}), ValueError, "expected a dict of weights, got list"),
        (
            lambda d: save(d / "x.pth", {"model": released_state(tiny_model()), "frozen": {"dino": 1}}),
            ValueError,
            "'frozen' is damaged",
        ),
    ],
    ids=["missing", "another model", "no dict", "garbage", "garbage safetensors", "incomplete", "a list", "odd frozen"],
)
def test_wrong_checkpoint_is_refused(tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        RegionSpotCheckpointer(tiny_model()).load(make(tmp_path))


def test_checkpoint_of_another_variant_is_refused(released):
    model = tiny_model("MODEL.REGIONSPOT.INTEGRATION.DEPTH", 2)
    before = {k: v.clone() for k, v in model.state_dict().items() if TRAINED in k}
    with pytest.raises(ValueError, match="same variant"):
        RegionSpotCheckpointer(model).load(str(released / "trained.pth"))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if k in before)


class Evil:
    def __reduce__(self):
        return (open, ("evil.txt", "w"))


def test_checkpoint_with_a_call_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        RegionSpotCheckpointer(tiny_model()).load(save(tmp_path / "x.pth", {"model": Evil()}))
    assert not (tmp_path / "evil.txt").exists()


def test_whole_model_with_another_recognizer(released):
    model = tiny_model()
    state = {f"roi_heads.{key}": value for key, value in released_model(released).state_dict().items()}
    state |= {"speller.recognizer.conv.weight": torch.zeros(3), "decoder.layers.0.weight": torch.zeros(3)}
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, released / "joint.pth")
    RegionSpotCheckpointer(model).load(str(released / "joint.pth"))
    torch.testing.assert_close(logits_of(model), logits_of(released_model(released)), atol=0, rtol=0)


def released_model(directory):
    model = tiny_model()
    RegionSpotCheckpointer(model).load(str(directory / "whole.pth"))
    return model


CYCLE: dict = {"model": {}}
CYCLE["model"]["more"] = CYCLE


@pytest.mark.parametrize(
    "content",
    [[1, 2], None, {"blobs": [1]}, {"model": [1], "__author__": "x"}, {"model": 5, "__author__": "x"}, CYCLE, "text"],
    ids=repr,
)
def test_invalid_detector_pickle_is_refused(tmp_path, content):
    (tmp_path / "detector.pkl").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(ValueError, match="detector.pkl: "):
        SafeDetectionCheckpointer(nn.Linear(2, 1)).load(str(tmp_path / "detector.pkl"))


@pytest.mark.parametrize("content", [{"model": [1]}, {"model": 5}, {"model": {1: torch.ones(1)}}], ids=repr)
def test_invalid_detector_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "detector.pth")
    with pytest.raises(ValueError, match=re.escape("detector.pth: expected a detector's weights by name")):
        SafeDetectionCheckpointer(nn.Linear(2, 1)).load(str(tmp_path / "detector.pth"))


def test_model_zoo_pickle_loads(tmp_path):
    arrays = {"weight": np.array([[3, 4]], np.float32), "bias": np.array([5], np.float32)}
    (tmp_path / "detector.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, 2))
    model = nn.Linear(2, 1)
    SafeDetectionCheckpointer(model).load(str(tmp_path / "detector.pkl"))
    assert model.weight.tolist() == [[3, 4]] and model.bias.tolist() == [5]
