"""A region's own semantic features: CLIP's feature map, averaged inside SAM's mask of the region.

The paper's module finds a region in the feature map by attention alone. ``INTEGRATION.MASK_POOLING`` tells it where to
look, as mask pooling does in FC-CLIP (arXiv 2308.02487) and ODISE (arXiv 2303.04803).
"""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from regionspot.modeling.localizers.localizer import MASK_STAGE, Localizer, LocalizerOutput
from regionspot.modeling.region_groups import RegionGroups
from regionspot.structures import ImageFeatures, Prompts

GRID = 16  # cells of an image in each direction: finer than most feature maps, and 512 bytes of a region in a store
COVERAGE_DIM = GRID * GRID


def mask_coverage(masks: torch.Tensor, valid: tuple[float, float], threshold: float = 0.0) -> torch.Tensor:
    """Return which share of each cell of the image a mask covers.

    Args:
        masks: (N, h, w) float mask logits over the localizer's padded input.
        valid: shares of the input's height and width that are the image; the rest is padding.
        threshold: of the logits.

    Returns:
        (N, COVERAGE_DIM) float32 in [0, 1], the image's rows of cells one after the other.
    """
    height, width = (max(round(share * side), 1) for share, side in zip(valid, masks.shape[-2:]))
    inside = (masks[:, None, :height, :width] > threshold).float()
    return F.adaptive_avg_pool2d(inside, GRID).flatten(1)


def locate_with_coverage(
    localizer: Localizer,
    features: ImageFeatures,
    prompts: Sequence[Prompts],
    with_masks: bool,
    stages: Sequence[str],
    with_iou: bool,
) -> list[LocalizerOutput]:
    """Decode prompts as ``Localizer.forward`` does, with ``coverage``; ``MASK_STAGE`` may be among the stages, too."""
    assert features.embeddings is not None
    others = [stage for stage in stages if stage != MASK_STAGE]
    outputs = localizer(features.embeddings, prompts, True, others, with_iou)
    for output, size in zip(outputs, features.sizes):
        assert output.masks is not None
        height, width = (side / localizer.image_size for side in localizer.input_size(size))
        threshold = localizer.mask_upsampler(size).threshold
        output.coverage = mask_coverage(output.masks, (height, width), threshold)
        tokens = {**output.stage_tokens, MASK_STAGE: output.coverage}
        output.stage_tokens = {stage: tokens[stage] for stage in stages}
        if not with_masks:
            output.masks = None
    return outputs


def pool_features(coverage: torch.Tensor, feature_map: torch.Tensor, groups: RegionGroups) -> torch.Tensor:
    """Return the mean of the feature map over the cells of each mask.

    Args:
        coverage: (M, COVERAGE_DIM) float of the regions of B images.
        feature_map: (B, L, C) float, L = grid^2 or, with the class token first, 1 + grid^2.
        groups: which regions are of which image.

    Returns:
        (M, C) float, 0 for an empty mask.
    """
    grid = math.isqrt(feature_map.shape[1])
    patches = feature_map[:, -grid * grid :]
    weights = F.interpolate(coverage.view(-1, 1, GRID, GRID), (grid, grid), mode="area").flatten(1)  # (M, grid^2)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-6)
    pooled = [padded @ groups.select(patches, i) for i, padded in enumerate(groups.pad(weights))]  # (b, N, C)
    return groups.unpad(pooled)
