"""Regions of several images, padded for attention alone: in groups of images with similar numbers of regions."""

from collections.abc import Sequence

import torch

MAX_PADDED = 1024  # an image with more regions is a group of its own


class RegionGroups:
    """M regions of B images, one image's after the other's, in groups whose images are padded to the same number.

    Padding at most doubles a group's regions. Linear layers run on the M regions without any.

    Attributes:
        longest: the most regions of an image.
        masks: for each group (b, 1, 1, N) bool, True at regions, or None without padding.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """Group images with ``lengths`` regions, of which there is at least one."""
        self.longest = max(lengths)
        self._images: list[torch.Tensor] = []  # (b,) int64 of each group
        self._rows: list[torch.Tensor] = []  # (b, N) int64: which of the M regions; at padding the image's first
        self.masks: list[torch.Tensor | None] = []
        counts = torch.tensor(lengths)
        starts, places, num_places = counts.cumsum(0) - counts, torch.empty(sum(lengths), dtype=torch.int64), 0
        for images in map(torch.tensor, _group(lengths)):
            column = torch.arange(int(counts[images].max()))
            is_region = column < counts[images, None]  # (b, N)
            rows = starts[images, None] + column * is_region
            places[rows[is_region]] = num_places + is_region.flatten().nonzero()[:, 0]
            num_places += rows.numel()
            self._images.append(images)
            self._rows.append(rows)
            self.masks.append(None if is_region.all() else is_region[:, None, None].to(device, non_blocking=True))
        self._is_padded = len(self._rows) > 1 or num_places > len(places) or len(self._images[0]) < len(lengths)
        if self._is_padded:  # else nothing is looked up
            self._images, self._rows = (
                [x.to(device, non_blocking=True) for x in part] for part in (self._images, self._rows)
            )
            self._places = places.to(device, non_blocking=True)  # of each region in the groups, one after the other

    def pad(self, regions: torch.Tensor) -> list[torch.Tensor]:
        """Return (b, N, ...) for each group of (M, ...) regions."""
        if not self._is_padded:
            return [regions.unflatten(0, self._rows[0].shape)]
        return [regions.index_select(0, rows.flatten()).unflatten(0, rows.shape) for rows in self._rows]

    def unpad(self, padded: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return (M, ...) of what ``pad`` returned."""
        flat = [part.flatten(0, 1) for part in padded]
        if not self._is_padded:
            return flat[0]
        return torch.cat(flat).index_select(0, self._places)

    def select(self, x: torch.Tensor, group: int) -> torch.Tensor:
        """Return the (b, ...) images of a group of (B, ...) images."""
        return x if not self._is_padded or len(self._images[group]) == len(x) else x[self._images[group]]


def _group(lengths: Sequence[int]) -> list[list[int]]:
    """Return the images of each group; images without regions are in none."""
    groups: list[list[int]] = []
    for image in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
        longest = lengths[groups[-1][0]] if groups else 0
        if not groups or longest > MAX_PADDED or 2 * lengths[image] < longest:
            groups.append([])
        groups[-1].append(image)
    return [sorted(group) for group in groups]
