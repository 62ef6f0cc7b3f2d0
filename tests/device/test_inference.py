"""Inference on a simulated accelerator by all ways in, compared with the CPU."""

import numpy as np
import pytest
import torch
import yaml
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from regionspot import RegionSpotPredictor
from regionspot.config import load_config
from regionspot.modeling.attention_maps import cross_attention
from regionspot.structures import Prompts

from ..helpers import NAMES, ROOT, as_inputs, draw_scene, tiny_config, tiny_model
from ..simulated_device import SimulatedTensor

SPOT = "MODEL.REGIONSPOT."


def scenes_with_proposals():
    """Return model inputs with scored proposals, an image without any among them."""
    batch = [as_inputs(0), as_inputs(1, (60, 40)), as_inputs(2, (50, 50), 0)]
    for inputs in batch:
        boxes = inputs["instances"].gt_boxes
        inputs["proposals"] = Instances(inputs["instances"].image_size, proposal_boxes=boxes)
        inputs["proposals"].objectness_logits = torch.linspace(2, -1, len(boxes))
    return batch


def detector_config(directory):
    """Write the config of a small Faster R-CNN of Detectron2's own; return its path."""
    content = yaml.safe_load((ROOT / "tests" / "tiny_rcnn.yaml").read_text())
    del content["_BASE_"]
    content["MODEL"]["META_ARCHITECTURE"] = "GeneralizedRCNN"
    content["MODEL"]["ROI_HEADS"]["NAME"] = "StandardROIHeads"
    content["INPUT"]["MIN_SIZE_TEST"] = 64
    path = directory / "detector.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def by_class(instances):
    """Order detections by region and class, and a region's scores by class: rounding swaps nearly equal scores."""
    if instances.has("region_indices"):
        return instances[(len(NAMES) * instances.region_indices + instances.pred_classes).argsort()]
    order = instances.top_classes.argsort(dim=1)
    instances.top_classes, instances.top_scores = (
        x.gather(1, order) for x in (instances.top_classes, instances.top_scores)
    )
    return instances


def assert_alike(one, other, tolerance=1e-4):
    """Compare the detections and regions of two devices; above a tolerance of 0.001 not the order of classes."""
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            first, second = a[key].to("cpu"), b[key].to("cpu")
            if tolerance > 1e-3:
                first, second = by_class(first), by_class(second)
            assert first.image_size == second.image_size and len(first) == len(second)
            for name, value in first.get_fields().items():
                compare(value, second.get(name), tolerance)


def compare(one, other, tolerance):
    if isinstance(one, Boxes):
        one, other = one.tensor, other.tensor
    if isinstance(one, torch.Tensor) and one.is_floating_point():
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)
    elif isinstance(one, torch.Tensor):
        assert one.shape == other.shape and (one != other).sum() <= (one.numel() / 1000 if one.dim() == 3 else 0)
    else:
        assert len(one) == len(other)


WAYS = {  # each choice at least once
    "multimask": {"SAM.MULTIMASK": True, "MASK_ON": True, "SAM.PROMPT_CHUNK": 2},
    "prompt encoder": {"TOKEN_STAGE": "prompt_encoder", "SCORE_RULE": "class", "LABELS_PER_BOX": 2, "FORMAT": "BGR"},
    "mlp": {"TOKEN_STAGE": "mlp", "SCORE_RULE": "proposal", "PROPOSALS.TOP_K": 2, "SCORE_FUNCTION": "sigmoid"},
    "no features": {"CLIP.FEATURES": "none", "NMS_THRESH_TEST": 0.3, "DETECTIONS_PER_IMAGE": 3},
    "feature map": {"CLIP.FEATURES": "feature_map", "INTEGRATION.REGION_ATTENTION": False},
    "unknown": {"UNKNOWN.THRESHOLD": 0.3, "UNKNOWN.BACKGROUND": ("sky", "wall"), "MASK_ON": True},
    "ensemble": {"GEOMETRIC_ENSEMBLE.BETA": 0.3, "MASK_ON": True},
    "bf16": {"PRECISION": "bf16"},
    "crops": {"META_ARCHITECTURE": "CropBaseline", "CROP.MASKED": True},
    "sam": {
        "PROPOSALS.SOURCE": "sam_automatic",
        "PROPOSALS.SAM_AUTOMATIC.PRED_IOU_THRESH": -10.0,
        "PROPOSALS.SAM_AUTOMATIC.STABILITY_SCORE_THRESH": -1.0,
        "PROPOSALS.SAM_AUTOMATIC.POINTS_PER_SIDE": 2,
    },
    "detector": {"PROPOSALS.SOURCE": "detector", "PROPOSALS.TOP_K": 3},
    "rpn": {"PROPOSALS.SOURCE": "detector", "PROPOSALS.DETECTOR.OUTPUT": "rpn"},
}
NODES = {"MASK_ON": "MODEL.", "META_ARCHITECTURE": "MODEL.", "FORMAT": "INPUT.", "DETECTIONS_PER_IMAGE": "TEST."}


@pytest.mark.parametrize("way", WAYS)
def test_inference_equals_the_cpu(tmp_path, way):
    overrides = [part for key, value in WAYS[way].items() for part in (NODES.get(key, SPOT) + key, value)]
    if "detector" in overrides:
        overrides += [SPOT + "PROPOSALS.DETECTOR.CONFIG_FILE", str(detector_config(tmp_path))]
    outputs = []
    for name in ("cpu", "meta"):
        model = tiny_model(*overrides, "MODEL.DEVICE", name)
        outputs.append(model(scenes_with_proposals()))
        assert model.device.type == name
    assert_alike(*outputs, tolerance=0.02 if way == "bf16" else 1e-4)  # attention rounds in another order there


@pytest.mark.parametrize("masks", ["bitmask", "rle", "lazy"])
def test_masks_of_every_kind(masks):
    inputs, outputs = scenes_with_proposals(), []
    for name in ("cpu", "meta"):
        recognizer = tiny_model("MODEL.DEVICE", name).recognizer
        outputs.append(
            recognizer(
                [x["image"] for x in inputs],
                [x["instances"].gt_boxes for x in inputs],
                output_sizes=[(70, 90)] * 3,
                masks=masks,
                classes=torch.tensor([True, False, True, True]),
            )
        )
    if masks == "lazy":
        for instances in (*outputs[0], *outputs[1]):
            lazy = instances.pred_masks
            instances.pred_masks = lazy.to_bitmasks(instances.pred_boxes, 70, 90).tensor
    assert_alike(*([{"instances": x} for x in images] for images in outputs))


PROMPTS = {
    "boxes": {"boxes": draw_scene(0)[1]},
    "no boxes": {"boxes": np.zeros((0, 4))},
    "points": {"points": [[[10, 10], [50, 40]], [[30, 20], [0, 0]]], "labels": [[1, 0], [1, -1]]},
    "masks": {"masks": np.tri(48, 64, dtype=bool)[None]},
    "boxes and points": {"boxes": draw_scene(0)[1][:1], "points": [[[20, 20]]], "with_masks": False},
    "boxes and masks": {"boxes": draw_scene(0)[1][:1], "masks": np.tri(48, 64, dtype=bool)[None]},
}


def test_predictor_takes_every_prompt():
    results = []
    for name in ("cpu", "meta"):
        torch.manual_seed(0)
        predictor = RegionSpotPredictor(tiny_config("MODEL.DEVICE", name))
        predictor.set_vocabulary(NAMES)
        predictor.set_image(draw_scene(0)[0])
        results.append([predictor.predict(**prompts) for prompts in PROMPTS.values()])
    for here, there in zip(*results):
        np.testing.assert_allclose(here.logits, there.logits, atol=1e-3)
        assert isinstance(there.scores, np.ndarray) and there.class_names == here.class_names


def test_attention_maps(device):
    recognizer = tiny_model("MODEL.DEVICE", "meta").recognizer
    features = recognizer.encode_images([as_inputs(0)["image"]])
    [located] = recognizer.locate(features, [Prompts(boxes=torch.from_numpy(draw_scene(0)[1]))])
    maps = cross_attention(recognizer.knowledge_integration, located.tokens, features.feature_map)
    assert maps.device == device and maps.shape[1:] == (4, 4)


HEAD = SPOT + "HEAD."
HEADS = {
    "masks": ["MODEL.MASK_ON", True],
    "refined": [HEAD + "BOXES", "refined", HEAD + "BOX_SCORE", "foreground", HEAD + "BOX_NMS_THRESH", 0.5],
    "cascade": [
        *[HEAD + "BOXES", "refined", HEAD + "HOST", "CascadeROIHeads"],
        *["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True, SPOT + "PROPOSALS.TOP_K", 3],
    ],
    "c4": [
        *[HEAD + "BOXES", "refined", HEAD + "HOST", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ("res4",)],
        *["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ("res4",)],
        *["MODEL.RPN.IN_FEATURES", ("res4",), "MODEL.ANCHOR_GENERATOR.SIZES", [[12, 24]]],
    ],
    "names of the host": [
        *[HEAD + "HOST_VOCABULARY", "red square,b,green disc,d", HEAD + "MERGE_NMS_THRESH", 0.5],
        *["MODEL.MASK_ON", True],
    ],
}


def rcnn(name, overrides):
    torch.manual_seed(0)
    base = ["MODEL.DEVICE", name, SPOT + "VOCABULARY", ",".join(NAMES)]
    return build_model(load_config(ROOT / "tests" / "tiny_rcnn.yaml", [*base, *overrides])).eval()


@pytest.mark.parametrize("way", HEADS)
def test_head_equals_the_cpu(way):
    outputs = []
    for name in ("cpu", "meta"):
        model = rcnn(name, HEADS[way])
        assert model.device.type == name
        outputs.append(model([as_inputs(0), as_inputs(1, (60, 40))]))
    assert_alike(*outputs)


@pytest.mark.parametrize("frozen", [True, False])
def test_head_trains(frozen):
    overrides = [HEAD + "FREEZE_HOST", frozen, *([] if frozen else HEADS["refined"])]
    model = rcnn("meta", overrides).train()
    with EventStorage():
        losses = model([as_inputs(0), as_inputs(1)])
    assert len(losses) == (1 if frozen else 5)
    sum(losses.values()).backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(isinstance(gradient, SimulatedTensor) for gradient in gradients if gradient is not None)
