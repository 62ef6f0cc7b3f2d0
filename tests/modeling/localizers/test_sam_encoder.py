"""The image encoder against SAM's own, and what it needs at full size."""

import pytest
import torch

from regionspot.modeling.localizers import sam_encoder
from regionspot.modeling.localizers.build_sam import SamSize, build_image_encoder

from ...peak_memory import PeakMemory


def randomize(module):
    """Give every parameter a value that shows; SAM's relative positions start at zero."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() < 4 else 0.05)
    return module


@pytest.mark.parametrize("rows", [50, 512])
def test_equals_sam_in_float64(rows, monkeypatch):
    """Windows that need padding, global attention in both ways, a batch."""
    monkeypatch.setattr(sam_encoder, "CPU_ROWS", rows)
    size = SamSize(24, 3, 3, (1,), image_size=88, patch_size=8, window_size=4, prompt_dim=16)
    encoder = randomize(build_image_encoder(size)).double()  # a grid of 11 positions: windows of 4, 4 and 3
    images = torch.randn(2, 3, 88, 88, dtype=torch.float64)
    with torch.no_grad():
        embeddings = sam_encoder.encode(encoder, images)
        torch.testing.assert_close(embeddings, encoder(images), atol=1e-10, rtol=0)


def test_no_matrix_of_all_pairs_of_positions():
    encoder = build_image_encoder(SamSize(64, 1, 1, (0,)))  # a grid of 64 x 64 positions, as SAM's
    images, peaks = torch.randn(1, 3, 1024, 1024), []
    for encode in (encoder, lambda x: sam_encoder.encode(encoder, x)):
        with torch.no_grad(), PeakMemory() as memory:
            encode(images)
        peaks.append(memory.peak)
    matrix = 4096**2 * 4
    assert peaks[0] > 2 * matrix and peaks[1] < matrix / 2
