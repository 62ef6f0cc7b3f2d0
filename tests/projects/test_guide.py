"""The snippets of projects/README.md work, on detectors that no project prepared."""

import re

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

import regionspot
from regionspot.config import load_config
from regionspot.modeling import RegionRecognizer, freeze_host

from ..helpers import ROOT, TINY, as_inputs, released_state, tiny_config, tiny_model

NO_HEAD = ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_HEADS.NAME", "StandardROIHeads")
GUIDE = re.findall(r"```python\n(.*?)```", (ROOT / "projects" / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A user's directory: a detector, its weights, and a RegionSpot checkpoint."""
    host = load_config(ROOT / "tests" / "tiny_rcnn.yaml", [*NO_HEAD])
    (tmp_path / "your_detector.yaml").write_text(host.dump())
    DetectionCheckpointer(build_model(host), str(tmp_path)).save("your_detector")
    torch.save({"model": released_state(tiny_model())}, tmp_path / "regionspot_bb.pth")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "RegionSpot-BB.yaml").write_text(f"_BASE_: {TINY}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_guide_has_three_snippets():
    assert len(GUIDE) == 3
    assert sum(bool(line.strip()) for line in GUIDE[0].splitlines()) <= 20


def test_head_of_generalized_rcnn(directory, capsys):
    image = as_inputs(0)["image"].flip(0)
    scope = {"image": image, "height": 96, "width": 128}
    exec(GUIDE[0], scope)
    detections = scope["output"]["instances"]
    assert detections.image_size == (96, 128) and set(detections.pred_classes.tolist()) == {0, 1, 2}
    assert "tensor(" in capsys.readouterr().out
    model = scope["model"]
    assert model.roi_heads.recognizer.vocabulary == ["cup", "saucer"]
    state, expected = model.state_dict(), torch.load(directory / "your_detector.pth", weights_only=True)["model"]
    shared = set(state) & set(expected)
    assert len(shared) > 50 and all(torch.equal(state[key], expected[key]) for key in shared)
    [again] = model([{"image": image}])
    assert set(again["instances"].pred_classes.tolist()) == {0, 1}


def test_default_predictor(directory):
    """``DefaultPredictor`` builds the model, loads the host's weights and resizes the image by itself."""
    cfg = load_config(directory / "your_detector.yaml", ["MODEL.WEIGHTS", "your_detector.pth"])
    cfg.MODEL.ROI_HEADS.NAME = "RegionSpotROIHeads"
    cfg.MODEL.REGIONSPOT.HEAD.WEIGHTS = "regionspot_bb.pth"
    cfg.MODEL.REGIONSPOT.VOCABULARY = "cup, saucer"
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TEST = 96
    bgr = as_inputs(0)["image"].flip(0).permute(1, 2, 0).numpy()
    detections = DefaultPredictor(cfg)(bgr)["instances"]
    assert len(detections) and set(detections.pred_classes.tolist()) <= {0, 1}
    assert detections.pred_masks.shape == (len(detections), 48, 64)


def test_recognizer_beside_another_detector(directory):
    overrides = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"]
    overrides += ["MODEL.RETINANET.IN_FEATURES", "('p3', 'p4')", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]
    torch.manual_seed(0)
    detector = build_model(load_config(ROOT / "tests" / "tiny_rcnn.yaml", overrides)).eval()
    inputs = as_inputs(0)
    scope = {"detector": detector, "image": inputs["image"].flip(0)}
    with torch.no_grad():
        exec(GUIDE[1], scope)
    named = scope["named"]
    assert len(named) and named.pred_masks.shape == (len(named), 48, 64) and named.pred_classes.max() == 2
    recognizer = scope["recognizer"]

    holder = torch.nn.Module()
    holder.detector, holder.recognizer = detector, recognizer
    freeze_host(holder)
    learning = {key for key, value in holder.named_parameters() if value.requires_grad}
    assert learning and all(key.startswith("recognizer.knowledge_integration.") for key in learning)
    target = inputs["instances"]
    scope = {"recognizer": recognizer, "images": [inputs["image"]], "boxes": [target.gt_boxes]}
    scope["classes"] = [target.gt_classes.clamp(max=2)]
    exec(GUIDE[2], scope)
    assert scope["loss"].requires_grad


def test_pretrained_recognizer_has_all_weights(directory):
    recognizer = RegionRecognizer.from_pretrained(
        load_config(directory / "configs" / "RegionSpot-BB.yaml"), "regionspot_bb.pth"
    )
    expected = released_state(tiny_model())
    state = recognizer.state_dict()
    assert torch.equal(state["knowledge_integration.to_clip.weight"], expected["model.to_clip.weight"])
    key = "sam.mask_decoder.iou_token.weight"
    assert torch.equal(state[f"localizer.{key}"], expected[f"model.{key}"])
    assert set(recognizer.weight_sources.values()) == {"regionspot_bb.pth"}
    with pytest.warns(DeprecationWarning, match="RegionRecognizer.from_pretrained"):
        regionspot.load_recognizer(tiny_config())
