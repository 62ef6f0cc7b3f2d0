"""RegionSpot as the head of another detector: detections, training, checkpoints, errors."""

import copy

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model, detector_postprocess
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from regionspot import RegionSpotPredictor
from regionspot.checkpoint.checkpointer import RegionSpotCheckpointer

from ...helpers import NAMES, as_inputs, frozen_overrides, tiny_config, tiny_model, write_dataset, write_frozen_parts
from ..test_meta_arch import assert_same
from .hosts import GIVEN, HEAD, NO_HEAD, NO_NMS, REFINED, bgr, rcnn, rcnn_config, train, with_proposals

ENSEMBLE = tuple(
    part
    for key, value in {"BETA": 0.3, "ALPHA": 0.6, "BASE_VOCABULARY": NAMES[1]}.items()
    for part in (f"MODEL.REGIONSPOT.GEOMETRIC_ENSEMBLE.{key}", value)
)


@pytest.mark.parametrize(("output", "overrides"), [((48, 64), ()), ((96, 100), ()), ((48, 64), ENSEMBLE)])
def test_head_equals_meta_arch_and_predictor(output, overrides):
    """Meta-architecture, head and predictor, over one recognizer, one image and the same boxes."""
    spot = tiny_model("MODEL.MASK_ON", True, *overrides)
    head = rcnn(*GIVEN, *NO_NMS, "MODEL.MASK_ON", True, *overrides)
    head.roi_heads.recognizer.load_state_dict(spot.recognizer.state_dict())
    inputs = [with_proposals(3, output=output), with_proposals(4, (130, 90))]
    spot_detections = [x["instances"] for x in spot(inputs)]
    head_detections = [x["instances"] for x in head([bgr(x) for x in inputs])]
    for one, other in zip(spot_detections, head_detections):
        assert_same(one, other, 1e-5)
        assert one.image_size == other.image_size and len(one) == len(NAMES) * len(one.region_indices.unique())
    predictor = RegionSpotPredictor(tiny_config(*overrides))
    predictor.recognizer.load_state_dict(spot.recognizer.state_dict())
    predictor.set_vocabulary(NAMES)
    predictor.set_image(inputs[0]["image"].permute(1, 2, 0).numpy())
    result = predictor.predict(boxes=inputs[0]["proposals"].proposal_boxes.tensor.numpy(), top_k=4)
    objectness = inputs[0]["proposals"].objectness_logits.sigmoid()
    for region in range(len(result)):
        detections = head_detections[0][head_detections[0].region_indices == region]
        assert detections.pred_classes.tolist() == result.top_classes[region].tolist()
        expected = torch.from_numpy(result.top_scores[region]) * objectness[region]
        torch.testing.assert_close(detections.scores, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("overrides", [(), REFINED, (*REFINED, HEAD + "BOX_SCORE", "foreground")])
def test_host_proposals_are_recognized(overrides):
    model = rcnn("MODEL.MASK_ON", True, "MODEL.REGIONSPOT.PROPOSALS.TOP_K", 7, *overrides)
    [output] = model([{**as_inputs(0), "height": 96, "width": 128}])
    detections = output["instances"]
    assert 0 < len(detections) <= 100 and detections.region_indices.max() < 7
    assert detections.pred_masks.shape == (len(detections), 96, 128) and detections.image_size == (96, 128)
    assert detections.pred_classes.max() < len(NAMES) and (detections.scores.diff() <= 0).all()


HOST_VOCABULARY = (HEAD + "HOST_VOCABULARY", "zebra, blue square, cup, red square")


@pytest.mark.parametrize("overrides", [(), REFINED, HOST_VOCABULARY, (*HOST_VOCABULARY, *ENSEMBLE)])
def test_batch_with_an_image_without_proposals(overrides):
    model = rcnn(*GIVEN, *overrides, "MODEL.MASK_ON", True)
    inputs = [bgr(with_proposals(0)), bgr(with_proposals(1)), bgr(with_proposals(2))]
    inputs[1]["proposals"] = inputs[1]["proposals"][:0]
    numbers = [len(output["instances"]) for output in model(inputs)]
    assert numbers[0] and numbers[2] and numbers[1] == 0
    assert [len(x["instances"]) for x in model(inputs[:1])] == numbers[:1]


def test_thresholds_of_roi_heads():
    assert len(rcnn("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.9)([as_inputs(0)])[0]["instances"]) == 0
    unlimited, few = (rcnn("MODEL.ROI_HEADS.NMS_THRESH_TEST", t)([as_inputs(0)])[0]["instances"] for t in (1.0, 0.01))
    assert 0 < len(few) < len(unlimited)


def test_training_regions():
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
    sampled = {tuple(box) for box in regions.proposal_boxes.tensor.tolist()}
    assert sampled == {tuple(box) for box in torch.cat([moved, target.gt_boxes.tensor]).tolist()}
    assert losses["loss_regionspot"].requires_grad


def test_training_without_annotations():
    model = rcnn().train()
    with EventStorage():
        loss = model([bgr(as_inputs(0, num_objects=0))])["loss_regionspot"]
    loss.backward()
    assert loss.item() == 0


def test_overfits_a_scene():
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


KNOWN = "zebra, blue square, cup, red square"


def host_detections(model, inputs):
    images = model.preprocess_image([inputs])
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features, None)
    return model.roi_heads.host(None, features, proposals)[0][0]


def test_known_names_are_the_hosts():
    options = (*NO_NMS, "TEST.DETECTIONS_PER_IMAGE", -1, "MODEL.MASK_ON", True)
    model, plain = rcnn(*options, HEAD + "HOST_VOCABULARY", KNOWN), rcnn(*options)
    torch.nn.init.normal_(model.roi_heads.host.box_predictor.cls_score.weight, std=0.02)
    plain.load_state_dict(model.state_dict(), strict=False)
    inputs = bgr(as_inputs(0))
    [merged], [named] = model([inputs]), plain([inputs])
    merged, named, known = merged["instances"], named["instances"], host_detections(model, inputs)
    assert set(merged.pred_classes.tolist()) == {0, 1, 2, 3} and (merged.scores.diff() <= 0).all()
    for index, host_index in ((2, 1), (0, 3)):  # blue square, red square
        actual, expected = merged[merged.pred_classes == index], known[known.pred_classes == host_index]
        torch.testing.assert_close(actual.scores, expected.scores)
        torch.testing.assert_close(actual.pred_boxes.tensor, expected.pred_boxes.tensor)
    for index in (1, 3):
        actual, expected = merged[merged.pred_classes == index], named[named.pred_classes == index]
        torch.testing.assert_close(actual.scores, expected.scores)
        assert torch.equal(actual.pred_masks, expected.pred_masks)
    spot = tiny_model("MODEL.MASK_ON", True)  # the masks of the host's boxes are SAM's of these boxes
    spot.recognizer.load_state_dict(model.roi_heads.recognizer.state_dict())
    proposals = Instances((48, 64), proposal_boxes=known.pred_boxes)
    [output] = spot([{**as_inputs(0), "proposals": proposals}])
    expected = output["instances"]
    masks = {tuple(box.tolist()): mask for box, mask in zip(expected.pred_boxes.tensor, expected.pred_masks)}
    actual = merged[(merged.pred_classes == 0) | (merged.pred_classes == 2)]
    assert len({tuple(mask.flatten().tolist()) for mask in actual.pred_masks}) > 1
    for box, mask in zip(actual.pred_boxes.tensor, actual.pred_masks):
        assert torch.equal(masks[tuple(box.tolist())], mask)


@pytest.mark.parametrize("with_masks", [False, True])
def test_region_embeddings_of_both_sources(with_masks):
    options = (*NO_NMS, "MODEL.MASK_ON", with_masks, "MODEL.REGIONSPOT.REGION_EMBEDDINGS", True)
    model = rcnn(*options, HEAD + "HOST_VOCABULARY", KNOWN)
    inputs = bgr(as_inputs(0))
    [merged], known = model([inputs]), host_detections(model, inputs)
    merged = merged["instances"]
    known = known[(known.pred_classes == 1) | (known.pred_classes == 3)]  # regions attend to those of known names
    recognizer = model.roi_heads.recognizer
    [expected] = recognizer.recognize([as_inputs(0)["image"]], [known.pred_boxes])
    of_host = {tuple(x.tolist()): y for x, y in zip(known.pred_boxes.tensor, expected.regions.region_embeddings)}
    is_host = (merged.pred_classes == 0) | (merged.pred_classes == 2)
    assert 0 < is_host.sum() < len(merged)
    assert merged.region_indices[is_host].min() > merged.region_indices[~is_host].max()
    for box, embedding in zip(merged.pred_boxes.tensor[is_host], merged.region_embeddings[is_host]):
        torch.testing.assert_close(embedding, of_host[tuple(box.tolist())])
    plain = rcnn(*options)
    plain.load_state_dict(model.state_dict(), strict=False)
    named = plain([inputs])[0]["instances"]
    rows = {
        (*box.tolist(), label.item()): i for i, (box, label) in enumerate(zip(named.pred_boxes, named.pred_classes))
    }
    by_name = merged[~is_host]
    chosen = [rows[(*box.tolist(), label.item())] for box, label in zip(by_name.pred_boxes, by_name.pred_classes)]
    torch.testing.assert_close(by_name.region_embeddings, named.region_embeddings[torch.tensor(chosen)])


def test_known_names_in_other_spellings(tmp_path):
    (tmp_path / "aliases.json").write_text('{"crimson thing": "red square"}')
    spelled = (HEAD + "HOST_VOCABULARY", "zebra, Blue_Squares, cup, crimson thing")
    aliases = (HEAD + "HOST_ALIASES", str(tmp_path / "aliases.json"))
    expected = rcnn(*NO_NMS, HEAD + "HOST_VOCABULARY", KNOWN)([bgr(as_inputs(0))])[0]["instances"]
    merged = rcnn(*NO_NMS, *spelled, *aliases)([bgr(as_inputs(0))])[0]["instances"]
    assert torch.equal(merged.pred_classes, expected.pred_classes) and torch.equal(merged.scores, expected.scores)
    without = rcnn(*NO_NMS, *spelled)([bgr(as_inputs(0))])[0]["instances"]
    assert not torch.equal(without.scores, expected.scores)


def test_merging_across_classes():
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


def test_vocabulary_of_data_set_or_config(register, tmp_path):
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


def test_checkpoints_joint_and_apart(tmp_path, caplog):
    plain = rcnn(*NO_HEAD)
    trained = rcnn(*REFINED)
    train(trained)
    DetectionCheckpointer(plain, str(tmp_path)).save("host")
    DetectionCheckpointer(trained, str(tmp_path)).save("joint")
    RegionSpotCheckpointer(trained, str(tmp_path)).save("head")  # released layout, without frozen parts
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
    RegionSpotCheckpointer(spot).load(
        str(tmp_path / "joint.pth")
    )  # the head of a joint checkpoint, in RegionSpot itself
    assert equal(spot.recognizer, trained.roi_heads.recognizer)
    host = rcnn(*NO_HEAD)
    scramble(host)
    DetectionCheckpointer(host).load(str(tmp_path / "joint.pth"))  # and its host, in a detector without RegionSpot
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in host.state_dict().items())


def scramble(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)


def equal(one, other, prefix=""):
    states = [m.state_dict() for m in (one, other)]
    keys = [key for key in states[0] if key.startswith(prefix)]
    return bool(keys) and all(torch.equal(states[0][key], states[1][key]) for key in keys)


def test_missing_keys_are_reported(tmp_path, caplog):
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
def test_invalid_settings_are_refused(overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        rcnn(*overrides)


def test_invalid_inputs_are_refused():
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


def test_unread_host_config_is_refused():
    cfg = rcnn_config()
    cfg.MODEL.REGIONSPOT.HEAD.HOST_CONFIG = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    with pytest.raises(ValueError, match="load_config alone reads it"):
        build_model(cfg)


def test_checkpoint_of_other_heads_is_refused():
    cascade = rcnn(*REFINED, HEAD + "HOST", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
    with pytest.raises(ValueError, match="ROI heads of another kind.*set HOST"):
        rcnn(*REFINED).load_state_dict(cascade.state_dict(), strict=False)


def test_masks_stay_low_resolution():
    model = rcnn("MODEL.MASK_ON", True, *GIVEN)
    [raw] = model.inference([bgr(with_proposals(0))], do_postprocess=False)
    assert raw.pred_masks.tensor.shape == (len(raw), 32, 32) and len(raw.pred_masks[:2]) == 2
    full = detector_postprocess(raw[raw.scores > raw.scores.median()], 480, 640)
    assert full.pred_masks.shape == (len(full), 480, 640) and full.pred_masks.dtype == torch.bool


def test_model_can_be_copied():
    model = rcnn(*REFINED)
    assert_same(copy.deepcopy(model)([as_inputs(0)])[0]["instances"], model([as_inputs(0)])[0]["instances"])
