"""The geometric ensemble against its definition, from the logits to detections, and where it is refused."""

import logging

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes
from PIL import Image
from torch.nn import functional as F

from regionspot import RegionSpotPredictor
from regionspot.app.prompts import DrawnRegion
from regionspot.app.recognition import PageModel
from regionspot.export.modules import parts_of
from regionspot.index import build_index
from regionspot.modeling.geometric_ensemble import GeometricEnsemble
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.prediction.settings import describe_run
from regionspot.prediction.sources import ImageList
from regionspot.structures import Prompts

from ..helpers import NAMES, as_inputs, draw_scene, tiny_config, tiny_model
from ..index.conftest import write_images

NODE = "MODEL.REGIONSPOT.GEOMETRIC_ENSEMBLE."
BETA = (f"{NODE}BETA", 0.3)
UNEQUAL = (*BETA, f"{NODE}ALPHA", 0.6, f"{NODE}BASE_VOCABULARY", "green disc,cup,white disc")
BACKGROUND = ("MODEL.REGIONSPOT.UNKNOWN.BACKGROUND", ("sky", "wall"))


def inputs_of(number=1, sizes=None):
    inputs = [as_inputs(i, *(sizes[i : i + 1] if sizes else ())) for i in range(number)]
    return [x["image"] for x in inputs], [x["instances"].gt_boxes for x in inputs]


def test_combined_logits_are_the_geometric_mean():
    ensemble = GeometricEnsemble(0.6, 0.3, frozenset(["b", "e"]))
    generator = np.random.default_rng(0)
    logits, clip_logits = generator.normal(0, 4, (2, 5, 4))
    both = (torch.from_numpy(x).float() for x in (logits, clip_logits))
    combined = ensemble.combine(*both, ["a", "b", "c"], num_background=1)
    exponents = np.array([0.3, 0.6, 0.3, 0.3])
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (logits, clip_logits))
    expected = p ** (1 - exponents) * q**exponents
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(combined.softmax(dim=1).numpy(), expected, atol=1e-6)


@torch.no_grad()
def clips_own_probabilities(recognizer, image, boxes):
    """CLIP's own class probabilities of boxes in a square image, by the original layers of its last block."""
    vision, visual = recognizer.vision_language, recognizer.vision_language.clip_model.visual
    block, seen = visual.transformer.resblocks[-1], []
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    visual(vision.preprocess(image)[None])
    handle.remove()
    normed = block.ln_1(seen[0])  # (1 + grid^2, 1, width)
    only_itself = ~torch.eye(len(normed), dtype=torch.bool)
    attended = block.attn(normed, normed, normed, attn_mask=only_itself, need_weights=False)[0]
    dense = (visual.ln_post(attended) @ visual.proj)[1:, 0].unflatten(0, (4, 4))  # (4, 4, text_dim)
    [located] = recognizer.locate(recognizer.encode_images([image]), [Prompts(boxes=boxes.tensor)], with_masks=True)
    weights = F.adaptive_avg_pool2d((located.masks > 0).float()[:, None], 4)[:, 0]
    text, scale = recognizer.classifier.embeddings, vision.logit_scale.exp()
    own, whole = (
        (scale * F.normalize(torch.einsum("nhw,hwc->nc", x, dense), dim=1) @ text.t()).softmax(dim=1)
        for x in (weights, torch.ones_like(weights))
    )
    assert (own - whole).abs().max() > 1e-3  # masks matter
    return own


def test_exponents_weigh_clips_own_scores():
    inputs = as_inputs(0, (64, 64))
    image, boxes = inputs["image"], inputs["instances"].gt_boxes
    for exponent in (1.0, 0.3):
        model = tiny_model(f"{NODE}BETA", exponent)
        own = clips_own_probabilities(model.recognizer, image, boxes)
        modules = tiny_model()([inputs])[0]["regions"]
        modules = torch.zeros_like(own).scatter(1, modules.top_classes, modules.top_scores)
        expected = F.normalize(modules ** (1 - exponent) * own**exponent, p=1, dim=1)
        [output] = model([inputs])
        scores = torch.zeros_like(own).scatter(1, output["regions"].top_classes, output["regions"].top_scores)
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
        assert (expected - modules).abs().max() > 0.02


def test_batches_equal_single_images_with_and_without_masks():
    for overrides in (BETA, UNEQUAL, (*UNEQUAL, *BACKGROUND)):
        recognizer = tiny_model(*overrides).recognizer
        images, boxes = inputs_of(4, [(48, 64), (48, 64), (60, 40), (50, 50)])
        boxes[1] = Boxes(torch.zeros(0, 4))
        together = recognizer(images, boxes, masks="rle")
        for image, image_boxes, instances in zip(images, boxes, together):
            [alone] = recognizer([image], [image_boxes])
            torch.testing.assert_close(instances.scores, alone.scores, atol=1e-5, rtol=0)
            assert torch.equal(instances.pred_classes, alone.pred_classes)


def test_base_names_have_an_exponent_of_their_own():
    """Also where the vocabulary is given for one call."""
    equal, unequal = (RegionSpotPredictor(tiny_config(*overrides, *BACKGROUND)) for overrides in (BETA, UNEQUAL))
    unequal.model.load_state_dict(equal.model.state_dict())
    images, boxes = inputs_of()
    regions = {"boxes": boxes[0].tensor.numpy(), "features": equal.encode(images[0].permute(1, 2, 0).numpy())}
    plain, other = (x.predict(**regions, vocabulary=NAMES).logits for x in (equal, unequal))
    differs = np.abs(plain - other).max(axis=0) > 1e-3
    assert differs.tolist() == [False, True, False, True]  # green disc, white disc
    unequal.set_vocabulary(NAMES)
    np.testing.assert_allclose(unequal.predict(**regions).logits, other, atol=1e-5)
    [result] = unequal.recognizer.recognize(images, boxes)
    np.testing.assert_array_equal(result.regions.top_classes[:, 0], unequal.predict(**regions).classes)


def test_region_embeddings_are_the_modules():
    overrides = ("MODEL.REGIONSPOT.REGION_EMBEDDINGS", True)
    plain, other = (tiny_model(*overrides, *more).recognizer.recognize(*inputs_of())[0] for more in ((), BETA))
    torch.testing.assert_close(plain.regions.region_embeddings, other.regions.region_embeddings)
    assert not torch.equal(plain.regions.top_scores, other.regions.top_scores)


def test_region_with_an_empty_mask_keeps_the_modules_scores():
    plain, recognizer = tiny_model(), tiny_model(*UNEQUAL).recognizer
    recognizer.localizer.sam.mask_threshold = 1e6
    images, boxes = inputs_of()
    [result], [expected] = recognizer.recognize(images, boxes), plain.recognizer.recognize(images, boxes)
    torch.testing.assert_close(result.regions.top_scores, expected.regions.top_scores)


def test_images_encoded_without_the_ensemble_are_refused():
    features = tiny_model().recognizer.encode_images(inputs_of()[0])
    with pytest.raises(ValueError, match="GEOMETRIC_ENSEMBLE: the images were encoded without it"):
        tiny_model(*BETA).recognizer.recognize(*inputs_of(), features=features)


@torch.no_grad()
def test_training_is_of_the_module_alone(monkeypatch):
    images, boxes = inputs_of(2)
    classes = [torch.arange(len(x)) % 4 for x in boxes]
    expected = tiny_model().recognizer.loss(images, boxes, classes)
    recognizer = tiny_model(*UNEQUAL).recognizer
    monkeypatch.setattr(type(recognizer.vision_language), "encode_images_densely", None)  # not called
    torch.testing.assert_close(recognizer.loss(images, boxes, classes), expected)


def test_mask_pooling_and_the_ensemble_share_the_masks():
    images, boxes = inputs_of(2)
    pooling = ("MODEL.REGIONSPOT.INTEGRATION.MASK_POOLING", True)
    plain, recognizer = tiny_model(*pooling).recognizer, tiny_model(*pooling, *BETA).recognizer
    prompts = [Prompts(boxes=x.tensor) for x in boxes]
    one, two = (x.locate(x.encode_images(images), prompts) for x in (plain, recognizer))
    for a, b in zip(one, two):
        torch.testing.assert_close(a.tokens, b.tokens)
        assert torch.equal(b.coverage, b.stage_tokens["mask"])


def test_no_clip_vision_in_the_module():
    """The module sees no feature map, the ensemble does."""
    model = tiny_model(*BETA, "MODEL.REGIONSPOT.CLIP.FEATURES", "none")
    assert model.recognizer.encode_images(inputs_of()[0]).feature_map is None
    assert len(model([as_inputs(0)])[0]["instances"])


def test_base_names_in_other_spellings(caplog):
    ensemble = GeometricEnsemble(0.5, 0.0, frozenset(["fire_hydrant", "bow_(weapon)", "tree"]))
    zeros = torch.zeros(1, 5)
    names = ["Fire hydrant", "bow (weapon)", "bow_(decorative_ribbons)", "tree-merged", "fire"]
    with caplog.at_level(logging.INFO, GeometricEnsemble.__module__):
        combined = ensemble.combine(zeros, torch.tensor([[9.0, 1, 1, 1, 1]]), names)
    assert (combined != combined[0, 4]).tolist() == [[True, True, False, True, False]]
    assert "3 of 5 names are in BASE_VOCABULARY" in caplog.text
    ensemble.combine(zeros[:, :2], zeros[:, :2], ["cat", "cow"])
    assert caplog.records[-1].levelname == "WARNING" and "0 of 2 names" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((f"{NODE}BETA", 1.5), "BETA: expected an exponent from 0 to 1, got 1.5"),
        ((f"{NODE}BETA", -0.1), "BETA: expected an exponent from 0 to 1"),
        ((f"{NODE}BETA", float("nan")), "BETA: expected an exponent from 0 to 1"),
        ((f"{NODE}ALPHA", 0.2), "ALPHA is for the names of BASE_VOCABULARY, which is empty"),
        ((*BETA, "MODEL.REGIONSPOT.SCORE_FUNCTION", "sigmoid"), "expected MODEL.REGIONSPOT.SCORE_FUNCTION softmax"),
        ((*BETA, f"{NODE}BASE_VOCABULARY", "@no/such.txt"), "GEOMETRIC_ENSEMBLE.BASE_VOCABULARY: .*no/such.txt"),
        ((*BETA, "MODEL.META_ARCHITECTURE", "CropBaseline"), "CropBaseline: .* set ALPHA and BETA to 0"),
    ],
)
def test_invalid_settings_are_refused(overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        tiny_model(*overrides, names=None)


def test_export_is_refused():
    with pytest.raises(ValueError, match="GEOMETRIC_ENSEMBLE has no export form"):
        parts_of(RegionRecognizer(tiny_config(*BETA)))


def test_index_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    images, cfg = write_images(tmp_path / "images", 1), tiny_config(*BETA)
    with pytest.raises(ValueError, match="needs two embeddings of a region, and an index has one"):
        build_index(RegionSpotPredictor(cfg), cfg, images, tmp_path / "index", show_progress=False)
    assert not (tmp_path / "index").exists()


def test_changed_base_names_change_what_a_run_depends_on(tmp_path):
    (tmp_path / "base.txt").write_text("cup\n")
    cfg = tiny_config(*BETA, f"{NODE}ALPHA", 0.1, f"{NODE}BASE_VOCABULARY", f"@{tmp_path}/base.txt")
    runs = [describe_run(cfg, ImageList(), NAMES, {}, [])]
    (tmp_path / "base.txt").write_text("saucer\n")
    runs.append(describe_run(cfg, ImageList(), NAMES, {}, []))
    assert runs[0]["ensemble"] != runs[1]["ensemble"] and runs[0]["config"] == runs[1]["config"]


def test_example_in_the_app_keeps_the_other_names_scores(tmp_path):
    page = PageModel(tiny_config(*UNEQUAL))
    image, boxes, _ = draw_scene(0)
    Image.fromarray(image).save(tmp_path / "scene.png")
    encoded, regions = page.encode(tmp_path / "scene.png"), [DrawnRegion(tuple(box)) for box in boxes.tolist()]
    plain = page.recognize(encoded, regions, NAMES).predictions
    _, text = page.predictor.recognizer.encode_vocabulary(NAMES)
    other = page.recognize(encoded, regions, NAMES, {NAMES[0]: text[0].numpy()}).predictions
    np.testing.assert_allclose(plain.logits, other.logits, atol=1e-4)
