"""RegionSpot as the head of another detector: what it gives, what learns, and what checkpoints hold."""

import copy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import GeneralizedRCNN, build_model, detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from regionspot import RegionSpotPredictor
from regionspot.checkpoint.checkpointer import RegionSpotCheckpointer
from regionspot.config import load_config
from regionspot.modeling.postprocessing import merge_detections
from regionspot.modeling.roi_heads.host import refine_boxes

from ...helpers import (
    NAMES,
    ROOT,
    as_inputs,
    frozen_overrides,
    tiny_config,
    tiny_model,
    write_dataset,
    write_frozen_parts,
)
from ..test_meta_arch import assert_same

HEAD = "MODEL.REGIONSPOT.HEAD."
REFINED = (HEAD + "BOXES", "refined")
GIVEN = ("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals")
NO_NMS = ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 1.0)


def rcnn_config(*overrides):
    vocabulary = ("MODEL.REGIONSPOT.VOCABULARY", ",".join(NAMES))
    return load_config(ROOT / "tests" / "tiny_rcnn.yaml", [*vocabulary, *overrides])


def rcnn(*overrides):
    torch.manual_seed(0)
    return build_model(rcnn_config(*overrides)).eval()


def bgr(inputs):
    return {**inputs, "image": inputs["image"].flip(0)}


def with_proposals(index, size=(48, 64), output=None):
    """Return a drawn scene with its boxes as scored proposals, as a host sees it."""
    inputs = as_inputs(index, size)
    proposals = Instances(size, proposal_boxes=inputs["instances"].gt_boxes)
    proposals.objectness_logits = torch.linspace(2, -1, len(proposals))
    height, width = output or size
    return {**inputs, "proposals": proposals, "height": height, "width": width}


def train(model, batches=3, rate=1e-2):
    """Train as a host does: over all that takes a gradient; return the losses."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.1)
    losses = []
    for step in range(batches):
        with EventStorage():
            losses.append(model([bgr(as_inputs(2 * step)), bgr(as_inputs(2 * step + 1))]))
        optimizer.zero_grad()
        sum(losses[-1].values()).backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("output", [(48, 64), (96, 100)])
def test_the_three_ways_in_give_the_same(output):
    """Meta-architecture, head and predictor, over one recognizer, one image and the same boxes."""
    spot = tiny_model("MODEL.MASK_ON", True)
    head = rcnn(*GIVEN, *NO_NMS, "MODEL.MASK_ON", True)
    head.roi_heads.recognizer.load_state_dict(spot.recognizer.state_dict())
    inputs = [with_proposals(3, output=output), with_proposals(4, (130, 90))]
    ours = [x["instances"] for x in spot(inputs)]
    theirs = [x["instances"] for x in head([bgr(x) for x in inputs])]
    for one, other in zip(ours, theirs):
        assert_same(one, other, 1e-5)
        assert one.image_size == other.image_size and len(one) == len(NAMES) * len(one.region_indices.unique())
    predictor = RegionSpotPredictor(tiny_config())
    predictor.recognizer.load_state_dict(spot.recognizer.state_dict())
    predictor.set_vocabulary(NAMES)
    predictor.set_image(inputs[0]["image"].permute(1, 2, 0).numpy())
    result = predictor.predict(boxes=inputs[0]["proposals"].proposal_boxes.tensor.numpy(), top_k=4)
    objectness = inputs[0]["proposals"].objectness_logits.sigmoid()
    for region in range(len(result)):
        found = theirs[0][theirs[0].region_indices == region]
        assert found.pred_classes.tolist() == result.top_classes[region].tolist()
        expected = torch.from_numpy(result.top_scores[region]) * objectness[region]
        torch.testing.assert_close(found.scores, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("std", [[57.375, 57.12, 58.395], [0.017, 1000.0, 255.0]])
def test_the_image_is_what_the_host_was_given(std):
    model = rcnn("MODEL.PIXEL_STD", std)
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, -1, -1)
    inputs = [as_inputs(0), as_inputs(1, (130, 90)), {"image": levels}]
    originals = model.roi_heads._original_images(model.preprocess_image([bgr(x) for x in inputs]))
    for given, original in zip(inputs, originals):
        assert torch.equal(given["image"], original)


@pytest.mark.parametrize("overrides", [(), REFINED, (*REFINED, HEAD + "BOX_SCORE", "foreground")])
def test_proposals_of_the_host_are_named(overrides):
    model = rcnn("MODEL.MASK_ON", True, "MODEL.REGIONSPOT.PROPOSALS.TOP_K", 7, *overrides)
    [output] = model([{**as_inputs(0), "height": 96, "width": 128}])
    found = output["instances"]
    assert 0 < len(found) <= 100 and found.region_indices.max() < 7
    assert found.pred_masks.shape == (len(found), 96, 128) and found.image_size == (96, 128)
    assert found.pred_classes.max() < len(NAMES) and (found.scores.diff() <= 0).all()


def sums_over_names(found):
    """Return, for each region, the sum of its detections' scores: its own score, where all of them are kept."""
    return torch.zeros(int(found.region_indices.max()) + 1).index_add_(0, found.region_indices, found.scores)


def test_scores_of_boxes_are_the_objectness_or_the_foreground():
    """Over all names the probabilities of a region sum up to 1."""
    every = (*NO_NMS, *GIVEN, "TEST.DETECTIONS_PER_IMAGE", -1)
    inputs = bgr(with_proposals(0))
    objectness = inputs["proposals"].objectness_logits.sigmoid()
    for overrides in ((), REFINED):
        found = rcnn(*every, *overrides)([inputs])[0]["instances"]
        torch.testing.assert_close(sums_over_names(found), objectness)
    model = rcnn(*every, *REFINED, HEAD + "BOX_SCORE", "foreground")
    torch.nn.init.normal_(model.roi_heads.host.box_predictor.cls_score.weight, std=1e-4)
    features = model.backbone(model.preprocess_image([inputs]).tensor)
    [(_, foreground)] = refine_boxes(model.roi_heads.host, features, [inputs["proposals"]])
    assert foreground.std() > 1e-3
    torch.testing.assert_close(sums_over_names(model([inputs])[0]["instances"]), foreground)


def test_foreground_of_a_host_whose_classes_do_not_exclude_each_other():
    model = rcnn(*REFINED, "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True)
    predictor = model.roi_heads.host.box_predictor
    torch.nn.init.zeros_(predictor.cls_score.weight)
    torch.nn.init.constant_(predictor.cls_score.bias, -1.0)
    features = model.backbone(model.preprocess_image([as_inputs(0)]).tensor)
    [(_, foreground)] = refine_boxes(model.roi_heads.host, features, [with_proposals(0)["proposals"]])
    torch.testing.assert_close(foreground, torch.full_like(foreground, 0.2689), atol=1e-4, rtol=0)


@pytest.mark.parametrize("overrides", [(), REFINED, (HEAD + "HOST_VOCABULARY", "zebra, blue square, cup, red square")])
def test_an_image_without_proposals_beside_others(overrides):
    model = rcnn(*GIVEN, *overrides, "MODEL.MASK_ON", True)
    inputs = [bgr(with_proposals(0)), bgr(with_proposals(1)), bgr(with_proposals(2))]
    inputs[1]["proposals"] = inputs[1]["proposals"][:0]
    numbers = [len(output["instances"]) for output in model(inputs)]
    assert numbers[0] and numbers[2] and numbers[1] == 0
    assert [len(x["instances"]) for x in model(inputs[:1])] == numbers[:1]


def test_thresholds_are_those_of_roi_heads():
    assert len(rcnn("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.9)([as_inputs(0)])[0]["instances"]) == 0
    every, few = (rcnn("MODEL.ROI_HEADS.NMS_THRESH_TEST", t)([as_inputs(0)])[0]["instances"] for t in (1.0, 0.01))
    assert 0 < len(few) < len(every)


def test_boxes_are_suppressed_before_they_are_recognized():
    inputs = with_proposals(0)
    twice = Instances.cat([inputs["proposals"], inputs["proposals"]])
    inputs = {**bgr(inputs), "proposals": twice}
    assert rcnn(*GIVEN, *NO_NMS)([inputs])[0]["instances"].region_indices.max() == len(twice) - 1
    once = rcnn(*GIVEN, *NO_NMS, HEAD + "BOX_NMS_THRESH", 0.9)([inputs])[0]["instances"]
    assert once.region_indices.max() == len(twice) // 2 - 1


def test_boxes_of_just_the_threshold_overlap_are_both_recognized():
    inputs = bgr(as_inputs(0))
    inputs["proposals"] = Instances((48, 64), proposal_boxes=Boxes([[0, 0, 10, 10], [0, 0, 10, 5]]))
    inputs["proposals"].objectness_logits = torch.tensor([2.0, 1.0])
    for threshold, number in ((0.5, 2), (0.499, 1)):
        [output] = rcnn(*GIVEN, *NO_NMS, HEAD + "BOX_NMS_THRESH", threshold)([inputs])
        assert len(output["instances"].region_indices.unique()) == number


RES5 = ("MODEL.ROI_HEADS.IN_FEATURES", ["p4"], "MODEL.FPN.OUT_CHANNELS", 32)


@pytest.mark.parametrize(
    ("heads", "agnostic"),
    [(heads, agnostic) for heads in ("StandardROIHeads", "Res5ROIHeads") for agnostic in (True, False)]
    + [("CascadeROIHeads", True)],
)
def test_refined_boxes_are_those_of_the_hosts_detections(heads, agnostic):
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


def test_each_box_is_moved_by_the_regression_of_its_most_probable_class():
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


def test_training_changes_the_attention_module_and_nothing_else():
    model = rcnn(*REFINED, "MODEL.ROI_HEADS.NUM_CLASSES", 1)
    before = copy.deepcopy(model.state_dict())  # with the running statistics of BatchNorm
    losses = train(model)
    assert all(set(step) == {"loss_regionspot"} for step in losses)
    after = model.state_dict()
    for key, value in before.items():
        trained = key.startswith("roi_heads.recognizer.knowledge_integration.")
        assert torch.equal(after[key], value) != trained, key


class LateParts(GeneralizedRCNN):
    """A detector that, as ``PanopticFPN``, gets a part after its heads."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.late = torch.nn.BatchNorm2d(3)


def test_every_rcnn_that_gets_a_frozen_head_is_frozen():
    heads = [rcnn().roi_heads for _ in range(3)]  # waiting heads disturb nothing
    torch.nn.Sequential(torch.nn.Linear(2, 2))
    hooks = len(torch.nn.modules.module._global_module_registration_hooks)
    for model in (rcnn("MODEL.ROI_HEADS.NAME", "StandardROIHeads"), rcnn("MODEL.ROI_HEADS.NAME", "StandardROIHeads")):
        assert all(p.requires_grad for p in model.backbone.parameters())
        model.roi_heads = copy.deepcopy(heads[0])
        learning = [key for key, value in model.named_parameters() if value.requires_grad]
        assert learning and all("knowledge_integration" in key for key in learning)
    assert len(torch.nn.modules.module._global_module_registration_hooks) == hooks
    parts = {key: getattr(rcnn(), key) for key in ("backbone", "proposal_generator", "roi_heads")}
    late = LateParts(**parts, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
    assert not any(p.requires_grad for p in late.late.parameters()) and not late.late.training
    free = rcnn(HEAD + "FREEZE_HOST", False)
    assert all(p.requires_grad for p in free.backbone.parameters())


def test_a_host_may_learn_too():
    model = rcnn(*REFINED, HEAD + "FREEZE_HOST", False)
    before = copy.deepcopy(model.state_dict())
    [losses] = train(model, 1)
    assert set(losses) == {"loss_regionspot", "loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    changed = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(before[key], value)}
    assert changed == {"backbone", "proposal_generator", "roi_heads"}
    assert torch.equal(
        before["roi_heads.recognizer.localizer.sam.mask_decoder.iou_token.weight"],
        model.roi_heads.recognizer.localizer.sam.mask_decoder.iou_token.weight,
    )


def test_regions_to_learn_from_are_annotated_boxes_and_proposals_that_match():
    model = rcnn(*GIVEN).train()
    inputs = as_inputs(0)
    target = inputs["instances"]
    moved = target.gt_boxes.tensor.clone()
    moved[:, 0] += 1
    nothing = torch.tensor([[0.0, 0, 3, 3]])
    proposals = Instances((48, 64), proposal_boxes=Boxes(torch.cat([moved, nothing])))
    proposals.objectness_logits = torch.zeros(len(proposals))
    images = model.preprocess_image([bgr(inputs)])
    with EventStorage():
        [regions], losses = model.roi_heads(images, {}, [proposals], [target])
    assert sorted(regions.gt_classes.tolist()) == sorted(target.gt_classes.tolist() * 2)
    found = {tuple(box) for box in regions.proposal_boxes.tensor.tolist()}
    assert found == {tuple(box) for box in torch.cat([moved, target.gt_boxes.tensor]).tolist()}
    assert losses["loss_regionspot"].requires_grad


def test_images_without_annotations_are_trained_on():
    model = rcnn().train()
    with EventStorage():
        loss = model([bgr(as_inputs(0, number=0))])["loss_regionspot"]
    loss.backward()
    assert loss.item() == 0


def test_learns_a_scene():
    model = rcnn("MODEL.REGIONSPOT.INTEGRATION.DROPOUT", 0.0).train()
    optimizer = torch.optim.AdamW(model.roi_heads.recognizer.knowledge_integration.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        with EventStorage():
            losses.append(model([bgr(as_inputs(0)), bgr(as_inputs(1))])["loss_regionspot"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def instances(boxes, scores, classes):
    fields = {"pred_boxes": Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))}
    return Instances(
        (50, 50),
        **fields,
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes),
        region_indices=torch.arange(len(scores)),
    )


def test_merging_by_score():
    ours = instances([[0, 0, 10, 10], [0, 0, 10, 10], [30, 30, 40, 40]], [0.5, 0.4, 0.3], [5, 6, 7])
    theirs = instances([[1, 0, 10, 10], [30, 30, 40, 41]], [0.45, 0.9], [0, 1])
    merged = merge_detections(ours, theirs, 0.5, -1)
    # the first object is ours (0.5 beats 0.45), and both of our names for it stay; the other is theirs
    assert merged.pred_classes.tolist() == [1, 5, 6]
    assert merge_detections(ours, theirs, 1.0, -1).pred_classes.tolist() == [1, 5, 0, 6, 7]
    assert merge_detections(ours, theirs, 1.0, 2).pred_classes.tolist() == [1, 5]
    assert merge_detections(instances([], [], []), theirs, 0.5, -1).pred_classes.tolist() == [1, 0]
    tied = instances([[0, 0, 10, 10]], [0.45], [9])
    assert merge_detections(tied, theirs[:1], 0.5, -1).pred_classes.tolist() == [0]  # theirs


def test_what_is_suppressed_suppresses_nothing():
    ours = instances([[0, 0, 20, 10], [8, 0, 28, 10]], [0.5, 0.7], [5, 6])
    theirs = instances([[4, 0, 24, 10]], [0.6], [0])
    assert merge_detections(ours, theirs, 0.5, -1).pred_classes.tolist() == [6, 5]


KNOWN = "zebra, blue square, cup, red square"


def host_detections(model, inputs):
    images = model.preprocess_image([inputs])
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features, None)
    return model.roi_heads.host(None, features, proposals)[0][0]


def test_names_that_the_host_knows_are_its_own_and_all_others_as_without_a_host():
    every = (*NO_NMS, "TEST.DETECTIONS_PER_IMAGE", -1, "MODEL.MASK_ON", True)
    model, plain = rcnn(*every, HEAD + "HOST_VOCABULARY", KNOWN), rcnn(*every)
    torch.nn.init.normal_(model.roi_heads.host.box_predictor.cls_score.weight, std=0.02)
    plain.load_state_dict(model.state_dict(), strict=False)
    inputs = bgr(as_inputs(0))
    [found], [ours] = model([inputs]), plain([inputs])
    found, ours, known = found["instances"], ours["instances"], host_detections(model, inputs)
    assert set(found.pred_classes.tolist()) == {0, 1, 2, 3} and (found.scores.diff() <= 0).all()
    for index, theirs in ((2, 1), (0, 3)):  # blue square, red square
        mine, expected = found[found.pred_classes == index], known[known.pred_classes == theirs]
        torch.testing.assert_close(mine.scores, expected.scores)
        torch.testing.assert_close(mine.pred_boxes.tensor, expected.pred_boxes.tensor)
    for index in (1, 3):
        mine, expected = found[found.pred_classes == index], ours[ours.pred_classes == index]
        torch.testing.assert_close(mine.scores, expected.scores)
        assert torch.equal(mine.pred_masks, expected.pred_masks)
    spot = tiny_model("MODEL.MASK_ON", True)  # the masks of the host's boxes are SAM's of these boxes
    spot.recognizer.load_state_dict(model.roi_heads.recognizer.state_dict())
    proposals = Instances((48, 64), proposal_boxes=known.pred_boxes)
    [output] = spot([{**as_inputs(0), "proposals": proposals}])
    expected = output["instances"]
    masks = {tuple(box.tolist()): mask for box, mask in zip(expected.pred_boxes.tensor, expected.pred_masks)}
    mine = found[(found.pred_classes == 0) | (found.pred_classes == 2)]
    assert len({tuple(mask.flatten().tolist()) for mask in mine.pred_masks}) > 1
    for box, mask in zip(mine.pred_boxes.tensor, mine.pred_masks):
        assert torch.equal(masks[tuple(box.tolist())], mask)


def test_names_of_the_host_are_matched_in_other_spellings_and_by_aliases(tmp_path):
    (tmp_path / "aliases.json").write_text('{"crimson thing": "red square"}')
    spelled = (HEAD + "HOST_VOCABULARY", "zebra, Blue_Squares, cup, crimson thing")
    aliases = (HEAD + "HOST_ALIASES", str(tmp_path / "aliases.json"))
    expected = rcnn(*NO_NMS, HEAD + "HOST_VOCABULARY", KNOWN)([bgr(as_inputs(0))])[0]["instances"]
    found = rcnn(*NO_NMS, *spelled, *aliases)([bgr(as_inputs(0))])[0]["instances"]
    assert torch.equal(found.pred_classes, expected.pred_classes) and torch.equal(found.scores, expected.scores)
    without = rcnn(*NO_NMS, *spelled)([bgr(as_inputs(0))])[0]["instances"]
    assert not torch.equal(without.scores, expected.scores)


def test_a_place_may_be_left_to_the_better_of_host_and_regionspot():
    overrides = ("MODEL.REGIONSPOT.SCORE_RULE", "proposal", HEAD + "MERGE_NMS_THRESH", 0.5)
    overrides += ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.1)
    model = rcnn(*GIVEN, HEAD + "HOST_VOCABULARY", KNOWN, *overrides)
    predictor = model.roi_heads.host.box_predictor
    torch.nn.init.zeros_(predictor.cls_score.weight)
    torch.nn.init.zeros_(predictor.bbox_pred.weight)
    predictor.cls_score.bias.data[1] = 8  # blue squares
    inputs = bgr(with_proposals(0))
    inputs["proposals"].objectness_logits = torch.full((len(inputs["proposals"]),), 3.0)
    [output] = model([inputs])
    assert set(output["instances"].pred_classes.tolist()) == {2}


def test_the_vocabulary_is_that_of_the_data_set_or_given(register, tmp_path):
    path = write_dataset(tmp_path / "base", 2)
    register("roi_train", path, path.parent / "images")
    other = write_dataset(tmp_path / "all", 2, names=["a", "b", "c", "d"])
    register("roi_test", other, other.parent / "images")
    sets = ("DATASETS.TRAIN", ("roi_train",), "DATASETS.TEST", ("roi_test",))
    model = rcnn(*sets, "MODEL.REGIONSPOT.VOCABULARY", "")
    assert sorted(model.roi_heads.recognizer.vocabulary) == ["a", "b", "c", "d"]
    assert rcnn(*sets, "MODEL.REGIONSPOT.VOCABULARY", "x, y").roi_heads.recognizer.vocabulary == ["x", "y"]
    model.train()
    model.roi_heads.set_vocabulary(["one"])  # of inference
    with EventStorage():
        model([bgr(as_inputs(0))])
    assert model.roi_heads.num_classes == 4
    model.eval()
    assert model([bgr(as_inputs(0))])[0]["instances"].pred_classes.max() == 0
    missing = rcnn("DATASETS.TEST", ("coco_of_nobody",), "MODEL.REGIONSPOT.VOCABULARY", "")
    with pytest.raises(ValueError, match="no vocabulary is set"):
        missing([as_inputs(0)])


def test_checkpoints_of_host_and_head_together_and_apart(tmp_path, caplog):
    plain = rcnn("MODEL.ROI_HEADS.NAME", "StandardROIHeads")
    trained = rcnn(*REFINED)
    train(trained)
    DetectionCheckpointer(plain, str(tmp_path)).save("host")
    DetectionCheckpointer(trained, str(tmp_path)).save("joint")
    RegionSpotCheckpointer(trained, str(tmp_path)).save("head")  # in the released layout, without frozen parts
    write_frozen_parts(trained.roi_heads.recognizer, tmp_path)
    expected = trained.eval()([bgr(as_inputs(0))])[0]["instances"]

    apart = rcnn(*REFINED, HEAD + "WEIGHTS", str(tmp_path / "head.pth"), *frozen_overrides(tmp_path))
    scramble(apart.backbone)
    DetectionCheckpointer(apart).load(str(tmp_path / "host.pth"))
    assert "not found in the checkpoint" not in caplog.text
    for part in ("backbone.", "proposal_generator.", "roi_heads.box_head.", "roi_heads.box_predictor."):
        assert equal(apart, plain, part)
    assert equal(apart, trained, "roi_heads.recognizer.")

    together = rcnn(*REFINED)
    scramble(together)
    DetectionCheckpointer(together).load(str(tmp_path / "joint.pth"))
    DetectionCheckpointer(apart).load(str(tmp_path / "joint.pth"))
    for model in (together, apart):
        assert_same(model.eval()([bgr(as_inputs(0))])[0]["instances"], expected, 1e-6)

    spot = tiny_model()
    RegionSpotCheckpointer(spot).load(str(tmp_path / "joint.pth"))  # the head of a joint one, for any other way in
    assert equal(spot.recognizer, trained.roi_heads.recognizer)
    host = rcnn("MODEL.ROI_HEADS.NAME", "StandardROIHeads")
    scramble(host)
    DetectionCheckpointer(host).load(str(tmp_path / "joint.pth"))  # and its host, for a detector without us
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in host.state_dict().items())


def scramble(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)


def equal(one, other, prefix=""):
    states = [m.state_dict() for m in (one, other)]
    keys = [key for key in states[0] if key.startswith(prefix)]
    return bool(keys) and all(torch.equal(states[0][key], states[1][key]) for key in keys)


def test_a_part_that_is_damaged_in_a_checkpoint_is_reported(tmp_path, caplog):
    model = rcnn()
    state = model.state_dict()
    del state["roi_heads.recognizer.knowledge_integration.to_clip.weight"]
    model.roi_heads.recognizer.weight_sources["trained"] = "regionspot.pth"
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert missing == ["roi_heads.recognizer.knowledge_integration.to_clip.weight"]
    host_only = {key: value for key, value in state.items() if "knowledge_integration" not in key}
    assert not model.load_state_dict(host_only, strict=False).missing_keys


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((HEAD + "BOXES", "best"), "expected proposals or refined"),
        ((HEAD + "BOX_SCORE", "foreground"), "foreground with BOXES refined"),
        ((*REFINED, HEAD + "HOST", "NoHeads"), "expected one of StandardROIHeads"),
        ((*REFINED, "MODEL.ROI_BOX_HEAD.NAME", ""), "Res5ROIHeads if it is a C4 detector"),
        ((HEAD + "HOST_VOCABULARY", "red square, cup"), "expected the 4 names of the host's classes.*got 2"),
        ((HEAD + "HOST_CONFIG", "no/such.yaml"), "no config of Detectron2's model zoo"),
        ((HEAD + "WEIGHTS", "/no/such.pth"), "no such file"),
    ],
)
def test_wrong_settings_are_refused(overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        rcnn(*overrides)


def test_wrong_inputs_are_refused():
    model = rcnn().train()
    inputs = bgr(as_inputs(0))
    inputs["instances"].gt_classes[0] = 4
    with EventStorage(), pytest.raises(ValueError, match="class 4 is outside the vocabulary of 4 names"):
        model([inputs])
    for box, message in (([200.0, 200, 220, 220], "outside the image"), ([5.0, 5, 5, 9], "no area")):
        inputs = bgr(as_inputs(0))
        inputs["instances"].gt_boxes.tensor[0] = torch.tensor(box)
        with EventStorage(), pytest.raises(ValueError, match=f"annotated boxes of image 0.*{message}"):
            model([inputs])
    for overrides in ((), REFINED):
        inputs = bgr(with_proposals(0))
        inputs["proposals"].proposal_boxes.tensor[1, 0] = float("nan")
        with pytest.raises(ValueError, match="proposals of image 0.*NaN"):
            rcnn(*GIVEN, *overrides)([inputs])
    with pytest.raises(NotImplementedError, match="without the images"):
        model.eval().inference([bgr(as_inputs(0))], [Instances((48, 64), pred_boxes=Boxes([[0, 0, 4, 4]]))])
    learning = rcnn(*REFINED, HEAD + "FREEZE_HOST", False, "MODEL.ROI_HEADS.NUM_CLASSES", 1).train()
    with EventStorage(), pytest.raises(ValueError, match="needs the data set's 4 classes, got 1"):
        learning([bgr(as_inputs(0))])


def test_a_host_config_that_nobody_read_is_refused():
    cfg = rcnn_config()
    cfg.MODEL.REGIONSPOT.HEAD.HOST_CONFIG = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    with pytest.raises(ValueError, match="load_config alone reads it"):
        build_model(cfg)


def test_a_checkpoint_of_another_kind_of_heads_is_refused():
    cascade = rcnn(*REFINED, HEAD + "HOST", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
    with pytest.raises(ValueError, match="ROI heads of another kind.*set HOST"):
        rcnn(*REFINED).load_state_dict(cascade.state_dict(), strict=False)


def test_masks_stay_small_until_they_are_asked_for():
    model = rcnn("MODEL.MASK_ON", True, *GIVEN)
    [raw] = model.inference([bgr(with_proposals(0))], do_postprocess=False)
    assert raw.pred_masks.tensor.shape == (len(raw), 32, 32) and len(raw.pred_masks[:2]) == 2
    full = detector_postprocess(raw[raw.scores > raw.scores.median()], 480, 640)
    assert full.pred_masks.shape == (len(full), 480, 640) and full.pred_masks.dtype == torch.bool


def test_the_model_can_be_copied():
    model = rcnn(*REFINED)
    assert_same(copy.deepcopy(model)([as_inputs(0)])[0]["instances"], model([as_inputs(0)])[0]["instances"])
