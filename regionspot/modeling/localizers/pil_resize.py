"""PIL's bilinear resize on any device: SAM's preprocessing, which its tokens depend on, without the CPU."""

from functools import lru_cache

import torch

PRECISION_BITS = 22  # of PIL's weights, which are integers


def resize_bytes(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize as ``PIL.Image.resize`` with ``BILINEAR`` does, in integers: rows first and then columns.

    Pillow 13 begins with columns where that is less work, which changes single gray levels.

    Args:
        image: (C, H, W) uint8.
        size: (height, width) of the result.

    Returns:
        (C, *size) uint8 on the image's device.
    """
    return _resize(_resize(image, 2, size[1]), 1, size[0])


def _resize(image: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    if image.shape[dim] == size:
        return image
    taps, weights = _taps(image.shape[dim], size, image.device)
    shape = (-1, 1) if dim == 1 else (-1,)
    total = torch.full((), 1 << (PRECISION_BITS - 1), dtype=torch.int32, device=image.device)  # a half, to round
    for pixels, weight in zip(taps, weights):  # three in images that become larger
        total = total + image.index_select(dim, pixels).int() * weight.view(shape)
    return (total >> PRECISION_BITS).clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=1024)  # some 60 kB each; data sets of photographs have hundreds of sizes
def _taps(length: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (K, size) int64 pixels that each pixel of a resized row depends on, and their (K, size) int32 weights."""
    scale = length / size
    support = max(scale, 1.0)  # of the triangle, which widens when pixels become fewer: antialias
    centers = (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    first = (centers - support + 0.5).clamp(min=0).long()
    last = (centers + support + 0.5).long().clamp(max=length)
    pixels = first + torch.arange(int((last - first).max()))[:, None]
    weights = (1 - ((pixels - centers + 0.5) / support).abs()).clamp(min=0) * (pixels < last)
    weights = (weights / weights.sum(dim=0) * (1 << PRECISION_BITS) + 0.5).int()
    pixels = pixels.clamp(max=length - 1)
    return pixels.to(device, non_blocking=True), weights.to(device, non_blocking=True)
