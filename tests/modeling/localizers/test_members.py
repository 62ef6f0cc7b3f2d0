"""What every localizer promises, at tiny sizes; the families' own tests compare them with their libraries."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from regionspot.checkpoint.loading import load_weights
from regionspot.modeling.identity import describe_sam
from regionspot.modeling.localizers import LOCALIZER_REGISTRY, LocalizerOutput, build_localizer
from regionspot.modeling.localizers.localizer import TOKEN_STAGES
from regionspot.modeling.mask_pooling import GRID
from regionspot.modeling.proposal_sources import SamAutomaticProposals
from regionspot.structures import Prompts

from ...helpers import as_inputs, deterministic_array, tiny_config, tiny_model
from ...simulated_device import simulated_device

TINY = Path(__file__).with_name("tiny")
SPOT = "MODEL.REGIONSPOT."


def overrides_of(localizer, config):
    return ("MODEL.REGIONSPOT.LOCALIZER.NAME", localizer, "MODEL.REGIONSPOT.SAM.NAME", str(TINY / config))


SIZES = {"PATCH_SIZE": 16, "EMBED_DIM": 40, "DEPTH": 6, "NUM_HEADS": 10, "WINDOW_SIZE": 2}
CUSTOM = (part for key, value in SIZES.items() for part in (f"MODEL.REGIONSPOT.SAM.CUSTOM.{key}", value))
MOBILE_SAM = ("MODEL.REGIONSPOT.LOCALIZER.NAME", "MobileSamLocalizer", *CUSTOM)

# Names of tests, and config overrides; all localizers that are registered are here.
MEMBERS = [
    ("sam", ()),
    ("mobile_sam", MOBILE_SAM),
    ("sam2", overrides_of("Sam2Localizer", "sam2.json")),
    ("sam_hq", overrides_of("SamHqLocalizer", "sam_hq.json")),
    ("edgetam", overrides_of("EdgeTamLocalizer", "edgetam.json")),
    ("sam3_tracker", overrides_of("Sam3TrackerLocalizer", "sam3_tracker.json")),
]

BOXES = torch.tensor([[3.0, 4, 30, 28], [10, 6, 50, 40], [0, 0, 48, 48], [20, 20, 41, 33], [5, 30, 16, 44]])
POINTS = torch.tensor([[[10.0, 12], [40, 40]], [[33, 20], [8, 8]]])
PROMPTS = {
    "boxes": Prompts(boxes=BOXES),
    "points": Prompts(points=POINTS, point_labels=torch.tensor([[1, 0], [1, -1]])),
    "boxes and points": Prompts(boxes=BOXES[:2], points=POINTS, point_labels=torch.tensor([[1, 0], [1, 1]])),
}


def set_weights(sam):
    """Give a model weights of its own under each key; some libraries begin with zeros."""
    state = {}
    for key, value in sam.state_dict().items():
        if value.is_floating_point():
            weights = torch.from_numpy(deterministic_array(key, tuple(value.shape)))
            state[key] = weights.abs() + 4 if key.endswith("running_var") else weights
    shared = [key for key in state if key.endswith("positional_embedding")]  # two names of one matrix
    state |= dict.fromkeys(shared, state[shared[0]] if shared else None)
    sam.load_state_dict(state, strict=False)


@pytest.fixture(params=MEMBERS, ids=lambda member: member[0])
def member(request):
    """The config overrides of a localizer."""
    return request.param[1]


@functools.cache
def _build(overrides):
    localizer = build_localizer(tiny_config(*overrides))
    set_weights(localizer.sam)
    return localizer


def build(member, *overrides):
    return copy.deepcopy(_build((*member, *overrides)))  # in a fraction of the time


@functools.cache
def _build_model(overrides):
    model = tiny_model(*overrides)
    set_weights(model.recognizer.localizer.sam)
    return model


def build_model(member, *overrides):
    return copy.deepcopy(_build_model((*member, *overrides)))


def images(*sizes):
    return [as_inputs(i, size)["image"] for i, size in enumerate(sizes or [(48, 64)])]


def assert_same(actual, expected, tolerance=1e-5):
    for stage, tokens in expected.stage_tokens.items():
        torch.testing.assert_close(actual.stage_tokens[stage], tokens, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(actual.iou, expected.iou, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(actual.masks, expected.masks, atol=tolerance, rtol=10 * tolerance)


def decode(localizer, embeddings, prompts):
    return localizer(embeddings, prompts, with_masks=True, stages=TOKEN_STAGES, with_iou=True)


def test_all_registered_localizers_are_members():
    names = {tiny_config(*overrides).MODEL.REGIONSPOT.LOCALIZER.NAME for _, overrides in MEMBERS}
    assert names == {name for name, _ in LOCALIZER_REGISTRY}


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", PROMPTS)
def test_shapes(member, kind, multimask):
    localizer, prompts = build(member, SPOT + "SAM.MULTIMASK", multimask), PROMPTS[kind]
    assert localizer.multimask is multimask and localizer.dtype == torch.float32
    height, width = localizer.input_size((48, 64))
    assert 0 < height <= width == localizer.input_size((64, 48))[0]
    embeddings = localizer.encode_images(images())
    assert embeddings.dtype == torch.float32 and embeddings.dim() == 4 and len(embeddings) == 1
    [output] = decode(localizer, embeddings, [prompts])
    for stage, tokens in output.stage_tokens.items():
        assert tokens.dtype == torch.float32 and tokens.shape == (len(prompts), localizer.stage_dim(stage))
        assert tokens.isfinite().all() and not torch.allclose(tokens[0], tokens[1], atol=1e-3)
    assert output.iou.shape == (len(prompts),) and output.iou.dtype == output.masks.dtype == torch.float32
    masks = localizer.upsample_masks(output.masks, (48, 64), (96, 128))
    assert masks.shape == (len(prompts), 96, 128) and masks.dtype == torch.bool
    [plain] = localizer(embeddings, [prompts])
    assert plain.tokens.shape == (len(prompts), localizer.token_dim) and plain.masks is None and plain.iou is None
    torch.testing.assert_close(plain.tokens, output.stage_tokens["transformer"], atol=1e-5, rtol=1e-5)


def test_images_and_chunks_make_no_difference(member):
    sizes = [(48, 64), (64, 40), (50, 50)]
    localizer = build(member, SPOT + "SAM.ENCODER_BATCH_SIZE", 2)
    embeddings = localizer.encode_images(images(*sizes))
    prompts = [PROMPTS["boxes"], Prompts(boxes=torch.zeros(0, 4)), PROMPTS["boxes and points"]]
    together = decode(localizer, embeddings, prompts)
    for image, embedding, image_prompts, expected in zip(images(*sizes), embeddings, prompts, together):
        alone = localizer.encode_images([image])
        torch.testing.assert_close(alone[0], embedding, atol=1e-5, rtol=1e-5)
        for localizer.prompt_chunk in (1, 2, 64):
            assert_same(decode(localizer, alone, [image_prompts])[0], expected)
    again = localizer(localizer.encode_images(images(*sizes)), prompts)
    assert all(torch.equal(x.tokens, y.tokens) for x, y in zip(again, localizer(embeddings, prompts)))


def test_no_prompts(member):
    localizer = build(member)
    [output] = decode(localizer, localizer.encode_images(images()), [Prompts(boxes=torch.zeros(0, 4))])
    shape = decode(localizer, localizer.encode_images(images()), [PROMPTS["boxes"]])[0].masks.shape[1:]
    assert output.iou.shape == (0,) and output.masks.shape == (0, *shape)
    assert all(tokens.shape == (0, localizer.stage_dim(stage)) for stage, tokens in output.stage_tokens.items())


def test_mask_prompts(member):
    """A mask alone, and with its box; the logits are positive where the mask is, over the whole input."""
    localizer = build(member)
    masks = torch.zeros(2, 48, 64, dtype=torch.bool)
    masks[0, 12:36, 16:48] = masks[1, :, :32] = True
    logits = localizer.mask_prompts(masks, (48, 64))
    height, width = localizer.input_size((48, 64))
    assert logits.shape[:2] == (2, 1) and logits.shape[2] == logits.shape[3]
    scale = logits.shape[3] / localizer.image_size
    inside = logits[1, 0, : round(height * scale), : round(width * scale)] > 0
    assert inside[:, : inside.shape[1] // 2].all() and not inside[:, inside.shape[1] // 2 :].any()
    embeddings = localizer.encode_images(images())
    [alone] = localizer(embeddings, [Prompts(masks=logits)], True, (), True)
    [both] = decode(localizer, embeddings, [Prompts(masks=logits, boxes=BOXES[:2])])
    [boxes] = decode(localizer, embeddings, [Prompts(boxes=BOXES[:2])])
    assert not torch.allclose(both.stage_tokens["transformer"], alone.tokens, atol=1e-3)
    assert not torch.allclose(both.stage_tokens["transformer"], boxes.stage_tokens["transformer"], atol=1e-3)
    with pytest.raises(ValueError, match="a mask alone has no sparse embedding"):
        localizer(embeddings, [Prompts(masks=logits)], stages=["prompt_encoder"])


def test_frozen_in_the_model(member):
    model = build_model(member).train()
    localizer, keys = model.recognizer.localizer, list(model.recognizer.state_dict())
    assert not any(module.training for module in localizer.modules())
    assert not any(parameter.requires_grad for parameter in localizer.parameters())
    assert {key for key in keys if key.startswith("localizer.")} == {
        f"localizer.sam.{k}" for k in localizer.sam.state_dict()
    }


def test_fingerprint_is_of_the_weights(member):
    recognizer = build_model(member).recognizer
    before = describe_sam(recognizer)
    assert describe_sam(recognizer) == before
    recognizer.localizer.sam.mask_decoder.iou_token.weight.data.add_(1)
    assert describe_sam(recognizer)["fingerprint"] != before["fingerprint"]


def test_weights_are_loaded_from_a_file(member, tmp_path):
    model, other = build_model(member).recognizer, build_model(member).recognizer
    for parameter in other.localizer.parameters():
        parameter.data.zero_()
    path = tmp_path / "sam.pth"
    torch.save(model.localizer.sam.state_dict(), path)
    load_weights(other, "", {"sam": str(path), "clip_model": ""})
    assert other.weight_sources["sam"] == str(path)
    assert describe_sam(other)["fingerprint"] == describe_sam(model)["fingerprint"]


def test_simulated_device_equals_the_cpu(member):
    localizer, (image,) = build(member), images()
    prompts = [PROMPTS["boxes"], PROMPTS["boxes"][:2]]
    expected = decode(localizer, localizer.encode_images([image, image.flip(2)]), prompts)
    expected_masks = localizer.upsample_masks(expected[0].masks, (48, 64), (48, 64))
    with simulated_device() as device:
        localizer.to(device)
        embeddings = localizer.encode_images([image, image.flip(2)])
        assert embeddings.device == device
        outputs = decode(localizer, embeddings, [x.to(device) for x in prompts])
        masks = localizer.upsample_masks(outputs[0].masks, (48, 64), (48, 64)).to("cpu")
        for output, cpu in zip(outputs, expected):
            output.iou, output.masks = output.iou.to("cpu"), output.masks.to("cpu")
            output.stage_tokens = {stage: tokens.to("cpu") for stage, tokens in output.stage_tokens.items()}
            assert_same(output, cpu, 1e-4)
    assert (masks != expected_masks).float().mean() < 1e-3


def test_bf16_is_close_to_float32(member):
    exact, rounded = build(member), build(member, SPOT + "PRECISION", "bf16")
    assert rounded.dtype == torch.bfloat16 and rounded.sam.state_dict().keys() == exact.sam.state_dict().keys()
    embeddings, rounded_embeddings = exact.encode_images(images()), rounded.encode_images(images())
    assert rounded_embeddings.dtype == torch.float32 and not torch.equal(embeddings, rounded_embeddings)
    [expected], [output] = (decode(model, embeddings, [PROMPTS["boxes"]]) for model in (exact, rounded))
    for stage, tokens in expected.stage_tokens.items():
        assert output.stage_tokens[stage].dtype == torch.float32
        assert (output.stage_tokens[stage] - tokens).norm() <= 0.05 * tokens.norm(), stage
    assert output.masks.dtype == torch.float32 and (output.masks - expected.masks).norm() <= 0.1 * expected.masks.norm()
    assert (rounded_embeddings - embeddings).norm() <= 0.1 * embeddings.norm()
    prompt_encoder = rounded.sam.prompt_encoder.state_dict().values()
    assert all(value.dtype == torch.float32 for value in prompt_encoder)


def test_automatic_proposals(member):
    localizer, (image,) = build(member), images()
    [proposals] = SamAutomaticProposals(localizer, 4, -1.0, -1.0, 0.9)([image])
    boxes = proposals.proposal_boxes.tensor
    assert len(boxes) and (boxes >= 0).all() and (boxes <= torch.tensor([64.0, 48, 64, 48])).all()


def test_training_changes_the_trained_module_alone(member):
    model = build_model(member).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.1)
    sum(model([as_inputs(0), as_inputs(1, (60, 40))]).values()).backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith("recognizer.knowledge_integration.") for key in changed)


def test_weights_of_another_model_are_refused(member, tmp_path):
    weights = {f"visual.layer{i}.weight": torch.zeros(2) for i in range(3)}
    torch.save(weights, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"holds no weights of a .*Localizer|does not fit the configured model"):
        load_weights(build_model(member).recognizer, "", {"sam": str(tmp_path / "clip.pt"), "clip_model": ""})


def test_point_labels_may_be_floats(member):
    localizer, labels = build(member), torch.tensor([[1, 0], [1, -1]])
    embeddings = localizer.encode_images(images())
    [one], [other] = (localizer(embeddings, [Prompts(points=POINTS, point_labels=x)]) for x in (labels, labels.float()))
    torch.testing.assert_close(one.tokens, other.tokens)


@pytest.mark.parametrize("size", [(48, 64), (80, 48)])
def test_mask_coverage_is_of_the_image_without_padding(member, monkeypatch, size):
    recognizer = build_model(member).recognizer
    localizer, (height, width) = recognizer.localizer, size
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, : height // 2], masks[1, height // 4 :, width // 2 :] = True, True
    logits = localizer.mask_prompts(masks, size)[:, 0]  # in the frame of the localizer's own masks
    output = LocalizerOutput({"transformer": torch.zeros(2, 4)}, None, logits)
    monkeypatch.setattr(type(localizer), "forward", lambda *arguments: [output])
    recognizer.locate(recognizer.encode_images(images(size)), [Prompts(boxes=BOXES[:2])], stages=("mask",))
    expected = F.adaptive_avg_pool2d(masks[:, None].float(), GRID).flatten(1)
    assert (output.stage_tokens["mask"] - expected).abs().mean() < 0.08  # these masks have few pixels
    assert output.masks is None
