"""Proposals that are computed at inference: boxes of SAM's automatic masks, or of any Detectron2 detector."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import transforms as T
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, ProposalNetwork, build_model
from detectron2.structures import Boxes, Instances
from segment_anything.utils.amg import build_point_grid
from torchvision.ops import nms

from regionspot.checkpoint.checkpointer import SafeDetectionCheckpointer
from regionspot.config import find_host_config
from regionspot.modeling.frozen import FrozenModule
from regionspot.modeling.localizers.localizer import Localizer
from regionspot.modeling.localizers.prompted import PromptedLocalizer
from regionspot.structures import Prompts, to_rgb
from regionspot.utils.yaml_config import merge_yaml

SOURCES = ("auto", "gt", "file", "sam_automatic", "detector")
OFFSET = 1.0  # of the threshold, for the stability, as in SamAutomaticMaskGenerator


class SamAutomaticProposals:
    """The boxes of SAM's automatic masks, from a grid of points; their scores are SAM's own estimates of the IoU.

    They are those of ``SamAutomaticMaskGenerator``. Only masks that can be kept are made, and no RLEs.
    """

    def __init__(
        self,
        localizer: PromptedLocalizer,
        points_per_side: int = 32,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        box_nms_thresh: float = 0.7,
    ) -> None:
        """
        Args:
            localizer: whose SAM is used.
            points_per_side: of the grid; each point has three masks.
            pred_iou_thresh: masks whose estimated IoU is not above it are dropped; 0 or less keeps all.
            stability_score_thresh: masks that change more when the threshold of their logits does are dropped.
            box_nms_thresh: IoU of boxes above which the mask of lower estimated IoU is a duplicate.
        """
        self.localizer = localizer
        self.points = torch.from_numpy(build_point_grid(points_per_side)).float()  # (P, 2) xy in [0, 1]
        self.pred_iou_thresh = pred_iou_thresh if pred_iou_thresh > 0 else -math.inf
        self.stability_score_thresh = stability_score_thresh
        self.box_nms_thresh = box_nms_thresh

    def __call__(self, images: Sequence[torch.Tensor], embeddings: torch.Tensor | None = None) -> list[Instances]:
        """Return ``proposal_boxes`` (XYXY, image pixels) and ``scores`` for each (3, H, W) RGB image in [0, 255].

        ``embeddings`` are the images' (B, C, h, w), if they are known already.
        """
        if embeddings is None:
            embeddings = self.localizer.encode_images([x.round().clamp(0, 255).to(torch.uint8) for x in images])
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        return [self._propose(embedding[None], size) for embedding, size in zip(embeddings, sizes, strict=True)]

    def _propose(self, embedding: torch.Tensor, size: tuple[int, int]) -> Instances:
        height, width = self.localizer.input_size(size)
        points = (self.points * torch.tensor([width, height]))[:, None].to(embedding.device)  # (P, 1, 2)
        prompts = Prompts(points=points, point_labels=torch.ones_like(points[..., 0], dtype=torch.int64))
        all_boxes, all_scores = [torch.zeros(0, 4, device=embedding.device)], [embedding.new_zeros(0)]
        upsampler, resizer = self.localizer.mask_upsampler(size), None
        for ious, masks in self.localizer.all_masks(embedding, prompts, self.pred_iou_thresh):
            resizer = resizer or upsampler.resizer(masks, size)
            boxes, stability = upsampler.measure(masks, resizer, OFFSET if self.stability_score_thresh > 0 else None)
            is_stable = boxes[:, 2] > boxes[:, 0]  # an empty mask has a box of zeros
            if stability is not None:
                is_stable &= stability >= self.stability_score_thresh
            boxes[:, 2:] -= 1  # SAM's end at the last pixel inside
            all_boxes.append(boxes[is_stable])
            all_scores.append(ious[is_stable])
        boxes, scores = torch.cat(all_boxes), torch.cat(all_scores)
        kept = nms(boxes, scores, self.box_nms_thresh)
        boxes[:, 2:] += 1  # ours end after the last pixel inside
        return to_proposals(boxes[kept], scores[kept].clamp(0, 1), size)


class DetectorProposals(FrozenModule):
    """The boxes of a Detectron2 detector, or the proposals of its RPN; the detector is frozen and never saved."""

    def __init__(self, detector_cfg: CfgNode, output: str = "boxes") -> None:
        """Build the detector of a config, with its weights.

        Args:
            detector_cfg: config of the detector, not frozen.
            output: "boxes" for its detections of all classes, or "rpn" for the proposals of its RPN.
        """
        super().__init__()
        if output not in ("boxes", "rpn"):
            raise ValueError(f"MODEL.REGIONSPOT.PROPOSALS.DETECTOR.OUTPUT: expected boxes or rpn, got {output!r}")
        model, key = detector_cfg.MODEL, "MODEL.REGIONSPOT.PROPOSALS.DETECTOR.OUTPUT"
        name, kind = model.META_ARCHITECTURE, META_ARCH_REGISTRY.get(model.META_ARCHITECTURE)
        has_rpn = issubclass(kind, (GeneralizedRCNN, ProposalNetwork))
        if output == "rpn" and not (has_rpn and model.PROPOSAL_GENERATOR.NAME != "PrecomputedProposals"):
            raise ValueError(f"{key} rpn: {name} has no RPN; take boxes")
        if output == "boxes" and issubclass(kind, ProposalNetwork):
            raise ValueError(f"{key} boxes: {name} has an RPN alone; take rpn")
        if output == "rpn":  # the same backbone and RPN, which then scales its proposals to the image itself
            detector_cfg = detector_cfg.clone()
            detector_cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
        self.detector = build_model(detector_cfg)
        SafeDetectionCheckpointer(self.detector).load(model.WEIGHTS)
        self.output, self.image_format = output, detector_cfg.INPUT.FORMAT
        side = detector_cfg.INPUT.MIN_SIZE_TEST
        self.resize = T.ResizeShortestEdge([side, side], detector_cfg.INPUT.MAX_SIZE_TEST)
        self.freeze()

    @torch.no_grad()
    def forward(self, images: Sequence[torch.Tensor]) -> list[Instances]:
        """Return ``proposal_boxes`` (XYXY, image pixels) and ``scores`` for each (3, H, W) RGB image in [0, 255]."""
        outputs = self.detector([self._input(image) for image in images])
        if self.output == "boxes":
            detections = [output["instances"] for output in outputs]
            return [to_proposals(x.pred_boxes.tensor, x.scores, x.image_size) for x in detections]
        rpn = [output["proposals"] for output in outputs]
        return [to_proposals(x.proposal_boxes.tensor, x.objectness_logits.sigmoid(), x.image_size) for x in rpn]

    def _input(self, image: torch.Tensor) -> dict[str, Any]:
        pixels = to_rgb(image, self.image_format).permute(1, 2, 0).cpu().numpy()  # in the detector's channel order
        resized = self.resize.get_transform(pixels).apply_image(np.ascontiguousarray(pixels))
        tensor = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return {"image": tensor, "height": image.shape[1], "width": image.shape[2]}


def to_proposals(boxes: torch.Tensor, scores: torch.Tensor, size: tuple[int, int]) -> Instances:
    """Return proposals, clipped to an image of (height, width); those that are empty then are dropped."""
    proposals = Instances(size, proposal_boxes=Boxes(boxes), scores=scores)
    proposals.proposal_boxes.clip(size)
    return proposals[proposals.proposal_boxes.nonempty()]


def build_proposal_source(cfg: CfgNode, localizer: Localizer) -> SamAutomaticProposals | DetectorProposals | None:
    """Build the source of ``MODEL.REGIONSPOT.PROPOSALS.SOURCE``; None where proposals come with the images."""
    node = cfg.MODEL.REGIONSPOT.PROPOSALS
    if node.SOURCE not in SOURCES:
        raise ValueError(
            f"MODEL.REGIONSPOT.PROPOSALS.SOURCE: expected one of {', '.join(SOURCES)}; got {node.SOURCE!r}"
        )
    if node.SOURCE == "sam_automatic":
        if not isinstance(localizer, PromptedLocalizer):
            raise ValueError(
                "MODEL.REGIONSPOT.PROPOSALS.SOURCE sam_automatic: expected SAM as localizer, got "
                f"{type(localizer).__name__}"
            )
        settings = {key.lower(): value for key, value in node.SAM_AUTOMATIC.items()}
        return SamAutomaticProposals(localizer, **settings)
    if node.SOURCE == "detector":
        return DetectorProposals(detector_config(cfg), node.DETECTOR.OUTPUT)
    return None


def detector_config(cfg: CfgNode) -> CfgNode:
    """Return the config of the detector that ``MODEL.REGIONSPOT.PROPOSALS.DETECTOR`` names."""
    node = cfg.MODEL.REGIONSPOT.PROPOSALS.DETECTOR
    path, weights = find_host_config(node.CONFIG_FILE, "MODEL.REGIONSPOT.PROPOSALS.DETECTOR.CONFIG_FILE")
    weights = node.WEIGHTS or weights
    detector = get_cfg()
    merge_yaml(detector, path)
    detector.merge_from_list(list(node.OPTS))
    detector.MODEL.DEVICE = cfg.MODEL.DEVICE
    if weights:
        detector.MODEL.WEIGHTS = weights
    return detector
