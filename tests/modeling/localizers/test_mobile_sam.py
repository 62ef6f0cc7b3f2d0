"""MobileSAM: its official layout and numbers, timm's own forward, and what all localizers do."""

import builtins
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from segment_anything import SamAutomaticMaskGenerator
from timm.models.tiny_vit import TinyVit

from regionspot.checkpoint.checkpointer import load_model
from regionspot.export.modules import parts_of
from regionspot.modeling.localizers.mobile_sam import MobileSamLocalizer
from regionspot.modeling.proposal_sources import SamAutomaticProposals
from regionspot.structures import Prompts

from ...helpers import as_inputs, deterministic_array, tiny_config, tiny_model
from ...simulated_device import SimulatedTensor, simulated_device
from .test_sam import BOXES

SAM = "MODEL.REGIONSPOT.SAM."
SIZES = {"PATCH_SIZE": 16, "EMBED_DIM": 40, "DEPTH": 6, "NUM_HEADS": 10, "WINDOW_SIZE": 2}
REAL = {**SIZES, "EMBED_DIM": 320, "DEPTH": 12, "WINDOW_SIZE": 7, "PROMPT_DIM": 256, "DECODER_NUM_HEADS": 8}
# Recorded from the official package's image encoder: the shapes of its weights, and the embedding of a 64 pixel
# input by the weights below.
KEYS = json.loads(Path(__file__).with_name("mobile_sam_keys.json").read_text())


def overrides(sizes=SIZES):
    custom = [part for key, value in sizes.items() for part in (f"{SAM}CUSTOM.{key}", value)]
    return ["MODEL.REGIONSPOT.LOCALIZER.NAME", "MobileSamLocalizer", *custom]


@torch.no_grad()
def randomize(localizer):
    """Draw all weights: timm starts biases and the last normalization of a block at zero."""
    generator = torch.Generator().manual_seed(1)
    for key, value in localizer.sam.image_encoder.state_dict().items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator).to(value.device)
            if key.endswith("running_var"):
                value.copy_(0.5 + noise.abs())
            elif value.dim() == 1:
                value.add_(0.1 * noise)
            elif "attention_biases" in key:
                value.copy_(noise)
    localizer.eval()  # timm keeps biases
    return localizer


def localizer(*others):
    torch.manual_seed(0)
    return randomize(MobileSamLocalizer(tiny_config(*overrides(), *others)))


def model(*others):
    result = tiny_model(*overrides(), *others)
    randomize(result.recognizer.localizer)
    return result


def official_state():
    """Return weights under the official keys, each drawn from a generator that its key seeds."""
    state = {}
    for key, shape in KEYS["shapes"].items():
        array = deterministic_array(key, tuple(shape))
        if key.endswith("running_var"):
            array = 0.5 + np.abs(array)
        state[f"image_encoder.{key}"] = torch.from_numpy(array)
    for key in [key for key in state if key.endswith("running_var")]:
        state[key.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    return state


@pytest.fixture(scope="module")
def images():
    return [as_inputs(i, size)["image"] for i, size in enumerate([(48, 64), (64, 40), (130, 90)])]


def test_official_layout_and_numbers(tmp_path):
    """The official file gives what the official package computes from it."""
    cfg = tiny_config(*overrides(REAL), SAM + "WEIGHTS", str(tmp_path / "mobile_sam.pt"))
    sam = MobileSamLocalizer(cfg).sam
    state = {key: value for key, value in sam.state_dict().items() if not key.startswith("image_encoder.")}
    state |= official_state()
    state["image_encoder.layers.1.blocks.0.attn.attention_bias_idxs"] = torch.zeros(49, 49).long()  # of older files
    torch.save(state, tmp_path / "mobile_sam.pt")
    loaded = load_model(cfg).recognizer.localizer
    inputs = torch.linspace(-2, 2, 3 * 64 * 64).sin().reshape(1, 3, 64, 64)
    with torch.no_grad():
        embedding = loaded.embed(inputs)
    assert embedding.shape == (1, 256, 4, 4)
    torch.testing.assert_close(embedding[0, ::32, 1, 2], torch.tensor(KEYS["embedding"]), atol=1e-4, rtol=0)
    own = {f"image_encoder.{key}": value for key, value in loaded.sam.image_encoder.state_dict().items()}
    assert loaded.rename_official_keys(own).keys() == own.keys()  # its own keys stay


def test_full_size_is_the_official_one():
    with torch.device("meta"):
        sam = MobileSamLocalizer(tiny_config(*overrides({}), SAM + "NAME", "mobile_sam")).sam
    shapes = [shape for key, shape in KEYS["shapes"].items() if "running_" not in key and "head." not in key]
    assert sum(x.numel() for x in sam.image_encoder.parameters()) == sum(map(np.prod, shapes))
    assert sam.image_encoder.img_size == 1024 and sam.prompt_encoder.image_embedding_size == (64, 64)


def test_encoder_equals_timm():
    encoder, outputs = localizer().sam.image_encoder, {}
    original = TinyVit(
        num_classes=0,
        embed_dims=(8, 16, 20, 40),
        depths=(1, 1, 3, 1),
        num_heads=(2, 4, 5, 10),
        window_sizes=(2, 2, 4, 2),
    ).eval()
    original.load_state_dict(encoder.trunk.state_dict(), strict=False)
    for name, trunk in (("own", encoder.trunk), ("timm", original)):
        parts = {"stage": trunk.stages[2], "merged": trunk.stages[3].downsample.conv2.conv, "end": trunk.stages[3]}
        for part, module in parts.items():
            module.register_forward_hook(lambda *x, key=(name, part): outputs.update({key: x[-1]}))
    inputs = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        embedding = encoder(inputs)
        original.forward_features(inputs)
        torch.testing.assert_close(outputs["own", "stage"], outputs["timm", "stage"])
        # at half of timm's last stride: its positions are every other one
        assert outputs["own", "merged"].shape == (2, 40, 4, 4)
        torch.testing.assert_close(outputs["own", "merged"][..., ::2, ::2], outputs["timm", "merged"])
        blocks = original.stages[3].blocks
        x = encoder.trunk.stages[3].downsample(outputs["timm", "stage"]).permute(0, 2, 3, 1)
        torch.testing.assert_close(embedding, encoder.neck(blocks(x).permute(0, 3, 1, 2)))


def test_weights_loaded_after_use(images):
    """timm keeps the attention biases of the first images."""
    used, other = localizer(), localizer()
    before = used.encode_images(images[:1])
    state = {key: value + 0.3 * ("attention_biases" in key) for key, value in other.sam.state_dict().items()}
    state = {key: x.flip(0) if "attention_biases" in key else x for key, x in state.items()}
    for one in (used, other):
        one.sam.load_state_dict(state)
    other.eval()
    after = used.encode_images(images[:1])
    assert not torch.allclose(after, before, atol=1e-4) and torch.equal(after, other.encode_images(images[:1]))


def test_batch_equals_singles_and_chunks(images):
    whole = localizer(SAM + "ENCODER_BATCH_SIZE", 3)
    one_by_one = localizer(SAM + "PROMPT_CHUNK", 2)
    embeddings = whole.encode_images(images)
    torch.testing.assert_close(embeddings, torch.cat([one_by_one.encode_images([x]) for x in images]))
    prompts = [Prompts(boxes=BOXES[:count]) for count in (5, 0, 3)]
    for one, other in zip(whole(embeddings, prompts, True), one_by_one(embeddings, prompts, True), strict=True):
        torch.testing.assert_close(one.tokens, other.tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.masks, other.masks, atol=1e-5, rtol=1e-5)


def test_bf16_is_close_to_float32(images):
    exact, rounded = localizer(), localizer("MODEL.REGIONSPOT.PRECISION", "bf16")
    embedding, rounded_embedding = exact.encode_images(images[:1]), rounded.encode_images(images[:1])
    assert rounded_embedding.dtype == torch.float32 and not torch.equal(embedding, rounded_embedding)
    torch.testing.assert_close(rounded_embedding, embedding, atol=0.15, rtol=0)


def test_automatic_masks_equal_sams(images):
    own, settings = localizer(), {"points_per_side": 4, "pred_iou_thresh": -10.0, "stability_score_thresh": -1.0}
    masks = SamAutomaticMaskGenerator(own.sam, **settings).generate(images[0].permute(1, 2, 0).numpy())
    [proposals] = SamAutomaticProposals(own, **settings, box_nms_thresh=0.7)([images[0]])
    assert len(proposals) == len(masks) > 0
    for box, mask in zip(proposals.proposal_boxes.tensor, masks):
        assert box[:2].tolist() == mask["bbox"][:2]


def test_one_training_step():
    trained = model().train()
    frozen = {key: x.clone() for key, x in trained.recognizer.localizer.state_dict().items()}
    optimizer = torch.optim.SGD([x for x in trained.parameters() if x.requires_grad], 0.1)
    before = trained.recognizer.knowledge_integration.to_clip.weight.clone()
    trained([as_inputs(0), as_inputs(1)])["loss_cls"].backward()
    optimizer.step()
    assert not torch.equal(trained.recognizer.knowledge_integration.to_clip.weight, before)
    after = trained.recognizer.localizer.state_dict()  # with the running means of batch normalization
    assert all(torch.equal(value, after[key]) for key, value in frozen.items())
    assert all(x.grad is None and not x.requires_grad for x in trained.recognizer.localizer.parameters())


def test_simulated_device():
    expected = model()([as_inputs(0)])[0]["regions"]
    with simulated_device():
        moved = model("MODEL.DEVICE", "meta")
        regions = moved([as_inputs(0)])[0]["regions"]
        assert isinstance(regions.top_scores, SimulatedTensor)
        torch.testing.assert_close(regions.top_scores.cpu(), expected.top_scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("CUSTOM.PATCH_SIZE", 8, "MobileSAM needs PATCH_SIZE 16"),
        ("CUSTOM.NUM_HEADS", 4, "in multiples of 16, 6 and 10; got 16, 64, 6 and 4"),
        ("NAME", "vit_b", "expected one of mobile_sam, custom; got 'vit_b'"),
    ],
)
def test_wrong_sizes_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        localizer(SAM + key, value)


def test_without_timm(monkeypatch):
    original = builtins.__import__

    def no_timm(name, *args, **kwargs):
        if name.startswith("timm"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_timm)
    with pytest.raises(ImportError, match=r"MobileSamLocalizer needs timm: pip install 'regionspot\[models\]'"):
        localizer()


def test_export_is_refused():
    with pytest.raises(ValueError, match="expected SAM's own image encoder, got that of MobileSamLocalizer"):
        parts_of(model().recognizer)
