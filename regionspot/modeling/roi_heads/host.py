"""The ROI heads that a host detector had before RegionSpot's, and the boxes that they refine."""

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, build_roi_heads
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from regionspot.structures import check_image_format, read_proposals, to_rgb

HOSTS = ("StandardROIHeads", "CascadeROIHeads", "Res5ROIHeads")


def build_host_heads(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the ROI heads of ``MODEL.REGIONSPOT.HEAD.HOST``, for boxes and classes only."""
    name = cfg.MODEL.REGIONSPOT.HEAD.HOST or "StandardROIHeads"
    if name not in HOSTS:
        raise ValueError(f"MODEL.REGIONSPOT.HEAD.HOST: expected one of {', '.join(HOSTS)}; got {name!r}")
    if name != "Res5ROIHeads" and not cfg.MODEL.ROI_BOX_HEAD.NAME:
        raise ValueError(
            f"MODEL.REGIONSPOT.HEAD.HOST {name}: the host has no MODEL.ROI_BOX_HEAD.NAME; set HOST to the kind of ROI "
            "heads that it had itself, Res5ROIHeads if it is a C4 detector"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NAME = name
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = False  # masks are SAM's; keypoints of open classes do not exist
    return build_roi_heads(cfg, input_shape)


class HostImages(nn.Module):
    """Undoes a host's normalization and padding of its images."""

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, pixel_mean: tuple[float, ...], pixel_std: tuple[float, ...], input_format: str = "BGR") -> None:
        """Take the host's normalization, and the channel order of its images, "RGB" or "BGR"."""
        super().__init__()
        self.input_format = check_image_format(input_format)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    def forward(self, images: ImageList) -> list[torch.Tensor]:
        """Return the (3, H, W) uint8 RGB images, on the host's device: SAM's resizing is exact on any."""
        originals = []
        for normalized, (height, width) in zip(images.tensor, images.image_sizes):
            # the host's resizing stays: boxes are in the frame of its input
            pixels = normalized[:, :height, :width].float() * self.pixel_std + self.pixel_mean
            originals.append(to_rgb(pixels.round().clamp(0, 255).to(torch.uint8), self.input_format))
        return originals


@dataclass(frozen=True)
class BoxSelection:
    """Which of a host's boxes are recognized.

    Attributes:
        source: "proposals" of the host's RPN, or "refined": moved by the host's own box regression.
        score: "objectness" of the proposals, or "foreground", by the host's own classification (with "refined" only).
        nms_thresh: class-agnostic suppression before anything is recognized; 1 for none.
        top_k: number of best boxes to keep of an image; -1 for all.
    """

    source: str = "proposals"
    score: str = "objectness"
    nms_thresh: float = 1.0
    top_k: int = -1

    def __post_init__(self) -> None:
        if self.source not in ("proposals", "refined"):
            raise ValueError(f"MODEL.REGIONSPOT.HEAD.BOXES: expected proposals or refined, got {self.source!r}")
        if self.score not in ("objectness", "foreground") or (self.score == "foreground" and not self.is_refined):
            raise ValueError(
                "MODEL.REGIONSPOT.HEAD.BOX_SCORE: expected objectness, or foreground with BOXES refined; "
                f"got {self.score!r}"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "BoxSelection":
        node = cfg.MODEL.REGIONSPOT.HEAD
        return cls(node.BOXES, node.BOX_SCORE, node.BOX_NMS_THRESH, cfg.MODEL.REGIONSPOT.PROPOSALS.TOP_K)

    @property
    def is_refined(self) -> bool:
        return self.source == "refined"

    def select(
        self, heads: nn.Module | None, features: dict[str, torch.Tensor], proposals: list[Instances]
    ) -> tuple[list[Boxes], list[torch.Tensor | None]]:
        """Return the boxes to recognize of B images, and their scores in [0, 1].

        ``heads`` are one of ``HOSTS``; they and the backbone's ``features`` are needed for refined boxes only.
        """
        if self.is_refined:
            assert heads is not None
            proposals = self._refine(heads, features, proposals)
        selected = [read_proposals(x, self.top_k, self.nms_thresh) for x in proposals]
        return [boxes for boxes, _ in selected], [scores for _, scores in selected]

    def _refine(
        self, heads: nn.Module, features: dict[str, torch.Tensor], proposals: list[Instances]
    ) -> list[Instances]:
        results = []
        for original, (boxes, foreground) in zip(proposals, refine_boxes(heads, features, proposals)):
            refined = Instances(original.image_size, proposal_boxes=boxes)
            if self.score == "foreground":
                refined.scores = foreground
            elif (objectness := read_proposals(original)[1]) is not None:
                refined.scores = objectness
            results.append(refined[boxes.nonempty()])
        return results


def refine_boxes(
    heads: nn.Module, features: dict[str, torch.Tensor], proposals: list[Instances]
) -> list[tuple[Boxes, torch.Tensor]]:
    """Move each proposal by the host's box regression, for its most probable class if that is class-specific.

    Returns:
        For each image its N_i boxes, clipped to the image, and (N_i,) float: the probability that they hold an object.
    """
    predictor, predictions, proposals = _predict(heads, features, proposals)
    results = []
    for class_boxes, probabilities, image_proposals in zip(
        predictor.predict_boxes(predictions, proposals), predictor.predict_probs(predictions, proposals), proposals
    ):
        foreground = probabilities[:, :-1]  # (N, K); the last column is the background
        class_boxes = class_boxes.view(len(class_boxes), class_boxes.shape[1] // 4, 4)  # (N, 1 or K, 4)
        largest, best = foreground.max(dim=1)
        best = best if class_boxes.shape[1] > 1 else torch.zeros_like(best)
        refined = Boxes(class_boxes[torch.arange(len(class_boxes)), best])
        refined.clip(image_proposals.image_size)
        # sigmoid classes do not exclude each other: their sum is no probability
        results.append((refined, largest if predictor.use_sigmoid_ce else foreground.sum(dim=1)))
    return results


def _predict(
    heads: Any, features: dict[str, torch.Tensor], proposals: list[Instances]
) -> tuple[Any, tuple, list[Instances]]:
    """Return the (last) predictor, its output, and the proposals that it was run on."""
    if isinstance(heads, Res5ROIHeads):
        boxes = [x.proposal_boxes for x in proposals]
        pooled = heads.res5(heads.pooler([features[f] for f in heads.in_features], boxes)).mean(dim=[2, 3])
        return heads.box_predictor, heads.box_predictor(pooled), proposals
    maps = [features[f] for f in heads.box_in_features]
    is_cascade = isinstance(heads, CascadeROIHeads)
    stages = zip(heads.box_head, heads.box_predictor) if is_cascade else [(heads.box_head, heads.box_predictor)]
    predictor, predictions = None, ()
    for head, next_predictor in stages:
        if predictor is not None:  # each stage starts from the boxes of the previous one, clipped to the image
            moved = [Boxes(x.detach()) for x in predictor.predict_boxes(predictions, proposals)]
            for boxes, old in zip(moved, proposals):
                boxes.clip(old.image_size)
            proposals = [Instances(old.image_size, proposal_boxes=boxes) for boxes, old in zip(moved, proposals)]
        predictor = next_predictor
        predictions = predictor(head(heads.box_pooler(maps, [x.proposal_boxes for x in proposals])))
    return predictor, predictions, proposals
