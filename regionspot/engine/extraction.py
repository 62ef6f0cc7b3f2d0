"""What extraction stores of an image: tokens of its regions, of the flipped image, of jittered boxes; feature maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regionspot.data.box_jitter import check_strength, jittered_copies
from regionspot.data.proposals import ProposalFile
from regionspot.data.store_coverage import check_match_iou
from regionspot.modeling.localizers.localizer import MASK_STAGE, TOKEN_STAGES, check_stages
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.structures import Prompts


@dataclass
class Extraction:
    """What to extract, and how."""

    stages: Sequence[str] = ("transformer",)  # SAM's stages whose tokens to store, and "mask"
    flip: bool = False  # also extract from the horizontally flipped image
    jitter: float = 0.0  # strength of jittered copies of the boxes, whose tokens are stored, too
    jitter_copies: int = 0  # their number for each box
    proposals: ProposalFile | None = None  # its boxes that match an annotated one are regions, too
    match_iou: float = 0.5  # they do from this IoU on
    feature_maps: bool = False  # also store CLIP's feature maps (300 kB per image at BB's size)
    shard_images: int = 512  # images of the data set per shard
    batch_size: int = 1  # images per step; the localizer encodes ``encoder_batch_size`` of them at once
    workers: int = 0  # processes that read images
    skip_damaged: bool = False  # leave out unreadable images with a warning, instead of an error at the end
    machine: tuple[int, int] = (0, 1)  # rank and number of machines that share no disk; (0, 1) does all shards

    def __post_init__(self) -> None:
        check_stages(self.stages, "--stages", (*TOKEN_STAGES, MASK_STAGE))
        for name in ("shard_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', ' ')}: expected at least 1, got {getattr(self, name)}")
        check_strength(self.jitter, "--jitter")
        if self.jitter_copies < 0 or (self.jitter > 0) != (self.jitter_copies > 0):
            raise ValueError(
                "expected --jitter and a positive --jitter-copies, or neither; got "
                f"{self.jitter} and {self.jitter_copies}"
            )
        if self.proposals is not None:
            check_match_iou(self.match_iou)
        if not self.stages or not 0 <= self.machine[0] < self.machine[1]:
            raise ValueError(f"expected a stage, and a machine rank below the number of machines; got {self}")


def extract_features(
    recognizer: RegionRecognizer, batch: list[dict[str, Any]], extraction: Extraction
) -> list[dict[str, Any]]:
    """Return the entries of a batch's images that have regions, for ``pack_images``.

    Args:
        recognizer: whose frozen parts to run.
        batch: of images as ``RegionSpotDatasetMapper`` returns them, with ``image_file``; those with ``unreadable`` are
            left out.
        extraction: what to extract.
    """
    usable = [inputs for inputs in batch if "unreadable" not in inputs and len(inputs["instances"])]
    entries = [
        {
            "image_id": inputs["image_id"],
            "image_file": inputs["image_file"],
            "boxes": inputs["instances"].gt_boxes.tensor,
            "labels": inputs["instances"].gt_classes,
        }
        for inputs in usable
    ]
    if extraction.jitter_copies:
        for entry, inputs in zip(entries, usable):
            entry["jittered_boxes"] = _jitter(entry, inputs["instances"].image_size, extraction)
    for flipped in (False, True) if extraction.flip else (False,):
        pixels = [inputs["image"].flip(2) if flipped else inputs["image"] for inputs in usable]
        boxes = [_all_boxes(entry) for entry in entries]
        if flipped:
            boxes = [_flip(image_boxes, image.shape[2]) for image_boxes, image in zip(boxes, pixels)]
        for entry, features in zip(entries, _features(recognizer, pixels, boxes, extraction)):
            entry.update({f"flipped_{key}" if flipped else key: value for key, value in features.items()})
    return entries


def _jitter(entry: dict[str, Any], image_size: tuple[int, int], extraction: Extraction) -> torch.Tensor:
    """Return the (n, K, 4) jittered copies of an image's boxes."""
    copies = (extraction.jitter, extraction.jitter_copies, entry["image_id"])
    return torch.from_numpy(jittered_copies(entry["boxes"].numpy(), image_size, *copies))


def _all_boxes(entry: dict[str, Any]) -> torch.Tensor:
    """Return the ((1 + K) n, 4) boxes of an image: its own, then all copies of the first, of the second, ..."""
    boxes = entry["boxes"]
    return torch.cat([boxes, entry["jittered_boxes"].flatten(0, 1)]) if "jittered_boxes" in entry else boxes


@torch.no_grad()
def _features(
    recognizer: RegionRecognizer, images: list[torch.Tensor], boxes: list[torch.Tensor], extraction: Extraction
) -> list[dict[str, torch.Tensor]]:
    """Return for each image its tokens by stage and, if asked for, its feature map, under the shard's keys."""
    if not images:
        return []
    encoded = recognizer.encode_images(images, with_feature_map=extraction.feature_maps)
    prompts = [Prompts(boxes=image_boxes) for image_boxes in boxes]
    features: list[dict[str, torch.Tensor]] = [{} for _ in images]
    for entry, output in zip(features, recognizer.locate(encoded, prompts, stages=extraction.stages)):
        for stage, tokens in output.stage_tokens.items():
            num_regions = len(tokens) // (1 + extraction.jitter_copies)
            entry[f"tokens.{stage}"] = tokens[:num_regions]
            if extraction.jitter_copies:
                jittered = tokens[num_regions:]
                entry[f"jittered_tokens.{stage}"] = jittered.unflatten(0, (num_regions, extraction.jitter_copies))
    if encoded.feature_map is not None:
        features = [{**tokens, "feature_maps": image_map} for tokens, image_map in zip(features, encoded.feature_map)]
    return features


def _flip(boxes: torch.Tensor, width: int) -> torch.Tensor:
    """Flip (n, 4) XYXY boxes horizontally in an image of ``width`` pixels."""
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
