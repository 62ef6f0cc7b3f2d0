"""CLIP's image encoder as a backbone: its feature map equals the encoder's, patch by patch."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

from ..helpers import tiny_config


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return build_backbone(tiny_config("MODEL.BACKBONE.NAME", "ClipImageEncoder"), ShapeSpec(channels=3)).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_feature_map_excludes_the_class_token(backbone, images):
    seen = []
    handle = backbone.visual.transformer.register_forward_hook(lambda *args: seen.append(args[-1].transpose(0, 1)))
    backbone.visual(images)  # CLIP's own forward pass
    handle.remove()
    rows = backbone(images)["clip"].flatten(2).transpose(1, 2)
    torch.testing.assert_close(rows, seen[0][:, 1:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_cells_match_their_patches(backbone, images):
    changed = images.clone()
    changed[..., 8:16, 24:32] += 2  # row 1 and column 3 of the patches of 8 x 8
    difference = (backbone(changed)["clip"] - backbone(images)["clip"]).norm(dim=1)  # (2, 4, 4)
    assert difference.flatten(1).argmax(dim=1).tolist() == [1 * 4 + 3] * 2
