"""The host's own heads and images: refined boxes, their scores, and the original images."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from regionspot.modeling.roi_heads.host import refine_boxes

from ...helpers import as_inputs
from .hosts import GIVEN, HEAD, NO_NMS, REFINED, bgr, rcnn, with_proposals

RES5 = ("MODEL.ROI_HEADS.IN_FEATURES", ["p4"], "MODEL.FPN.OUT_CHANNELS", 32)


@pytest.mark.parametrize("std", [[57.375, 57.12, 58.395], [0.017, 1000.0, 255.0]])
def test_images_are_restored_exactly(std):
    model = rcnn("MODEL.PIXEL_STD", std)
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, -1, -1)
    inputs = [as_inputs(0), as_inputs(1, (130, 90)), {"image": levels}]
    originals = model.roi_heads.host_images(model.preprocess_image([bgr(x) for x in inputs]))
    for image_inputs, original in zip(inputs, originals):
        assert torch.equal(image_inputs["image"], original)


def sums_over_names(output):
    """Return, for each region, the sum of its detections' scores: its own score, where all of them are kept."""
    return torch.zeros(int(output.region_indices.max()) + 1).index_add_(0, output.region_indices, output.scores)


def test_box_scores():
    """Over all names the probabilities of a region sum up to 1."""
    options = (*NO_NMS, *GIVEN, "TEST.DETECTIONS_PER_IMAGE", -1)
    inputs = bgr(with_proposals(0))
    objectness = inputs["proposals"].objectness_logits.sigmoid()
    for overrides in ((), REFINED):
        detections = rcnn(*options, *overrides)([inputs])[0]["instances"]
        torch.testing.assert_close(sums_over_names(detections), objectness)
    model = rcnn(*options, *REFINED, HEAD + "BOX_SCORE", "foreground")
    torch.nn.init.normal_(model.roi_heads.host.box_predictor.cls_score.weight, std=1e-4)
    features = model.backbone(model.preprocess_image([inputs]).tensor)
    [(_, foreground)] = refine_boxes(model.roi_heads.host, features, [inputs["proposals"]])
    assert foreground.std() > 1e-3
    torch.testing.assert_close(sums_over_names(model([inputs])[0]["instances"]), foreground)


def test_foreground_of_sigmoid_classes():
    model = rcnn(*REFINED, "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True)
    predictor = model.roi_heads.host.box_predictor
    torch.nn.init.zeros_(predictor.cls_score.weight)
    torch.nn.init.constant_(predictor.cls_score.bias, -1.0)
    features = model.backbone(model.preprocess_image([as_inputs(0)]).tensor)
    [(_, foreground)] = refine_boxes(model.roi_heads.host, features, [with_proposals(0)["proposals"]])
    torch.testing.assert_close(foreground, torch.full_like(foreground, 0.2689), atol=1e-4, rtol=0)


def test_boxes_are_suppressed_before_recognition():
    inputs = with_proposals(0)
    twice = Instances.cat([inputs["proposals"], inputs["proposals"]])
    inputs = {**bgr(inputs), "proposals": twice}
    assert rcnn(*GIVEN, *NO_NMS)([inputs])[0]["instances"].region_indices.max() == len(twice) - 1
    once = rcnn(*GIVEN, *NO_NMS, HEAD + "BOX_NMS_THRESH", 0.9)([inputs])[0]["instances"]
    assert once.region_indices.max() == len(twice) // 2 - 1


def test_overlap_at_the_threshold_is_kept():
    inputs = bgr(as_inputs(0))
    inputs["proposals"] = Instances((48, 64), proposal_boxes=Boxes([[0, 0, 10, 10], [0, 0, 10, 5]]))
    inputs["proposals"].objectness_logits = torch.tensor([2.0, 1.0])
    for threshold, num_regions in ((0.5, 2), (0.499, 1)):
        [output] = rcnn(*GIVEN, *NO_NMS, HEAD + "BOX_NMS_THRESH", threshold)([inputs])
        assert len(output["instances"].region_indices.unique()) == num_regions


@pytest.mark.parametrize(
    ("heads", "agnostic"),
    [(heads, agnostic) for heads in ("StandardROIHeads", "Res5ROIHeads") for agnostic in (True, False)]
    + [("CascadeROIHeads", True)],
)
def test_refined_boxes_equal_host_detections(heads, agnostic):
    """The host's own heads detect each refined box, by whatever kind of heads it is refined."""
    overrides = ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", agnostic, *(RES5 if heads == "Res5ROIHeads" else ()))
    model = rcnn(*REFINED, HEAD + "HOST", heads, *overrides, *NO_NMS, "MODEL.MASK_ON", True)
    host = model.roi_heads.host
    assert not any("mask" in key for key in host.state_dict())
    predictors = host.box_predictor if isinstance(host.box_predictor, torch.nn.ModuleList) else [host.box_predictor]
    for predictor in predictors:
        torch.nn.init.normal_(predictor.bbox_pred.weight, std=0.05 if heads != "Res5ROIHeads" else 1e-4)
        torch.nn.init.normal_(predictor.cls_score.weight, std=0.02 if heads != "Res5ROIHeads" else 1e-5)
        predictor.test_topk_per_image = -1
    with torch.no_grad():
        images = model.preprocess_image([bgr(as_inputs(0))])
        features = model.backbone(images.tensor)
        proposals, _ = model.proposal_generator(images, features, None)
        [(boxes, foreground)] = refine_boxes(host, features, proposals)
        [detections], _ = host(None, features, proposals)
    assert len(boxes) == len(proposals[0]) and len(detections) > len(boxes)
    moved = (boxes.tensor - proposals[0].proposal_boxes.tensor).abs().amax(dim=1)
    assert moved.max() > 1
    for box in boxes.tensor:
        same = (detections.pred_boxes.tensor - box).abs().amax(dim=1) < 1e-4
        assert same.any()
    if agnostic and len(predictors) == 1:
        torch.testing.assert_close(detections.scores.sum(), foreground.sum())


def test_boxes_move_by_their_best_class():
    model = rcnn(*REFINED, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False)
    predictor, shifts = model.roi_heads.host.box_predictor, torch.tensor([0.1, 0.2, 0.3, 0.4])  # widths to the right
    torch.nn.init.zeros_(predictor.bbox_pred.weight)
    torch.nn.init.zeros_(predictor.cls_score.weight)
    predictor.bbox_pred.bias.data.view(4, 4)[:, 0] = shifts * predictor.box2box_transform.weights[0]
    boxes = torch.tensor([[0.0, 0.0, 10.0, 20.0], [8.0, 4.0, 28.0, 14.0]])
    proposals = Instances((48, 64), proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(2))
    features = model.backbone(model.preprocess_image([bgr(as_inputs(0))]).tensor)
    for best in range(4):
        predictor.cls_score.bias.data = torch.eye(5)[best]
        [(refined, _)] = refine_boxes(model.roi_heads.host, features, [proposals])
        expected = boxes + torch.stack([boxes[:, 2] - boxes[:, 0], torch.zeros(2)] * 2, dim=1) * shifts[best]
        torch.testing.assert_close(refined.tensor, expected, atol=1e-4, rtol=0)
