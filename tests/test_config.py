"""Every shipped config loads and builds; sizes are those of the official models and of the paper."""

import pytest
import torch
from clip.model import build_model as build_official_clip
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from segment_anything import sam_model_registry

from regionspot.config import load_config
from regionspot.modeling import RegionSpot
from regionspot.modeling.sam import SAM_SIZES, build_sam
from regionspot.modeling.vision_language import CLIP_SIZES, build_clip

from .helpers import ROOT, tiny_config

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def build_on_meta(path, *overrides):
    with torch.device("meta"):
        return build_model(load_config(path, ["MODEL.DEVICE", "meta", *overrides]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_builds(path):
    assert isinstance(build_on_meta(path), RegionSpot)


@pytest.mark.parametrize(
    ("name", "millions"), [("RegionSpot-BB", 24.2), ("RegionSpot-BL", 38.9), ("RegionSpot-BL-336", 38.9)]
)
def test_trained_parameters_are_as_many_as_in_the_paper(name, millions):
    model = build_on_meta(ROOT / f"configs/{name}.yaml")
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert all(key.startswith("recognizer.knowledge_integration.") for key in trained)
    assert sum(value.numel() for value in trained.values()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", SAM_SIZES)
def test_sam_has_the_official_layout(name):
    with torch.device("meta"):
        ours, official = build_sam(SAM_SIZES[name]), sam_model_registry[name]()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in official.state_dict().items()}


@pytest.mark.parametrize("name", CLIP_SIZES)
def test_clip_has_the_layout_that_its_package_builds_from_a_state_dict(name):
    with torch.device("meta"):
        state = build_clip(CLIP_SIZES[name]).state_dict()
        official = build_official_clip(dict(state))
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in official.state_dict().items()}


@pytest.mark.parametrize(
    ("builder", "feature", "side", "channels", "stride"),
    [("SamImageEncoder", "sam", 64, 32, 8), ("ClipImageEncoder", "clip", 32, 64, 8)],
)
def test_image_encoders_are_backbones(builder, feature, side, channels, stride):
    backbone = build_backbone(tiny_config("MODEL.BACKBONE.NAME", builder), ShapeSpec(channels=3))
    features = backbone(torch.zeros(2, 3, side, side))
    assert backbone.output_shape() == {feature: ShapeSpec(channels=channels, stride=stride)}
    assert features[feature].shape == (2, channels, side // stride, side // stride)
    assert backbone.padding_constraints == {"square_size": side}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.REGIONSPOT.SAM.NAME", "vit_x", "vit_b, vit_l, vit_h, custom"),
        ("MODEL.REGIONSPOT.CLIP.NAME", "RN50", "ViT-B/16"),
        ("MODEL.REGIONSPOT.TOKEN_STAGE", "decoder", "prompt_encoder, transformer, mlp"),
        ("MODEL.REGIONSPOT.CLIP.FEATURES", "all", "none, feature_map"),
        ("MODEL.REGIONSPOT.CLIP.TEMPLATES", "two", "all, one, none"),
        ("MODEL.REGIONSPOT.CLIP.NAME_STYLE", "pretty", "dataset"),
        ("MODEL.REGIONSPOT.SCORE_FUNCTION", "relu", "softmax or sigmoid"),
        ("MODEL.REGIONSPOT.SAM.PROMPT_CHUNK", 0, "at least 1"),
        ("MODEL.REGIONSPOT.CLIP.CUSTOM.WIDTH", 80, "multiple of 64"),
        ("INPUT.FORMAT", "L", "RGB or BGR"),
    ],
)
def test_wrong_value_is_refused_with_the_alternatives(key, value, message):
    with pytest.raises(ValueError, match=message):
        model = build_model(tiny_config(key, value))
        model.set_vocabulary(["a"])


def test_missing_config_file_and_unknown_key_are_refused():
    with pytest.raises(FileNotFoundError, match="configs/"):
        load_config("no.yaml")
    with pytest.raises(ValueError, match="NO_SUCH_KEY"):
        tiny_config("MODEL.NO_SUCH_KEY", 1)
