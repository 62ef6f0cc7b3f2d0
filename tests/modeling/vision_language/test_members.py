"""What every vision-language model does, at tiny sizes."""

import copy

import pytest
import torch
from torch.nn import functional as F

from regionspot.checkpoint.formats import fingerprint
from regionspot.engine.optimizer import build_optimizer
from regionspot.modeling.identity import describe_clip, describe_text
from regionspot.modeling.vision_language.text_encoder import TextEncoder
from regionspot.modeling.vision_language.vision_language_model import FEATURES

from ...helpers import NAMES, as_inputs, tiny_config, tiny_model
from ...simulated_device import simulated_device
from .members import CLIP, MEMBERS

PRECISION, ENSEMBLE = "MODEL.REGIONSPOT.PRECISION", "MODEL.REGIONSPOT.GEOMETRIC_ENSEMBLE.BETA"
IMAGES = [as_inputs(i, size)["image"] for i, size in enumerate([(48, 64), (60, 40), (50, 50)])]


@pytest.fixture(params=[name for name in MEMBERS if name != "quickgelu"], scope="module")
def chosen(request, overrides):
    return overrides[request.param]


@pytest.fixture(scope="module")
def model(chosen):
    return tiny_model(*chosen)


@pytest.fixture
def vision(model):
    return model.recognizer.vision_language


@pytest.mark.parametrize(("features", "length"), zip(FEATURES, (None, 16, 17)))
def test_feature_maps(chosen, vision, features, length):
    model = tiny_model(*chosen, f"{CLIP}FEATURES", features, names=None).recognizer.vision_language
    model.load_state_dict(vision.state_dict())
    feature_map = model.encode_images(IMAGES)
    if length is None:
        assert feature_map is None
        return
    assert feature_map.shape == (3, length, vision.width) and feature_map.dtype == torch.float32
    assert not feature_map.requires_grad and torch.equal(feature_map, model.encode_images(IMAGES))
    singles = torch.cat([model.encode_images([image]) for image in IMAGES])
    torch.testing.assert_close(feature_map, singles, atol=1e-5, rtol=0)
    # the class token comes first
    torch.testing.assert_close(feature_map[:, -16:], vision.encode_images(IMAGES)[:, 1:], atol=1e-5, rtol=0)
    assert (feature_map[0] - feature_map[1]).abs().max() > 1e-3


@torch.no_grad()
def test_dense_features_are_values_that_attend_to_themselves(chosen, vision):
    if not vision.has_dense_features:
        with pytest.raises(ValueError, match=f"{type(vision).__name__} with this .*CLIP.NAME has no dense features"):
            tiny_model(*chosen, ENSEMBLE, 0.2, names=None)
        return
    vision = copy.deepcopy(vision)
    visual, seen = vision.clip_model.visual, []
    block = visual.transformer.resblocks[-1]
    for parameter in block.attn.parameters():  # zeros otherwise, as before training
        parameter.add_(0.01)
    handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    vision.embed_images(vision.preprocess_batch(IMAGES))
    handle.remove()
    normed = block.ln_1(seen[0])
    length = normed.shape[1 if block.attn.batch_first else 0]
    attended = block.attn(normed, normed, normed, attn_mask=~torch.eye(length, dtype=torch.bool))[0]
    attended = attended if block.attn.batch_first else attended.transpose(0, 1)
    scaled = getattr(block, "ls_1", torch.nn.Identity())(attended)
    feature_map, dense = vision.encode_images_densely(IMAGES)
    torch.testing.assert_close(dense, (visual.ln_post(scaled) @ visual.proj)[:, 1:], atol=1e-5, rtol=0)
    assert dense.dtype == torch.float32 and dense.shape == (3, 16, vision.text_dim)
    torch.testing.assert_close(feature_map, vision.encode_images(IMAGES), atol=1e-5, rtol=0)
    assert tiny_model(*chosen, ENSEMBLE, 0.2)([as_inputs(0)])[0]["instances"].scores.isfinite().all()


def test_embeddings(vision):
    inputs = torch.stack([vision.preprocess(image) for image in IMAGES])
    assert inputs.shape == (3, 3, vision.image_size, vision.image_size)
    torch.testing.assert_close(inputs, vision.preprocess_batch(IMAGES))
    with torch.no_grad():
        assert vision.embed_images(inputs).shape == (3, vision.text_dim)


def test_frozen(model):
    vision = copy.deepcopy(model).train().recognizer.vision_language
    assert not any(module.training for module in vision.modules())
    assert not any(parameter.requires_grad for parameter in vision.parameters())


def test_state_dict_is_the_librarys(model):
    vision, keys = model.recognizer.vision_language, model.recognizer.state_dict()
    expected = {f"vision_language.clip_model.{key}" for key in vision.clip_model.state_dict()}
    assert {key for key in keys if key.startswith("vision_language.")} == expected
    assert "vision_language.clip_model.logit_scale" in expected


@pytest.mark.parametrize("side", ["image", "text", "neither"])
def test_fingerprints_change_with_their_own_weights(model, side):
    recognizer = copy.deepcopy(model.recognizer)
    vision = recognizer.vision_language

    def describe():
        return [describe(recognizer)["fingerprint"] for describe in (describe_clip, describe_text)]

    before = describe()
    weights = {"image": vision.image_weights(), "text": vision.text_weights()}.get(side, {"": vision.logit_scale})
    for value in weights.values():
        with torch.no_grad():
            value.add_(0.1)
        if side != "neither":
            break
    image, text = (one != other for one, other in zip(describe(), before))
    assert (image, text) == (side == "image", side == "text")


def test_all_weights_are_of_images_or_text(vision):
    """But for scale and bias of the logits."""
    state = vision.clip_model.state_dict()
    rest = state.keys() - vision.text_weights().keys() - {f"visual.{key}" for key in vision.image_weights()}
    assert rest == {"logit_scale", "logit_bias"} & state.keys()


def test_simulated_device(chosen, model):
    inputs = [as_inputs(0), as_inputs(1, (60, 40))]
    expected = [output["instances"].scores for output in model(inputs)]
    with simulated_device():
        other = tiny_model(*chosen, "MODEL.DEVICE", "meta", names=None)
        other.load_state_dict({key: x.to("meta") for key, x in model.state_dict().items()})
        other.set_vocabulary(NAMES)
        vision = other.recognizer.vision_language
        crops = torch.stack([vision.preprocess(x["image"]) for x in inputs])
        embeddings = vision.embed_images(crops).cpu()
        scores = [output["instances"].scores.cpu() for output in other(inputs)]
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        embeddings, model.recognizer.vision_language.embed_images(crops.cpu()), atol=1e-4, rtol=0
    )


def test_bf16_is_close_to_float32(chosen, model):
    rounded = tiny_model(*chosen, PRECISION, "bf16", names=None).recognizer
    rounded.vision_language.load_state_dict(model.recognizer.vision_language.state_dict())
    one, other = rounded.vision_language, model.recognizer.vision_language
    assert one.dtype == torch.bfloat16 and torch.equal(one.logit_scale, other.logit_scale)
    assert one.logit_bias is None or torch.equal(one.logit_bias, other.logit_bias)
    feature_map, expected = one.encode_images(IMAGES), other.encode_images(IMAGES)
    assert feature_map.dtype == torch.float32 and not torch.equal(feature_map, expected)
    assert F.cosine_similarity(feature_map, expected, dim=2).min() > 0.999
    texts, expected = (TextEncoder(vision, "one")(NAMES) for vision in (one, other))
    assert texts.dtype == torch.float32 and not torch.equal(texts, expected)
    assert (texts * expected).sum(dim=1).min() > 0.99


def test_text_batches_equal_singles(vision):
    """Prompts of several lengths, trimmed or not."""
    names = [*NAMES, "cup", "wooden table and saucer and cup"]
    whole, single = (TextEncoder(vision, "one", batch_size=size).encode(names) for size in (256, 1))
    torch.testing.assert_close(whole, single, atol=1e-5, rtol=0)
    assert whole.shape == (6, vision.text_dim) and len({tuple(x) for x in whole.tolist()}) == 6


def test_text_cache(vision, monkeypatch):
    first = TextEncoder(vision, "one")(NAMES)
    monkeypatch.setattr(TextEncoder, "encode", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(TextEncoder(vision, "one")(NAMES), first)


def test_too_long_name_is_refused(vision):
    with pytest.raises(ValueError, match=f"'cup .* is too long: its prompts do not fit .* {vision.context_length} tok"):
        vision.tokenize(["cup", "cup " * 80], ["{}"])


def test_scale_and_bias_of_logits(model):
    recognizer, tokens = model.recognizer, torch.randn(3, model.recognizer.vision_language.text_dim)
    library = recognizer.vision_language.clip_model
    expected = library.logit_scale.exp() * F.normalize(tokens, dim=1) @ recognizer.classifier.embeddings.t()
    if getattr(library, "logit_bias", None) is not None:
        assert float(library.logit_bias) == -10
        expected = expected + library.logit_bias
    torch.testing.assert_close(recognizer.score(tokens), expected, atol=1e-4, rtol=0)


def test_training_step_changes_the_attention_module_alone(chosen, model):
    model = copy.deepcopy(model).train()
    before = {key: x.clone() for key, x in model.state_dict().items()}
    optimizer = build_optimizer(tiny_config(*chosen, "SOLVER.BASE_LR", 0.1), model)
    model([as_inputs(0), as_inputs(1)])["loss_cls"].backward()
    optimizer.step()
    changed = {key for key, x in model.state_dict().items() if not torch.equal(x, before[key])}
    trained = {key for key, _ in model.recognizer.knowledge_integration.named_parameters()}
    assert changed == {f"recognizer.knowledge_integration.{key}" for key in trained}


def test_setup_is_part_of_the_fingerprint(vision):
    weights = vision.text_weights()
    assert fingerprint(weights, "a") != fingerprint(weights, "b") != fingerprint(weights)
