"""Masks of regions: SAM's logits, resized to the image on demand, a few at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances, ROIMasks
from torch.nn import functional as F

from regionspot.utils.rle import encode_masks

MAX_PIXELS = 1 << 22  # of the masks that are resized at once: 16 MB of float32
BAND = 64  # pixels of the output that are made by one matrix product
BAND_PIXELS = 1 << 19  # that a CPU measures at once, of all masks: more leave its cache

# ``pred_masks`` as bool tensors, ``pred_masks_rle`` as COCO's RLEs, ``pred_masks`` as ``RegionMasks``; "" for no masks.
MASK_FORMATS = ("", "bitmask", "rle", "lazy")


def check_mask_format(mask_format: str) -> None:
    """Refuse a mask format that is none of ``MASK_FORMATS``."""
    if mask_format not in MASK_FORMATS:
        raise ValueError(f"masks: expected one of {MASK_FORMATS}, got {mask_format!r}")


@dataclass(frozen=True)
class MaskUpsampler:
    """Turns an image's mask logits into binary masks as ``Sam.postprocess_masks`` does, without holding the model.

    Attributes:
        side: side of SAM's square input, pixels.
        input_size: (height, width) of the image in it, before padding.
        threshold: logits above it are inside.
    """

    side: int
    input_size: tuple[int, int]
    threshold: float

    def __call__(self, logits: torch.Tensor, output_size: tuple[int, int]) -> torch.Tensor:
        """Return (N, *output_size) bool masks of (N, h, w) logits."""
        masks = torch.empty((len(logits), *output_size), dtype=torch.bool, device=logits.device)
        for part, full in zip(masks.split(self.chunk_size(output_size)), self.chunks(logits, None, output_size)):
            part.copy_(full)
        return masks

    def chunk_size(self, output_size: tuple[int, int]) -> int:
        """Return the number of masks that are resized to ``output_size`` at once."""
        return max(MAX_PIXELS // (output_size[0] * output_size[1]), 1)

    def chunks(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor | None,
        output_size: tuple[int, int],
        column_major: bool = False,
    ) -> Iterator[torch.Tensor]:
        """Yield the masks of ``logit_chunks``: (n, *output_size) bool."""
        # not a loop, whose variable would keep a chunk while the next one is made
        is_inside = partial(torch.gt, other=self.threshold)
        yield from map(is_inside, self.logit_chunks(logits, rows, output_size, column_major))

    def logit_chunks(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor | None,
        output_size: tuple[int, int],
        column_major: bool = False,
    ) -> Iterator[torch.Tensor]:
        """Yield the (N,) ``rows`` of ``logits``, by default all, in order: (n, *output_size) float32.

        SAM resizes to its square input, removes the padding and resizes again. All of it is linear and separable, so
        one matrix for the rows and one for the columns do the same, and nothing of the input's size is made.
        ``column_major`` is the order in memory that RLE needs.
        """
        rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
        resizer = self.resizer(logits, output_size, column_major)
        for part in rows.split(self.chunk_size(output_size)) if len(rows) else ():
            masks = logits[part].float()  # (n, h, w); what is yielded is kept nowhere here
            yield resizer(masks.transpose(1, 2)).transpose(1, 2) if column_major else resizer(masks)  # (n, H, W)

    def resizer(self, logits: torch.Tensor, output_size: tuple[int, int], column_major: bool = False) -> "MaskResizer":
        """Return what resizes (..., h, w) logits, or (..., w, h) for ``column_major``, to an image on their device."""
        first, last = (0, 1) if column_major else (1, 0)  # the dimension that is resized first, and then the other
        sides = logits.shape[-2:]
        weights = [
            [
                (band, part.to(logits.device))
                for band, part in _bands(self._resizing_matrix(sides[i], i, output_size[i]))
            ]
            for i in (last, first)
        ]
        return MaskResizer(*weights)

    def measure(
        self, logits: torch.Tensor, resizer: "MaskResizer", offset: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Measure masks at the size of the image, of which only some rows are made at a time.

        Args:
            logits: (N, h, w).
            resizer: for them, row-major.
            offset: of the threshold, for the stability.

        Returns:
            (N, 4) float32 XYXY boxes that end after the last pixel inside, zeros for an empty mask; and None without
            ``offset``, else (N,) float32 stability scores: of the pixels that are inside by a threshold lower by
            ``offset``, how many are by one higher by it.
        """
        pixels = BAND_PIXELS if logits.device.type == "cpu" else MAX_PIXELS
        size = max(pixels // (BAND * resizer.width), 1)
        parts = [self._measure(part.float(), resizer, offset) for part in logits.split(size)]  # one of none at least
        boxes, stability = zip(*parts)
        return torch.cat(boxes), None if offset is None else torch.cat(stability)

    def _measure(
        self, logits: torch.Tensor, resizer: "MaskResizer", offset: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = [], torch.full_like(logits[:, 0, :1], -torch.inf)
        inner, outer = logits.new_zeros(2, len(logits))
        for band in resizer.bands(logits):  # (n, BAND, W)
            rows.append(band.amax(dim=2))
            columns = torch.maximum(columns, band.amax(dim=1))
            if offset is not None:  # float counts, which are exact for masks up to 2^24 pixels, are the fastest
                inner += band.clone().gt_(self.threshold + offset).sum(dim=(1, 2))
                outer += band.gt_(self.threshold - offset).sum(dim=(1, 2))
        top, bottom = _extent(torch.cat(rows, dim=1) > self.threshold)
        left, right = _extent(columns > self.threshold)
        return torch.stack([left, top, right, bottom], dim=1).float(), inner / outer

    def _resizing_matrix(self, length: int, dim: int, size: int) -> torch.Tensor:
        """Return (length, size): what each of the logits along a dimension adds to each pixel of the output."""
        impulses = torch.eye(length)[None]
        resized = F.interpolate(impulses, self.side, mode="linear")[..., : self.input_size[dim]]  # without the padding
        return F.interpolate(resized, size, mode="linear")[0]


@dataclass(frozen=True)
class MaskResizer:
    """Resizes logits by products with bands of matrices, first the columns and then the rows.

    Attributes:
        rows, columns: for each BAND pixels of the output the slice of logits that they need, and (BAND, n) weights.
    """

    rows: list[tuple[slice, torch.Tensor]]
    columns: list[tuple[slice, torch.Tensor]]

    @property
    def width(self) -> int:
        """Of the output, pixels."""
        return sum(len(weights) for _, weights in self.columns)

    def __call__(self, masks: torch.Tensor) -> torch.Tensor:
        """Return (N, H, W) of (N, h, w) float32 masks."""
        resized = masks.new_empty(len(masks), sum(len(weights) for _, weights in self.rows), self.width)
        for target, band in zip(resized.split(BAND, dim=1), self.bands(masks), strict=True):
            target.copy_(band)
        return resized

    def bands(self, masks: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the bands of rows of (N, h, w) float32 masks, (N, BAND, W) each."""
        masks = masks[:, : self.rows[-1][0].stop]  # without the padding
        masks = torch.cat([masks[..., band] @ weights.t() for band, weights in self.columns], dim=2)  # (N, h, W)
        for band, weights in self.rows:
            yield weights @ masks[:, band]


def _bands(matrix: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    """Split a resizing matrix where it is not zero: a pixel depends on its three nearest logits at most.

    Returns:
        For each BAND pixels the slice of logits that they depend on, and its (BAND, n) weights.
    """
    bands = []
    for weights in matrix.split(BAND, dim=1):
        used = weights.any(dim=1).nonzero()
        band = slice(int(used[0]), int(used[-1]) + 1)
        bands.append((band, weights[band].t().contiguous()))
    return bands


def _extent(inside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first position inside, and that after the last, of each row of (N, L) bool; 0 where there is none."""
    positions = torch.arange(inside.shape[1], device=inside.device)
    first = positions.where(inside, inside.shape[1]).amin(dim=1)
    return first % inside.shape[1], (positions + 1).where(inside, 0).amax(dim=1)


class RegionMasks(ROIMasks):
    """Masks of detections as SAM's logits, which are resized to the image on demand, once for each region.

    ``Instances`` can hold and index them. They are ``ROIMasks``, though not relative to boxes, because
    ``detector_postprocess`` calls ``to_bitmasks`` on these.
    """

    def __init__(self, logits: torch.Tensor, rows: torch.Tensor, upsample: MaskUpsampler) -> None:
        """
        Args:
            logits: (R, h, w) float, SAM's mask logits of all regions of the image.
            rows: (N,) int64, the region of each detection.
            upsample: the image's ``Localizer.mask_upsampler``.
        """
        self.logits, self.rows, self.upsample = logits, rows, upsample

    @property
    def tensor(self) -> torch.Tensor:
        """(N, h, w) float mask logits of the detections."""
        return self.logits[self.rows]

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def to(self, device: torch.device) -> "RegionMasks":
        return RegionMasks(self.logits.to(device), self.rows.to(device), self.upsample)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: Any) -> "RegionMasks":
        rows = self.rows[[item]] if isinstance(item, (int, np.integer)) else self.rows[item]
        return RegionMasks(self.logits, rows, self.upsample)

    def to_bitmasks(self, boxes: Boxes | None, height: int, width: int, threshold: float = 0.5) -> BitMasks:
        """Return the masks at an output of (height, width); ``boxes`` and ``threshold`` are ignored."""
        unique, inverse = self.rows.unique(return_inverse=True)
        masks = torch.empty((len(self), height, width), dtype=torch.bool, device=self.device)
        start = 0
        for full in self.upsample.chunks(self.logits, unique, (height, width)):
            [in_chunk] = torch.where((inverse >= start) & (inverse < start + len(full)))
            for row, source in zip(in_chunk.tolist(), (inverse[in_chunk] - start).tolist()):
                masks[row] = full[source]
            start += len(full)
        return BitMasks(masks)

    def to_rles(self, height: int, width: int) -> "RleMasks":
        """Return the masks at an output of (height, width) as RLEs; only one chunk at a time is at full size."""
        unique, inverse = self.rows.unique(return_inverse=True)
        rles: list[dict] = []
        for full in self.upsample.chunks(self.logits, unique, (height, width), column_major=True):
            rles += encode_masks(full)
        return RleMasks(rles[i] for i in inverse.tolist())

    def attach(self, detections: Instances, mask_format: str) -> None:
        """Add the masks to their detections as ``pred_masks`` or ``pred_masks_rle``, see ``MASK_FORMATS``."""
        if mask_format == "rle":
            detections.pred_masks_rle = self.to_rles(*detections.image_size)
        elif mask_format == "lazy":
            detections.pred_masks = self
        else:
            detections.pred_masks = self.to_bitmasks(None, *detections.image_size).tensor

    def bounding_boxes(self, height: int, width: int) -> Boxes:
        """Return the boxes around the masks at an output of (height, width); zeros for an empty mask."""
        resizer = self.upsample.resizer(self.logits, (height, width))
        return Boxes(self.upsample.measure(self.tensor, resizer)[0])


class RleMasks(list):
    """COCO's RLEs of detections, which ``Instances`` can index like tensors; detections of a box share one object."""

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            rows = item.nonzero().flatten() if item.dtype == torch.bool else item
            return RleMasks(super(RleMasks, self).__getitem__(row) for row in rows.tolist())
        selected = super().__getitem__(item)
        return RleMasks(selected) if isinstance(item, slice) else selected
