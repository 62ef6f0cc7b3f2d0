"""RegionSpot as a whole: Detectron2's contract, batches, frozen parts, learning."""

import copy
import pickle

import pytest
import torch
from detectron2.structures import Boxes, Instances

from regionspot.engine.optimizer import build_optimizer

from ..helpers import NAMES, as_inputs, tiny_config, tiny_model

MIXED = [((48, 64), 3), ((64, 40), 1), ((50, 50), 0), ((130, 90), 2)]


def mixed_batch():
    return [as_inputs(i, size, number) for i, (size, number) in enumerate(MIXED)]


def assert_same(one: Instances, other: Instances, tolerance: float = 1e-5):
    """Equal as sets of (region, class) pairs: pairs with nearly equal scores may change places."""
    assert len(one) == len(other)
    order = [torch.argsort(x.region_indices * 1000 + x.pred_classes) for x in (one, other)]
    one, other = one[order[0]], other[order[1]]
    assert torch.equal(one.region_indices, other.region_indices) and torch.equal(one.pred_classes, other.pred_classes)
    torch.testing.assert_close(one.scores, other.scores, atol=tolerance, rtol=0)
    torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor, atol=1e-4, rtol=0)
    if one.has("pred_masks"):
        assert (one.pred_masks != other.pred_masks).float().mean() < 1e-3 if len(one) else True


@pytest.mark.parametrize("region_attention", [True, False])
@pytest.mark.parametrize("features", ["none", "feature_map+class_token"])
def test_batch_equals_single_images(region_attention, features):
    model = tiny_model(
        "MODEL.REGIONSPOT.INTEGRATION.REGION_ATTENTION",
        region_attention,
        "MODEL.REGIONSPOT.CLIP.FEATURES",
        features,
        "MODEL.MASK_ON",
        True,
    )
    together = model(mixed_batch())
    assert [len(x["instances"]) for x in together] == [number * len(NAMES) for _, number in MIXED]
    for inputs, output in zip(mixed_batch(), together):
        assert_same(output["instances"], model([inputs])[0]["instances"])


def test_permuted_boxes():
    model = tiny_model()
    inputs = as_inputs(3)
    order = torch.randperm(len(inputs["instances"]), generator=torch.Generator().manual_seed(1))
    permuted = {**inputs, "instances": inputs["instances"][order]}
    straight, other = model([inputs])[0]["instances"], model([permuted])[0]["instances"]
    other.region_indices = order[other.region_indices]
    assert_same(straight, other)


def test_region_attention():
    for attention in (True, False):
        model = tiny_model("MODEL.REGIONSPOT.INTEGRATION.REGION_ATTENTION", attention)
        [alone, beside] = [model([as_inputs(4, num_objects=n)])[0]["instances"] for n in (1, 2)]
        alone, beside = (x[x.region_indices == 0] for x in (alone, beside))
        difference = (
            (alone.scores[alone.pred_classes.argsort()] - beside.scores[beside.pred_classes.argsort()]).abs().max()
        )
        assert (difference > 1e-4) == attention


def test_output_size_and_masks_on_request():
    inputs = {**as_inputs(0), "height": 96, "width": 256}
    plain = tiny_model()([inputs])[0]["instances"]
    assert not plain.has("pred_masks") and plain.image_size == (96, 256)
    expected = inputs["instances"].gt_boxes.tensor * torch.tensor([4.0, 2.0, 4.0, 2.0])
    torch.testing.assert_close(plain.pred_boxes.tensor, expected[plain.region_indices])
    masked = tiny_model("MODEL.MASK_ON", True)([inputs])[0]["instances"]
    assert masked.pred_masks.shape == (len(masked), 96, 256) and masked.pred_masks.dtype == torch.bool


def test_output_size_defaults_to_the_image():
    inputs = {key: value for key, value in as_inputs(0).items() if key not in ("height", "width")}
    [output] = tiny_model("MODEL.MASK_ON", True)([inputs])
    assert output["instances"].image_size == output["regions"].image_size == (48, 64)
    assert output["instances"].pred_masks.shape[1:] == (48, 64)
    torch.testing.assert_close(output["regions"].pred_boxes.tensor, inputs["instances"].gt_boxes.tensor)


def test_top_k_proposals():
    inputs = as_inputs(0)
    proposals = Instances((48, 64), proposal_boxes=inputs["instances"].gt_boxes)
    proposals.scores = torch.linspace(0.2, 0.9, len(proposals))
    [output] = tiny_model("MODEL.REGIONSPOT.PROPOSALS.TOP_K", 2)([{**inputs, "proposals": proposals}])
    expected = proposals.proposal_boxes.tensor.flip(0)[:2]
    assert len(proposals) > 2 and torch.equal(output["regions"].pred_boxes.tensor, expected)


def test_scores_are_products():
    model = tiny_model()
    inputs = as_inputs(0)
    plain = model([inputs])[0]["instances"]
    per_region = torch.zeros(len(inputs["instances"])).index_add_(0, plain.region_indices, plain.scores)
    torch.testing.assert_close(per_region, torch.ones_like(per_region))  # softmax over the vocabulary
    proposals = Instances((48, 64), proposal_boxes=inputs["instances"].gt_boxes)
    proposals.scores = torch.linspace(0.2, 0.9, len(proposals))
    scored = model([{**inputs, "proposals": proposals}])[0]["instances"]
    totals = torch.zeros(len(proposals)).index_add_(0, scored.region_indices, scored.scores)
    torch.testing.assert_close(totals, proposals.scores)
    sigmoid = tiny_model("MODEL.REGIONSPOT.SCORE_FUNCTION", "sigmoid")([inputs])[0]["instances"]
    assert not torch.allclose(sigmoid.scores.sort().values, plain.scores.sort().values, atol=1e-3)


def test_top_k_and_threshold():
    assert len(tiny_model("TEST.DETECTIONS_PER_IMAGE", 3)([as_inputs(0)])[0]["instances"]) == 3
    kept = tiny_model("MODEL.REGIONSPOT.SCORE_THRESH_TEST", 0.27)([as_inputs(0)])[0]["instances"]
    assert (kept.scores >= 0.27).all() and (kept.scores.diff() <= 0).all()


def test_bgr_images():
    inputs = as_inputs(0)
    flipped = {**inputs, "image": inputs["image"].flip(0)}
    assert_same(tiny_model()([inputs])[0]["instances"], tiny_model("INPUT.FORMAT", "BGR")([flipped])[0]["instances"])


def test_vocabulary_changes_at_run_time():
    model = tiny_model()
    before = model([as_inputs(0)])[0]["instances"]
    model.set_vocabulary(["zebra", "cup"], "other")
    assert model([as_inputs(0)])[0]["instances"].pred_classes.max() == 1
    model.set_vocabulary(NAMES)
    assert_same(model([as_inputs(0)])[0]["instances"], before)


def test_configured_and_missing_vocabulary():
    model = tiny_model("MODEL.REGIONSPOT.VOCABULARY", "cup, spoon", names=None)
    assert model.recognizer.vocabulary == ["cup", "spoon"]
    assert model([as_inputs(0)])[0]["instances"].pred_classes.max() == 1
    with pytest.raises(ValueError, match="set_vocabulary"):
        tiny_model(names=None)([as_inputs(0)])


def test_refused_vocabulary_leaves_the_old_one():
    model = tiny_model()
    with pytest.raises(ValueError, match="too long"):
        model.set_vocabulary(["cup", "endless " * 80])
    assert model.recognizer.vocabulary == NAMES
    with model.recognizer.using_vocabulary("a, b"):
        assert model.recognizer.vocabulary == ["a", "b"]
    assert model.recognizer.vocabulary == NAMES and len(model.recognizer.classifier.vocabularies) == 1


def test_nested_vocabulary_blocks():
    recognizer = tiny_model().recognizer
    with recognizer.using_vocabulary("a, b"):
        with recognizer.using_vocabulary("c"):
            assert recognizer.vocabulary == ["c"]
        assert recognizer.vocabulary == ["a", "b"]
    assert recognizer.vocabulary == NAMES and len(recognizer.classifier.vocabularies) == 1


def test_configured_vocabulary_is_encoded_lazily(monkeypatch):
    model = tiny_model("MODEL.REGIONSPOT.VOCABULARY", "cup, spoon", names=None)
    encoded = []
    encoder = model.recognizer.classifier.text_encoder
    original = type(encoder).encode
    monkeypatch.setattr(type(encoder), "encode", lambda self, names: encoded.append(names) or original(self, names))
    model.set_vocabulary(["zebra"])
    assert encoded == [["zebra"]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_little(dtype):
    model = tiny_model("MODEL.MASK_ON", True)
    [plain] = model([as_inputs(0)])
    with torch.autocast("cpu", dtype=dtype):
        [cast] = model([as_inputs(0)])
    assert cast["instances"].scores.dtype == torch.float32
    torch.testing.assert_close(cast["instances"].scores, plain["instances"].scores, atol=0.03, rtol=0)


def test_very_thin_images():
    model = tiny_model()
    instances = Instances((1, 300), gt_boxes=Boxes(torch.tensor([[3.0, 0, 200, 1]])))
    [output] = model([{"image": torch.zeros(3, 1, 300, dtype=torch.uint8), "instances": instances}])
    assert torch.isfinite(output["instances"].scores).all()


def test_model_can_be_copied_and_pickled():
    model = tiny_model()
    assert_same(copy.deepcopy(model)([as_inputs(0)])[0]["instances"], model([as_inputs(0)])[0]["instances"])
    pickle.dumps(model)


def test_embeddings_follow_loaded_clip_weights():
    model = tiny_model()
    before = model.recognizer.classifier.embeddings.clone()
    clip_model = model.recognizer.vision_language.clip_model
    clip_model.load_state_dict({**clip_model.state_dict(), "text_projection": torch.randn(64, 32)})
    assert not torch.allclose(before, model.recognizer.classifier.embeddings, atol=1e-2)


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_any_depth(depth):
    model = tiny_model("MODEL.REGIONSPOT.INTEGRATION.DEPTH", depth)
    assert len(model.recognizer.knowledge_integration.decoder.layers) == depth
    assert torch.isfinite(model([as_inputs(0)])[0]["instances"].scores).all()


def test_training_step_changes_trained_part_only():
    model = tiny_model().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = build_optimizer(tiny_config("SOLVER.BASE_LR", 0.01), model)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.recognizer.knowledge_integration.parameters()
    }
    losses = model(mixed_batch())
    assert set(losses) == {"loss_cls"}
    losses["loss_cls"].backward()
    optimizer.step()
    assert not any(
        module.training
        for part in ("localizer", "vision_language")
        for module in getattr(model.recognizer, part).modules()
    )
    assert model.recognizer.knowledge_integration.training
    for key, value in model.state_dict().items():
        assert torch.equal(before[key], value) != key.startswith("recognizer.knowledge_integration."), key


def test_gradient_is_clipped_over_the_full_model():
    model = tiny_model().train()
    cfg = tiny_config("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.001)
    optimizer = build_optimizer(cfg, model)
    model(mixed_batch())["loss_cls"].backward()
    optimizer.step()
    norms = [p.grad.norm() for p in model.recognizer.knowledge_integration.parameters()]
    assert torch.stack(norms).norm().item() == pytest.approx(0.001, rel=1e-3)


def test_training_batch_without_boxes():
    model = tiny_model().train()
    loss = model([as_inputs(0, num_objects=0)])["loss_cls"]
    loss.backward()
    assert loss.item() == 0
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() for p in model.recognizer.knowledge_integration.parameters()
    )


def test_buffers_hold_logit_scale_and_text_embeddings():
    buffers = dict(tiny_model().named_buffers())
    assert "recognizer.vision_language.clip_model.logit_scale" in buffers
    assert any(key.startswith("recognizer.classifier.text_embeddings") for key in buffers)


def test_tiny_model_overfits_eight_images():
    model = tiny_model("MODEL.REGIONSPOT.INTEGRATION.DROPOUT", 0.0).train()
    optimizer = torch.optim.AdamW(model.recognizer.knowledge_integration.parameters(), lr=7e-4)
    batch = [as_inputs(i) for i in range(8)]
    images, boxes = [x["image"] for x in batch], [x["instances"].gt_boxes for x in batch]
    tokens = model.recognizer.position_tokens(images, boxes)  # computed once by the frozen parts
    feature_maps = model.recognizer.vision_language.encode_images(images)
    stored = [{**x, "tokens": t, "feature_map": m} for x, t, m in zip(batch, tokens, feature_maps)]
    with torch.no_grad():  # start where the tokens of a random SAM differ: half the steps
        to_clip, all_tokens = model.recognizer.knowledge_integration.to_clip, torch.cat(tokens)
        to_clip.weight /= all_tokens.std(dim=0) / 2
        to_clip.bias -= to_clip.weight @ all_tokens.mean(dim=0)
    for _ in range(500):
        loss = model(stored)["loss_cls"]
        if loss < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = total = 0
    for inputs, output in zip(batch, model.eval()(batch)):
        instances, targets = output["instances"], inputs["instances"].gt_classes
        for region, target in enumerate(targets.tolist()):
            best = instances[instances.region_indices == region]
            right += int(best.pred_classes[best.scores.argmax()]) == target
            total += 1
    assert right / total > 0.95


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([float("nan"), 0, 5, 5], "NaN"),
        ([5, 5, 5, 9], "no area"),
        ([9, 5, 5, 9], "no area"),
        ([70, 5, 90, 9], "outside the image of height 48 and width 64"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_invalid_box_is_refused(box, message, training):
    inputs = as_inputs(0, num_objects=1)
    inputs["instances"].gt_boxes = Boxes(torch.tensor([box], dtype=torch.float32))
    with pytest.raises(ValueError, match=f"(?s)scene 0.*{message}"):
        tiny_model().train(training)([inputs])


def test_invalid_inputs_are_refused():
    model = tiny_model()
    with pytest.raises(KeyError, match="proposals"):
        model([{"image": torch.zeros(3, 8, 8)}])
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        model([{**as_inputs(0), "image": torch.zeros(48, 64, 3)}])
    inputs = as_inputs(0)
    with pytest.raises(KeyError, match="training needs the key 'instances'"):
        model.train()([{"image": inputs["image"]}])
    inputs["instances"].gt_classes[0] = 4
    with pytest.raises(ValueError, match="class 4 is outside the vocabulary of 4 names"):
        model.train()([inputs])


def test_bf16_of_the_frozen_parts_recognizes_and_trains():
    """The trained module stays in float32, and its gradients are finite."""
    model, exact = tiny_model("MODEL.REGIONSPOT.PRECISION", "bf16"), tiny_model()
    assert {p.dtype for p in model.recognizer.knowledge_integration.parameters()} == {torch.float32}
    for output, expected in zip(model(mixed_batch()), exact(mixed_batch())):
        assert_same(output["instances"], expected["instances"], tolerance=0.1)
    model.train()
    loss = sum(model(mixed_batch()).values())
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in trained)
