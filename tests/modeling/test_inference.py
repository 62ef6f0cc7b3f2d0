"""Detections from logits: score rules, labels per box, suppression, unknown regions, masks."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from pycocotools import mask as mask_api

from regionspot.modeling.inference import DetectionRule, encode_masks, merge_detections

from ..helpers import NAMES, as_inputs, spread_tokens, tiny_model

BOXES = torch.tensor([[0.0, 0, 10, 10], [1.0, 0, 11, 10], [30.0, 30, 40, 40]])
PROBABILITIES = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6]])
PROPOSALS = torch.tensor([0.5, 1.0, 0.2])


def select(proposals=PROPOSALS, **rule):
    rule = DetectionRule(**rule)
    found = rule.select(BOXES, rule.scores(PROBABILITIES, proposals), (50, 50))
    return {
        (region, label): round(score, 4)
        for region, label, score in zip(
            found.region_indices.tolist(), found.pred_classes.tolist(), found.scores.tolist()
        )
    }


def test_score_rules():
    assert select(score_rule="product")[0, 0] == 0.3 and len(select()) == 9
    assert select(score_rule="class") == select(proposals=None, score_rule="product") == select(proposals=None)
    assert select(score_rule="class")[2, 2] == 0.6
    assert select(score_rule="proposal") == {(0, 0): 0.5, (1, 0): 1.0, (2, 2): 0.2}
    assert select(proposals=None, score_rule="proposal") == select(score_rule="class")
    with pytest.raises(ValueError, match="expected product, class, proposal; got 'sum'"):
        DetectionRule(score_rule="sum")


def test_labels_per_box_threshold_and_number():
    assert set(select(labels_per_box=1)) == {(0, 0), (1, 0), (2, 2)}
    assert set(select(score_thresh=0.3)) == {(0, 0), (1, 0), (1, 1)}
    assert list(select(top_k=2)) == [(1, 0), (1, 1)] and len(select(top_k=-1)) == 9
    with pytest.raises(ValueError, match="at least 1, or -1"):
        DetectionRule(labels_per_box=0)


def test_suppression_is_class_wise_and_comes_before_the_cut():
    assert set(select(nms_thresh=0.5, labels_per_box=1)) == {(1, 0), (2, 2)}  # boxes 0 and 1 overlap by 0.82
    assert set(select(nms_thresh=0.9, labels_per_box=1)) == {(0, 0), (1, 0), (2, 2)}
    assert list(select(nms_thresh=0.5, top_k=3)) == [(1, 0), (1, 1), (2, 2)]


HALF = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 5]])  # IoU 0.5, to the bit


def test_thresholds_keep_what_reaches_them():
    """What scores, overlaps or is as probable as a threshold says exactly is on the side that the docs say."""
    scores = torch.tensor([[0.5, 0.25], [0.125, 0.0]])
    found = DetectionRule(score_thresh=0.25).select(HALF, scores, (50, 50))
    assert found.scores.tolist() == [0.5, 0.25]  # "scoring lower are dropped"
    assert len(DetectionRule(score_thresh=0.0).select(HALF, scores, (50, 50))) == 4
    assert len(DetectionRule(score_thresh=-2.0).select(HALF, torch.where(scores < 0.2, -1, scores), (50, 50))) == 2
    rule = DetectionRule(unknown_thresh=0.5)
    assert rule.is_unknown(torch.tensor([[0.5, 0.5], [0.25, 0.375]])).tolist() == [False, True]  # "less probable"


def test_boxes_of_just_the_threshold_overlap_stay():
    scores = torch.tensor([[0.9], [0.8]])
    assert len(DetectionRule(nms_thresh=0.5).select(HALF, scores, (50, 50))) == 2  # "more IoU than this"
    assert len(DetectionRule(nms_thresh=0.499).select(HALF, scores, (50, 50))) == 1
    one, other = (
        Instances(
            (50, 50),
            pred_boxes=Boxes(HALF[[index]]),
            scores=scores[index],
            pred_classes=torch.tensor([index]),
            region_indices=torch.tensor([index]),
        )
        for index in (0, 1)
    )
    assert len(merge_detections(one, other, 0.5, -1)) == 2 and len(merge_detections(one, other, 0.499, -1)) == 1


def test_the_names_behind_the_vocabulary_are_the_background():
    probabilities = torch.eye(4)  # each region is of one name; the last two are the background's
    assert DetectionRule(background=2).is_unknown(probabilities).tolist() == [False, False, True, True]
    assert not DetectionRule().is_unknown(probabilities).any()


def test_regions_of_no_class_are_unknown():
    model = tiny_model()
    [plain] = model([as_inputs(0)])
    assert not plain["regions"].unknown.any() and plain["instances"].pred_classes.max() < len(NAMES)
    best = plain["regions"].top_scores[:, 0]
    model = tiny_model("MODEL.REGIONSPOT.UNKNOWN.THRESHOLD", float(best.median()) + 1e-6)
    [output] = model([as_inputs(0)])
    unknown = output["regions"].unknown
    assert unknown.tolist() == (best < best.median() + 1e-6).tolist() and 0 < unknown.sum() < len(unknown)
    for region, is_unknown in enumerate(unknown.tolist()):
        mine = output["instances"][output["instances"].region_indices == region]
        assert len(mine) == (0 if is_unknown else len(NAMES))


def test_background_names_make_regions_unknown():
    model = tiny_model("MODEL.REGIONSPOT.UNKNOWN.BACKGROUND", ("sky", "wall"))
    spread_tokens(model.recognizer, as_inputs(0))
    [output] = model([as_inputs(0)])
    inputs = as_inputs(0)
    features = model.recognizer.encode_images([inputs["image"]])
    tokens = model.recognizer.position_tokens([inputs["image"]], [inputs["instances"].gt_boxes])
    model.set_vocabulary([*NAMES, "sky", "wall"])
    with torch.no_grad():
        [logits] = model.recognizer.classify(tokens, features.feature_map)
    assert output["regions"].unknown.tolist() == (logits.argmax(dim=1) >= len(NAMES)).tolist()
    assert 0 < output["regions"].unknown.sum() < len(logits)
    torch.testing.assert_close(
        output["regions"].top_scores[:, 0], logits.softmax(dim=1)[:, : len(NAMES)].amax(dim=1), atol=1e-5, rtol=0
    )


def test_masks_of_a_box_are_one_rle():
    model = tiny_model("MODEL.MASK_ON", True)
    inputs = {**as_inputs(0), "height": 96, "width": 128}
    bitmasks = model([inputs])[0]["instances"]
    model.masks = "rle"
    detections = model([inputs])[0]["instances"]
    assert not detections.has("pred_masks") and len(detections) == len(bitmasks)
    for mask, rle in zip(bitmasks.pred_masks, detections.pred_masks_rle):
        assert np.array_equal(mask_api.decode({**rle, "counts": rle["counts"].encode()}), mask.numpy())
    best = detections[detections.scores > detections.scores.median()]
    assert [id(rle) for rle in best.pred_masks_rle] == [id(rle) for rle in detections.pred_masks_rle[: len(best)]]
    number = len({id(rle) for rle in detections.pred_masks_rle})
    assert number == len(inputs["instances"]) < len(detections)
    assert encode_masks(torch.zeros(0, 4, 5, dtype=torch.bool)) == []
