"""The prompt decoder against SAM's own mask decoder, and what it needs at full size."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regionspot.modeling.localizers.build_sam import SamSize, build_sam
from regionspot.modeling.localizers.sam_decoder import PromptDecoder

from ...peak_memory import PeakMemory
from .test_sam_encoder import randomize


@pytest.mark.parametrize("chunks", [[5], [1, 4], [4, 1], [1] * 5], ids=str)
@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_equals_sam_in_float64(chunks, with_masks, depth):
    sam = build_sam(SamSize(8, 1, 1, (0,), 64, 16, prompt_dim=32, decoder_depth=depth, decoder_mlp_dim=48))
    decoder = randomize(sam.mask_decoder).double()
    embedding, position = torch.randn(2, 1, 32, 4, 4, dtype=torch.float64)
    sparse, dense = torch.randn(5, 3, 32).double(), torch.randn(5, 32, 4, 4).double()
    if not with_masks:
        dense = dense[:1].expand(5, -1, -1, -1)
    with torch.no_grad():
        expected_masks, _ = decoder.predict_masks(embedding, position, sparse, dense)
        outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(5, -1, -1)
        image = embedding.expand(5, -1, -1, -1) + dense
        hidden, image = decoder.transformer(image, position.expand_as(image), torch.cat([outputs, sparse], dim=1))

        prompt_decoder = PromptDecoder(decoder, embedding + (0 if with_masks else dense[:1]), position)
        for rows in torch.arange(5).split(chunks):
            updated = prompt_decoder.update(sparse[rows], dense[rows] if with_masks else None)
            tokens = prompt_decoder.read(updated, slice(1, 4))
            torch.testing.assert_close(tokens, hidden[rows, 1:4], atol=1e-10, rtol=0)
            torch.testing.assert_close(updated.image, image[rows], atol=1e-10, rtol=0)
            mlps = decoder.output_hypernetworks_mlps[:3]
            kernels = torch.stack([mlp(token) for mlp, token in zip(mlps, tokens.unbind(1))], dim=1)
            masks = prompt_decoder.predict_masks(updated, kernels)
            torch.testing.assert_close(masks, expected_masks[rows, :3], atol=1e-9, rtol=0)


def decode(prompt_decoder, sparse, dense, counts=()):
    updated = prompt_decoder.update(sparse, dense, counts)
    return prompt_decoder.read(updated, slice(0, 5)), updated.image


@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7])
def test_images_together_equal_each_alone(chunk, with_masks):
    sam = build_sam(SamSize(8, 1, 1, (0,), 64, 16, prompt_dim=32, decoder_mlp_dim=48))
    decoder = randomize(sam.mask_decoder).double()
    embeddings, position = torch.randn(4, 32, 4, 4).double(), torch.randn(1, 32, 4, 4).double()
    owners = torch.tensor([0, 0, 0, 2, 3, 3, 3])  # of each prompt; image 1 has none
    sparse, dense = torch.randn(7, 3, 32).double(), torch.randn(7, 32, 4, 4).double()
    together, alone = PromptDecoder(decoder, embeddings, position), []
    for i in range(4):
        rows = owners == i
        if rows.any():
            one = PromptDecoder(decoder, embeddings[i : i + 1], position)
            alone.append(decode(one, sparse[rows], dense[rows] if with_masks else None))
    with torch.no_grad():
        parts = []
        for rows in torch.arange(7).split(chunk):
            counts = owners[rows].bincount(minlength=4).tolist()
            parts.append(decode(together, sparse[rows], dense[rows] if with_masks else None, counts))
    for results, expected in zip(zip(*parts), zip(*alone)):
        torch.testing.assert_close(torch.cat(results), torch.cat(expected), atol=1e-10, rtol=0)


def test_full_size_takes_a_fifth_of_the_work():
    """The tokens of 100 boxes against SAM's decoder, at SAM's own size."""
    decoder = build_sam(SamSize(depth=1)).to("meta").mask_decoder
    embedding, position = torch.empty(2, 1, 256, 64, 64, device="meta")
    sparse, dense = torch.empty(100, 2, 256, device="meta"), torch.empty(100, 256, 64, 64, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        decoder.predict_masks(embedding, position, sparse, dense)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, PeakMemory() as memory:
        prompt_decoder = PromptDecoder(decoder, embedding, position)
        for chunk in sparse.split(8):
            prompt_decoder.read(prompt_decoder.update(chunk, None), slice(1, 2))
    assert counter.get_total_flops() <= plain.get_total_flops() / 5
    assert memory.peak < 0.15e9
