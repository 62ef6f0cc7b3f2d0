"""Shipped configs load and build; sizes match the official models and the paper."""

import functools

import pytest
import torch
from clip.model import build_model as build_official_clip
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN, StandardROIHeads, build_backbone, build_model
from segment_anything import sam_model_registry

from regionspot.config import load_config
from regionspot.modeling import RegionSpot, RegionSpotRCNN, RegionSpotROIHeads
from regionspot.modeling.localizers.build_sam import SAM_SIZES, build_sam
from regionspot.modeling.vision_language.clip import CLIP_SIZES, build_clip

from .helpers import ROOT, flat, tiny_config

FRAGMENTS = ("Stage1", "Stage2")  # to be merged into a model's config
MINIWORLD = ROOT / "projects" / "MiniWorld" / "configs"
CONFIGS = [
    path
    for path in sorted([*(ROOT / "configs").rglob("*.yaml"), *MINIWORLD.rglob("*.yaml")])
    if path.stem not in FRAGMENTS and path.parent.name != "variants"
]


def build_on_meta(path, *overrides):
    with torch.device("meta"):
        return build_model(
            load_config(path, ["MODEL.DEVICE", "meta", "MODEL.REGIONSPOT.PROPOSALS.SOURCE", "auto", *overrides])
        )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_builds(path):
    assert isinstance(build_on_meta(path), RegionSpot)


HOSTS = [path for path in sorted((ROOT / "projects" / "RegionSpotRCNN").rglob("*.yaml")) if "Base" not in path.stem]


@pytest.mark.parametrize("path", HOSTS, ids=lambda path: path.stem)
def test_host_config_builds(path):
    overrides = ["MODEL.REGIONSPOT.SAM.WEIGHTS", "", "MODEL.REGIONSPOT.CLIP.WEIGHTS", ""]
    if "miniworld" in path.parts:  # its names come with its annotations
        overrides += ["MODEL.REGIONSPOT.HEAD.HOST_VOCABULARY", ""]
    model = build_on_meta(path, *overrides)
    learning = {key for key, value in model.named_parameters() if value.requires_grad}
    if "Host" in path.stem:  # trained before it gets the head
        assert type(model) is GeneralizedRCNN
        assert isinstance(model.roi_heads, StandardROIHeads) and len(learning) > 20
    else:
        assert type(model) is RegionSpotRCNN and isinstance(model.roi_heads, RegionSpotROIHeads)
        assert all(key.startswith("roi_heads.recognizer.knowledge_integration.") for key in learning)


@pytest.mark.parametrize("name", ["BL", "BL-336", "LL", "HL", "mini"])
def test_variant_changes_only_sizes(tmp_path, name):
    """Merged into any config, also a host's, it sets the sizes of RegionSpot-<name>.yaml and nothing else."""
    host = ROOT / "projects" / "RegionSpotRCNN" / "configs" / "faster_rcnn_R_50_FPN.yaml"
    configs = MINIWORLD if name == "mini" else ROOT / "configs"
    (tmp_path / "mine.yaml").write_text(f"_BASE_: [{host}, {configs}/variants/{name}.yaml]\n")
    assert all(key.startswith("MODEL.REGIONSPOT.") for key in differences(tmp_path / "mine.yaml", host))
    whole = load_config(configs / f"RegionSpot-{name}.yaml")
    merged = load_config(tmp_path / "mine.yaml").MODEL.REGIONSPOT
    for part in ("SAM", "CLIP", "INTEGRATION"):
        assert merged[part] == whole.MODEL.REGIONSPOT[part]


def test_whole_config_over_host_is_refused(tmp_path):
    host = ROOT / "projects" / "RegionSpotRCNN" / "configs" / "faster_rcnn_R_50_FPN.yaml"
    (tmp_path / "mine.yaml").write_text(f"_BASE_: [{ROOT}/configs/RegionSpot-BL.yaml, {host}]\n")
    with pytest.raises(ValueError, match="configs/variants"):
        load_config(tmp_path / "mine.yaml")


def test_host_by_path_name_or_override(tmp_path):
    key = "MODEL.REGIONSPOT.HEAD.HOST_CONFIG"
    zoo = load_config("", [key, "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"])
    assert zoo.MODEL.RESNETS.DEPTH == 101 and zoo.MODEL.WEIGHTS.endswith("model_final_f6e8b1.pkl")
    assert zoo.MODEL.REGIONSPOT.HEAD.HOST == "StandardROIHeads"
    cascade = load_config("", [key, "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"])
    assert cascade.MODEL.REGIONSPOT.HEAD.HOST == "CascadeROIHeads"
    (tmp_path / "mine.yaml").write_text("MODEL:\n  WEIGHTS: mine.pth\n  MASK_ON: True\nVERSION: 2\n")
    (tmp_path / "head.yaml").write_text(
        f"MODEL:\n  MASK_ON: False\n  REGIONSPOT:\n    HEAD:\n      HOST_CONFIG: {tmp_path}/mine.yaml\n"
    )
    cfg = load_config(tmp_path / "head.yaml")
    assert cfg.MODEL.WEIGHTS == "mine.pth" and not cfg.MODEL.MASK_ON  # the config on top overrides the host's
    with pytest.raises(FileNotFoundError, match="no config of Detectron2's model zoo"):
        load_config("", [key, "COCO-Detection/nothing.yaml"])


@pytest.mark.parametrize(
    ("name", "millions"), [("RegionSpot-BB", 24.2), ("RegionSpot-BL", 38.9), ("RegionSpot-BL-336", 38.9)]
)
def test_number_of_trained_parameters(name, millions):
    model = build_on_meta(ROOT / f"configs/{name}.yaml")
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert all(key.startswith("recognizer.knowledge_integration.") for key in trained)
    assert sum(value.numel() for value in trained.values()) / 1e6 == pytest.approx(millions, abs=0.05)


@functools.cache
def values(path):
    return flat(load_config(path))


def differences(path, base):
    one, two = values(path), values(base)
    return {key for key in one if one[key] != two[key]}


@pytest.mark.parametrize(
    ("configs", "base"),
    [(ROOT / "configs", "ablations/Base-ablation.yaml"), (MINIWORLD, "RegionSpot-mini.yaml")],
    ids=["paper", "miniworld"],
)
def test_ablations_change_one_key(configs, base):
    data = {"DATASETS.TRAIN", "DATASETS.TOKEN_STORES_TRAIN", "DATASETS.TRAIN_RATIO"}
    paths = [path for path in (configs / "ablations").glob("*.yaml") if not path.stem.startswith("Base")]
    assert len(paths) == 11
    rung = {"INTEGRATION.REGION_ATTENTION", "CLIP.FEATURES", "CLIP.TEMPLATES"}  # the first of the paper's ladder
    for path in paths:
        changed = differences(path, configs / base)
        if path.stem == "one-box-ladder":
            assert changed == {f"MODEL.REGIONSPOT.{key}" for key in rung}
        else:
            assert changed == data if path.stem.startswith("data") else len(changed) == 1, path


@pytest.mark.parametrize("name", ["BB", "BL", "BL-336"])
def test_stages_change_only_data(name):
    for stage in (1, 2):
        path = ROOT / f"configs/RegionSpot-{name}-stage{stage}.yaml"
        cfg, changed = load_config(path), differences(path, ROOT / f"configs/RegionSpot-{name}.yaml")
        allowed = ("DATASETS.", "DATALOADER.NUM_WORKERS", "TEST.EVAL_PERIOD", "OUTPUT_DIR", "MODEL.WEIGHTS")
        assert all(key.startswith(allowed) for key in changed)
        assert len(cfg.DATASETS.TOKEN_STORES_TRAIN) == len(cfg.DATASETS.TRAIN) == (1, 3)[stage - 1]
        recipe = (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.STEPS)
        assert recipe == (2.5e-5, 450000, 16, (350000, 420000))
    first = load_config(ROOT / f"configs/RegionSpot-{name}-stage1.yaml").OUTPUT_DIR
    assert first.removeprefix("./") + "/model_final.pth" == cfg.MODEL.WEIGHTS


def test_config_runs_no_code(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.system ['touch {tmp_path}/executed']\n")
    with pytest.raises(ValueError, match="bad.yaml"):
        load_config(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", SAM_SIZES)
def test_sam_has_the_official_layout(name):
    with torch.device("meta"):
        sam, official = build_sam(SAM_SIZES[name]), sam_model_registry[name]()
    assert {k: v.shape for k, v in sam.state_dict().items()} == {k: v.shape for k, v in official.state_dict().items()}


@pytest.mark.parametrize("name", CLIP_SIZES)
def test_clip_has_the_official_layout(name):
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
def test_wrong_value_names_alternatives(key, value, message):
    with pytest.raises(ValueError, match=message):
        model = build_model(tiny_config(key, value))
        model.set_vocabulary(["a"])


def test_missing_file_and_unknown_key_are_refused():
    with pytest.raises(FileNotFoundError, match="configs/"):
        load_config("no.yaml")
    with pytest.raises(ValueError, match="NO_SUCH_KEY"):
        tiny_config("MODEL.NO_SUCH_KEY", 1)
