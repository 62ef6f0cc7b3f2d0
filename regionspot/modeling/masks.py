"""Masks of regions: SAM's logits, resized to the image on demand, a few at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances, ROIMasks
from torch.nn import functional as F

from regionspot.utils.rle import encode_masks

MAX_PIXELS = 1 << 25  # of the masks that are resized at once: 128 MB of float32

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
        return max(MAX_PIXELS // max(self.side**2, output_size[0] * output_size[1]), 1)

    def chunks(
        self, logits: torch.Tensor, rows: torch.Tensor | None, output_size: tuple[int, int]
    ) -> Iterator[torch.Tensor]:
        """Yield the masks of the (N,) ``rows`` of ``logits``, by default all, in order: (n, *output_size) bool."""
        rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
        for part in rows.split(self.chunk_size(output_size)) if len(rows) else ():
            masks = F.interpolate(logits[part, None].float(), (self.side, self.side), mode="bilinear")
            masks = masks[..., : self.input_size[0], : self.input_size[1]]  # without the padding
            yield F.interpolate(masks, output_size, mode="bilinear")[:, 0] > self.threshold


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
        rows = self.rows[[item]] if isinstance(item, int) else self.rows[item]
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
        for full in self.upsample.chunks(self.logits, unique, (height, width)):
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
        chunks = self.upsample.chunks(self.logits, self.rows, (height, width))
        return Boxes.cat([BitMasks(full).get_bounding_boxes() for full in chunks])


class RleMasks(list):
    """COCO's RLEs of detections, which ``Instances`` can index like tensors; detections of a box share one object."""

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, torch.Tensor):
            rows = item.nonzero().flatten() if item.dtype == torch.bool else item
            return RleMasks(super(RleMasks, self).__getitem__(row) for row in rows.tolist())
        selected = super().__getitem__(item)
        return RleMasks(selected) if isinstance(item, slice) else selected
