"""The localizer against SAM's own forward pass."""

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide

from regionspot.modeling.localizers.sam import SamLocalizer
from regionspot.modeling.localizers.sam_decoder import PromptDecoder
from regionspot.structures import Prompts

from ...helpers import as_inputs, tiny_config, tiny_model

BOXES = torch.tensor(
    [
        [3.0, 4.0, 30.0, 28.0],
        [10.0, 6.0, 60.0, 40.0],
        [0.0, 0.0, 64.0, 48.0],
        [20.0, 20.0, 41.0, 33.0],
        [5.0, 30.0, 16.0, 44.0],
    ]
)
POINTS = torch.tensor([[[10.0, 12.0], [50.0, 40.0]], [[33.0, 20.0], [8.0, 8.0]]])
LABELS = torch.tensor([[1, 0], [1, 1]])


def localizer(*overrides):
    torch.manual_seed(0)
    return SamLocalizer(tiny_config(*overrides))


@pytest.fixture(scope="module")
def image():
    return as_inputs(0)["image"]


@pytest.mark.parametrize(
    "prompts",
    [
        Prompts(boxes=BOXES),
        Prompts(points=POINTS, point_labels=LABELS),
        Prompts(boxes=BOXES[:2], points=POINTS, point_labels=LABELS),
        Prompts(boxes=BOXES[:2], masks=torch.randn(2, 1, 32, 32)),
    ],
    ids=["boxes", "points", "boxes and points", "boxes and masks"],
)
@pytest.mark.parametrize("multimask", [False, True])
def test_equals_sam(image, prompts, multimask):
    model = localizer("MODEL.REGIONSPOT.SAM.MULTIMASK", multimask, "MODEL.REGIONSPOT.SAM.PROMPT_CHUNK", 2)
    sam = model.sam
    embedding = model.encode_images([image])
    [output] = model(embedding, [prompts], with_masks=True, with_iou=True)
    points = None if prompts.points is None else (prompts.points, prompts.point_labels)
    sparse, dense = sam.prompt_encoder(points=points, boxes=prompts.boxes, masks=prompts.masks)
    with torch.no_grad():
        masks, ious = sam.mask_decoder(embedding, sam.prompt_encoder.get_dense_pe(), sparse, dense, multimask)
    best = ious.argmax(dim=1)
    rows = torch.arange(len(prompts))
    torch.testing.assert_close(output.iou, ious[rows, best], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.masks, masks[rows, best], atol=1e-5, rtol=0)


def test_multimask_chooses_by_iou(image):
    """Token and mask are of the same output, the best of the three; the single-mask output is no candidate."""
    model = localizer("MODEL.REGIONSPOT.SAM.MULTIMASK", True)
    sam, hidden = model.sam, []
    embedding = model.encode_images([image])
    inputs = (embedding, sam.prompt_encoder.get_dense_pe(), *sam.prompt_encoder(points=None, boxes=BOXES, masks=None))
    with torch.no_grad():
        bias = sam.mask_decoder.iou_prediction_head.layers[-1].bias
        bias[1:] -= sam.mask_decoder(*inputs, True)[1].mean(dim=0)  # boxes differ in what is best
        bias[0] += 100  # the single-mask output looks best of all
        handle = sam.mask_decoder.transformer.register_forward_hook(lambda *args: hidden.append(args[-1][0]))
        masks, ious = sam.mask_decoder(*inputs, True)
        handle.remove()
    rows, best = torch.arange(len(BOXES)), ious.argmax(dim=1)  # SAM has cut the first output away
    assert len(best.unique()) > 1
    tokens = hidden[0][rows, 1 + 1 + best]  # behind the IoU token and the single-mask token
    mlps = sam.mask_decoder.output_hypernetworks_mlps
    kernels = torch.stack([mlps[1 + index](token) for index, token in zip(best.tolist(), tokens)])
    [output] = model(embedding, [Prompts(boxes=BOXES)], with_masks=True, stages=("transformer", "mlp"), with_iou=True)
    for actual, expected in (
        (output.iou, ious[rows, best]),
        (output.masks, masks[rows, best]),
        (output.stage_tokens["transformer"], tokens),
        (output.stage_tokens["mlp"], kernels),
    ):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("stage", "dim"), [("prompt_encoder", 32), ("transformer", 32), ("mlp", 4)])
@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_stage_lengths_and_chunks(image, stage, dim, chunk):
    model = localizer("MODEL.REGIONSPOT.TOKEN_STAGE", stage, "MODEL.REGIONSPOT.SAM.PROMPT_CHUNK", chunk)
    embedding = model.encode_images([image])
    tokens = model(embedding, [Prompts(boxes=BOXES)])[0].tokens
    whole = localizer("MODEL.REGIONSPOT.TOKEN_STAGE", stage)(embedding, [Prompts(boxes=BOXES)])[0].tokens
    assert tokens.shape == (5, dim) == (5, model.token_dim)
    torch.testing.assert_close(tokens, whole, atol=1e-5, rtol=0)


def test_tokens_of_each_stage(image):
    tokens = {}
    for stage in ("prompt_encoder", "transformer", "mlp"):
        model = localizer("MODEL.REGIONSPOT.TOKEN_STAGE", stage)
        tokens[stage] = model(model.encode_images([image]), [Prompts(boxes=BOXES)])[0].tokens
    sparse, _ = model.sam.prompt_encoder(points=None, boxes=BOXES, masks=None)
    torch.testing.assert_close(tokens["prompt_encoder"], sparse.mean(dim=1))
    torch.testing.assert_close(
        tokens["mlp"], model.sam.mask_decoder.output_hypernetworks_mlps[0](tokens["transformer"])
    )


@pytest.mark.parametrize("boxes", [None, BOXES[:2]], ids=["points", "points and boxes"])
@pytest.mark.parametrize("labels", [[[1, 0], [1, 1]], [[0, 0], [1, 0]], [[1, -1], [0, -1]]])
def test_prompt_encoder_token_is_the_mean(image, boxes, labels):
    """Foreground and background points and corners alike; no padding, neither the user's nor SAM's own."""
    model = localizer("MODEL.REGIONSPOT.TOKEN_STAGE", "prompt_encoder")
    labels = torch.tensor(labels)
    prompts = Prompts(points=POINTS, point_labels=labels, boxes=boxes)
    tokens = model(model.encode_images([image]), [prompts])[0].tokens
    encoder, size, expected = model.sam.prompt_encoder, (model.image_size, model.image_size), []
    for index, (points, kinds) in enumerate(zip(POINTS, labels)):
        pairs = [(point, kind) for point, kind in zip(points, kinds.tolist()) if kind >= 0]
        if boxes is not None:
            pairs += [(boxes[index, :2], 2), (boxes[index, 2:], 3)]
        positions = torch.stack([point for point, _ in pairs])[None] + 0.5  # centers of pixels
        codes = encoder.pe_layer.forward_with_coords(positions, size)[0]
        expected.append((codes + torch.cat([encoder.point_embeddings[kind].weight for _, kind in pairs])).mean(dim=0))
    torch.testing.assert_close(tokens, torch.stack(expected), atol=1e-5, rtol=0)


def test_prompt_encoder_token_ignores_padding(image):
    model = localizer("MODEL.REGIONSPOT.TOKEN_STAGE", "prompt_encoder")
    embedding = model.encode_images([image])
    one = model(embedding, [Prompts(points=POINTS[:, :1], point_labels=LABELS[:, :1])])[0].tokens
    padded = model(embedding, [Prompts(points=POINTS, point_labels=torch.tensor([[1, -1], [1, -1]]))])[0].tokens
    torch.testing.assert_close(one, padded)


@pytest.mark.parametrize("size", [(130, 90), (300, 200), (20, 30)])
def test_resizing_equals_sams_predictor(size):
    """Images in uint8 to the bit, by PIL; images in float as PIL does, which averages over what it takes together."""
    model, transform = localizer(), ResizeLongestSide(64)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(transform.apply_image(image.permute(1, 2, 0).numpy())).permute(2, 0, 1)
    assert max(expected.shape) == 64 and torch.equal(model._resize(image), expected)
    channels = [Image.fromarray(channel) for channel in image.float().numpy()]
    channels = [np.array(x.resize(expected.shape[:0:-1], Image.Resampling.BILINEAR)) for x in channels]
    torch.testing.assert_close(model._resize(image.float()), torch.from_numpy(np.stack(channels)), atol=1e-2, rtol=0)


def test_masks_only_on_request(image, monkeypatch):
    model = localizer()
    embedding = model.encode_images([image])
    monkeypatch.setattr(PromptDecoder, "predict_masks", lambda *_: pytest.fail("a mask was computed"))
    [output] = model(embedding, [Prompts(boxes=BOXES)])
    assert output.masks is None and output.iou is None


def test_no_prompts(image):
    model = localizer()
    [output] = model(model.encode_images([image]), [Prompts(boxes=torch.zeros(0, 4))], with_masks=True, with_iou=True)
    assert output.tokens.shape == (0, 32) and output.iou.shape == (0,) and output.masks.shape == (0, 32, 32)
    assert model.upsample_masks(output.masks, (48, 64), (48, 64)).shape == (0, 48, 64)


def test_mask_prompt_covers_the_mask(image):
    model = localizer()
    mask = torch.zeros(1, 48, 64, dtype=torch.bool)
    mask[0, 10:30, 20:50] = True
    logits = model.mask_prompts(mask, (48, 64))
    assert logits.shape == (1, 1, 32, 32)
    assert torch.equal(logits[0, 0, :24] > 0, mask[0, ::2, ::2]) and (logits[0, 0, 24:] < 0).all()


def test_tokens_depend_on_image_and_box():
    model = tiny_model().recognizer.localizer
    first, second = model.encode_images([as_inputs(0)["image"], as_inputs(1)["image"]])
    tokens = model(first[None], [Prompts(boxes=BOXES)])[0].tokens
    assert not torch.allclose(tokens[0], tokens[1], atol=1e-3)
    assert not torch.allclose(tokens, model(second[None], [Prompts(boxes=BOXES)])[0].tokens, atol=1e-4)


def test_images_are_encoded_in_chunks(monkeypatch):
    images = [as_inputs(i, size)["image"] for i, size in enumerate([(48, 64), (64, 40), (130, 90)])]
    model, batches = localizer("MODEL.REGIONSPOT.SAM.ENCODER_BATCH_SIZE", 3), []
    expected, original = model.encode_images(images), model.sam.image_encoder.patch_embed.forward
    monkeypatch.setattr(model.sam.image_encoder.patch_embed, "forward", lambda x: batches.append(len(x)) or original(x))
    for model.encoder_batch_size in (1, 2, 3):
        torch.testing.assert_close(model.encode_images(images), expected, atol=1e-5, rtol=1e-5)
    assert batches == [1, 1, 1, 2, 1, 3]
    assert localizer().encoder_batch_size == 1
    with pytest.raises(ValueError, match="ENCODER_BATCH_SIZE: expected at least 1, got 0"):
        localizer("MODEL.REGIONSPOT.SAM.ENCODER_BATCH_SIZE", 0)


def test_float_images_are_resized_like_uint8():
    """With antialias: without it a fine pattern that is made smaller turns into another one."""
    model = localizer()
    image = (torch.arange(3 * 200 * 256).reshape(3, 200, 256) * 2654435761 % 256).to(torch.uint8)  # noise
    assert (model._resize(image.float()) - model._resize(image).float()).abs().max() <= 1.01


@pytest.mark.parametrize("prompts", [Prompts(boxes=BOXES), Prompts(boxes=BOXES[:2], masks=torch.randn(2, 1, 32, 32))])
def test_bf16_is_close_to_float32(image, prompts):
    exact, rounded = localizer(), localizer("MODEL.REGIONSPOT.PRECISION", "bf16")
    assert rounded.sam.state_dict().keys() == exact.sam.state_dict().keys()
    embedding = exact.encode_images([image])
    rounded_embedding = rounded.encode_images([image])
    assert rounded_embedding.dtype == torch.float32 and not torch.equal(rounded_embedding, embedding)
    torch.testing.assert_close(rounded_embedding, embedding, atol=0.05, rtol=0)
    [output], [expected] = rounded(rounded_embedding, [prompts], True, (), True), exact(embedding, [prompts], True)
    assert output.tokens.dtype == output.iou.dtype == output.masks.dtype == torch.float32
    torch.testing.assert_close(output.tokens, expected.tokens, atol=0.05, rtol=0)
    torch.testing.assert_close(output.masks, expected.masks, atol=0.05 * float(expected.masks.abs().max()), rtol=0)


def test_autocast_leaves_tokens_as_they_are(image):
    model = localizer()
    embedding, prompts = model.encode_images([image]), [Prompts(boxes=BOXES)]
    expected = model(embedding, prompts)[0].tokens
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(embedding, prompts)[0].tokens, expected)


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="PRECISION: expected one of float32, bf16, fp16; got 'half'"):
        localizer("MODEL.REGIONSPOT.PRECISION", "half")
    with pytest.raises(ValueError, match="fp16 needs a CUDA device"):
        tiny_model("MODEL.REGIONSPOT.PRECISION", "fp16")
