"""Detections from logits: score rules, labels per box, suppression, unknown regions, merging."""

import pytest
import torch
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch.utils._python_dispatch import TorchDispatchMode

from regionspot.modeling.postprocessing import DetectionRule, merge_detections

from ..helpers import NAMES, as_inputs, spread_tokens, tiny_model

BOXES = torch.tensor([[0.0, 0, 10, 10], [1.0, 0, 11, 10], [30.0, 30, 40, 40]])
PROBABILITIES = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6]])
PROPOSALS = torch.tensor([0.5, 1.0, 0.2])


def select(proposals=PROPOSALS, **rule):
    rule = DetectionRule(**rule)
    detections = rule.select(BOXES, rule.scores(PROBABILITIES, proposals), (50, 50))
    return {
        (region, label): round(score, 4)
        for region, label, score in zip(
            detections.region_indices.tolist(), detections.pred_classes.tolist(), detections.scores.tolist()
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


def test_labels_per_box_threshold_and_top_k():
    assert set(select(labels_per_box=1)) == {(0, 0), (1, 0), (2, 2)}
    assert set(select(score_thresh=0.3)) == {(0, 0), (1, 0), (1, 1)}
    assert list(select(top_k=2)) == [(1, 0), (1, 1)] and len(select(top_k=-1)) == 9
    with pytest.raises(ValueError, match="at least 1, or -1"):
        DetectionRule(labels_per_box=0)


def test_suppression_is_class_wise_before_top_k():
    assert set(select(nms_thresh=0.5, labels_per_box=1)) == {(1, 0), (2, 2)}  # boxes 0 and 1 overlap by 0.82
    assert set(select(nms_thresh=0.9, labels_per_box=1)) == {(0, 0), (1, 0), (2, 2)}
    assert list(select(nms_thresh=0.5, top_k=3)) == [(1, 0), (1, 1), (2, 2)]


HALF = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 5]])  # IoU 0.5, to the bit


def test_scores_at_the_threshold_are_kept():
    """Scores, IoUs and probabilities exactly at a threshold fall on the documented side."""
    scores = torch.tensor([[0.5, 0.25], [0.125, 0.0]])
    detections = DetectionRule(score_thresh=0.25).select(HALF, scores, (50, 50))
    assert detections.scores.tolist() == [0.5, 0.25]  # "scoring lower are dropped"
    assert len(DetectionRule(score_thresh=0.0).select(HALF, scores, (50, 50))) == 4
    assert len(DetectionRule(score_thresh=-2.0).select(HALF, torch.where(scores < 0.2, -1, scores), (50, 50))) == 2
    rule = DetectionRule(unknown_thresh=0.5)
    assert rule.is_unknown(torch.tensor([[0.5, 0.5], [0.25, 0.375]])).tolist() == [False, True]  # "less probable"


def test_overlap_at_the_threshold_is_kept():
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


def test_background_names_come_last():
    probabilities = torch.eye(4)  # one name for each region; the last two are background names
    assert DetectionRule().is_unknown(probabilities, 2).tolist() == [False, False, True, True]
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
        detections = output["instances"][output["instances"].region_indices == region]
        assert len(detections) == (0 if is_unknown else len(NAMES))


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


def random_detections(num_detections, seed):
    """Return detections, many of which overlap and some of which tie."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(num_detections, 2, generator=generator) * 30
    detections = Instances((50, 50), pred_boxes=Boxes(torch.cat([corners, corners + 15], dim=1)))
    detections.scores = (torch.rand(num_detections, generator=generator) * 20).round() / 20
    detections.pred_classes = torch.arange(num_detections) + 1000 * seed
    detections.region_indices = torch.arange(num_detections)
    return detections


def make_detections(boxes, scores, classes):
    fields = {"pred_boxes": Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))}
    return Instances(
        (50, 50),
        **fields,
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes),
        region_indices=torch.arange(len(scores)),
    )


def test_merging_by_score():
    named = make_detections([[0, 0, 10, 10], [0, 0, 10, 10], [30, 30, 40, 40]], [0.5, 0.4, 0.3], [5, 6, 7])
    preferred = make_detections([[1, 0, 10, 10], [30, 30, 40, 41]], [0.45, 0.9], [0, 1])
    merged = merge_detections(named, preferred, 0.5, -1)
    # the first object stays named (0.5 beats 0.45), with both of its names; the second is the preferred source's
    assert merged.pred_classes.tolist() == [1, 5, 6]
    assert merge_detections(named, preferred, 1.0, -1).pred_classes.tolist() == [1, 5, 0, 6, 7]
    assert merge_detections(named, preferred, 1.0, 2).pred_classes.tolist() == [1, 5]
    assert merge_detections(make_detections([], [], []), preferred, 0.5, -1).pred_classes.tolist() == [1, 0]
    tied = make_detections([[0, 0, 10, 10]], [0.45], [9])
    assert merge_detections(tied, preferred[:1], 0.5, -1).pred_classes.tolist() == [0]  # the preferred one


def test_suppressed_detections_suppress_nothing():
    named = make_detections([[0, 0, 20, 10], [8, 0, 28, 10]], [0.5, 0.7], [5, 6])
    preferred = make_detections([[4, 0, 24, 10]], [0.6], [0])
    assert merge_detections(named, preferred, 0.5, -1).pred_classes.tolist() == [6, 5]


@pytest.mark.parametrize(("num_named", "num_preferred"), [(60, 60), (1, 80), (0, 3), (0, 0)])
def test_merging_is_greedy_between_sources(num_named, num_preferred):
    named, preferred = random_detections(num_named, 1), random_detections(num_preferred, 0)
    selected = []
    candidates = [(x, i, False) for i, x in enumerate(preferred.scores.tolist())]
    candidates += [(x, i, True) for i, x in enumerate(named.scores.tolist())]
    for _, index, is_named in sorted(candidates, key=lambda x: -x[0]):  # stable: preferred ones first
        box = (named if is_named else preferred).pred_boxes[index]
        rivals = [other for other, source in selected if source != is_named]
        if not any(pairwise_iou(box, other.pred_boxes) > 0.3 for other in rivals):
            selected.append(((named if is_named else preferred)[index], is_named))
    merged = merge_detections(named, preferred, 0.3, -1)
    assert merged.pred_classes.tolist() == [int(x.pred_classes) for x, _ in selected]
    assert 0 < len(selected) < num_named + num_preferred or num_named == 0


class CountScalars(TorchDispatchMode):
    """Counts reads of single values, each of which waits for an accelerator."""

    num_reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_merging_reads_few_scalars():
    with CountScalars() as count:
        merge_detections(random_detections(60, 1), random_detections(60, 0), 0.3, 10)
    assert count.num_reads < 5
