"""Boxes of SAM's automatic masks, against ``SamAutomaticMaskGenerator`` in the same run."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import Sam
from torch import nn
from torch.nn import functional as F

from regionspot.checkpoint.formats import load_checkpoint_file
from regionspot.config import load_config
from regionspot.modeling.frozen import get_dtype
from regionspot.modeling.localizers.build_sam import build_sam, get_sam_size
from regionspot.modeling.localizers.sam import SamLocalizer
from regionspot.modeling.proposal_sources import SamAutomaticProposals
from regionspot.structures import Prompts
from tools.benchmarks.measure import Meter
from tools.benchmarks.plain import with_weights_of
from tools.benchmarks.table import Table

SIZE = (480, 640)  # of the image, pixels


@torch.no_grad()
def build_localizer(cfg: CfgNode) -> SamLocalizer:
    """Build the config's SAM, with its weights if they are a file here, else with random ones that points affect."""
    torch.manual_seed(0)
    localizer, weights = SamLocalizer(cfg).eval(), cfg.MODEL.REGIONSPOT.SAM.WEIGHTS
    if Path(weights).is_file():
        localizer.sam.load_state_dict(load_checkpoint_file(weights), strict=False)  # buffers are not stored
    else:
        for parameter in localizer.sam.mask_decoder.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        for mlp in localizer.sam.mask_decoder.output_hypernetworks_mlps:  # logits as large as a trained SAM's
            mlp.layers[-1].weight *= 100
    return localizer.to(cfg.MODEL.DEVICE)


def draw_image() -> torch.Tensor:
    """Return a (3, *SIZE) uint8 image of smooth patches."""
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    return (255 * F.interpolate(coarse, SIZE, mode="bicubic")[0].clamp(0, 1)).to(torch.uint8)


class EmbeddedPredictor(SamPredictor):
    """SAM's predictor, which knows the embedding of the only image that it is given."""

    def __init__(self, sam: Sam, embedding: torch.Tensor) -> None:
        super().__init__(sam)
        self.embedding = embedding

    def set_image(self, image: np.ndarray, image_format: str = "RGB") -> None:
        self.features, self.is_image_set = self.embedding, True
        self.original_size = image.shape[:2]
        self.input_size = self.transform.get_preprocess_shape(*image.shape[:2], self.transform.target_length)


class EmbeddedGenerator:
    """``SamAutomaticMaskGenerator`` for an image that SAM's encoder has seen."""

    def __init__(self, cfg: CfgNode, localizer: SamLocalizer, embedding: torch.Tensor, **settings: Any) -> None:
        """``settings`` are the generator's."""
        device = localizer.sam.pixel_mean.device
        sam = with_weights_of(build_sam(get_sam_size(cfg)), localizer.sam, device)
        sam.mask_threshold = localizer.sam.mask_threshold
        self.generator = SamAutomaticMaskGenerator(sam.eval(), **settings)
        self.generator.predictor = EmbeddedPredictor(sam, embedding)
        self.boxes = torch.zeros(0, 4)

    def __call__(self) -> None:
        """Keep the (N, 4) XYXY boxes, the best first."""
        masks = self.generator.generate(np.zeros((*SIZE, 3), dtype=np.uint8))
        boxes = torch.tensor([mask["bbox"] for mask in masks], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2] + 1  # they end at the last pixel inside
        self.boxes = boxes.minimum(torch.tensor([SIZE[1], SIZE[0], SIZE[1], SIZE[0]]))


@torch.no_grad()
def prepare_thresholds(localizer: SamLocalizer, embedding: torch.Tensor, points: int, is_trained: bool) -> torch.Tensor:
    """Change SAM so that thresholds tell masks apart, and return the (N,) estimates of their IoUs.

    All estimates are raised by the same above zero, where the generator compares them. A random SAM's masks cover the
    image here and there: only their highest logits count as inside.
    """
    source = SamAutomaticProposals(localizer, points)
    height, width = localizer.input_size(SIZE)
    xy = (source.points * torch.tensor([width, height]))[:, None].to(embedding.device)
    prompts = Prompts(points=xy, point_labels=torch.ones_like(xy[..., 0], dtype=torch.int64))
    ious, highest = zip(
        *((x, masks.flatten(1).amax(dim=1)) for x, masks in localizer.all_masks(embedding, prompts, -torch.inf))
    )
    if not is_trained:
        localizer.sam.mask_threshold = float(torch.cat(highest).quantile(0.5)) * 0.5
    bias = localizer.sam.mask_decoder.iou_prediction_head.layers[-1].bias
    raised = 1 - torch.cat(ious).min()
    bias += raised.to(bias.dtype)
    return torch.cat(ious) + raised


def benchmark_proposals(cfg: CfgNode, args: Namespace) -> Table:
    """Measure each of ``args.kept``, the percentages of masks whose estimated IoU is above the threshold."""
    localizer = build_localizer(cfg)
    device, image = localizer.sam.pixel_mean.device, draw_image()
    embedding = localizer.encode_images([image])
    estimates = prepare_thresholds(localizer, embedding, args.points, Path(cfg.MODEL.REGIONSPOT.SAM.WEIGHTS).is_file())
    table = Table(Meter(device, args.repeats), 1, get_dtype(cfg.MODEL.REGIONSPOT.PRECISION))
    for kept in args.kept:
        threshold = float(estimates.quantile(1 - kept / 100)) if kept < 100 else 0.0
        settings: dict[str, Any] = {
            "points_per_side": args.points,
            "pred_iou_thresh": threshold,
            "stability_score_thresh": 1e-3,
        }
        source = SamAutomaticProposals(localizer, **settings)
        plain = EmbeddedGenerator(cfg, localizer, embedding, **settings)
        part = f"{args.points**2:,} points, {kept} % of their masks"
        table.add(part, lambda: source([image.float()], embedding), plain, "points", args.points**2, flops=0)  # noqa: B023
        [proposals] = source([image.float()], embedding)
        boxes, plain_boxes = proposals.proposal_boxes.tensor.cpu(), plain.boxes
        same = len(boxes) == len(plain_boxes) and torch.equal(boxes, plain_boxes)
        table.rows[-1] |= {"boxes": len(boxes), "plain_boxes": len(plain_boxes), "same_boxes": same}
    return table


def main(args: Namespace) -> dict[str, Any]:
    cfg = load_config(args.config_file, args.opts)
    return benchmark_proposals(cfg, args).finish(args, precision=cfg.MODEL.REGIONSPOT.PRECISION)
