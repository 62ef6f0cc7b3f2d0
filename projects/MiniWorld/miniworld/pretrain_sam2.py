"""Trains the miniature SAM 2, another localizer: a hierarchical encoder, high-resolution features for the masks.

It starts from the prompt encoder and the mask decoder of the miniature SAM, which it has the most of, and sees the same
scenes.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import Sam2Config, Sam2Model

from miniworld.pretrain_clip import sincos_2d
from miniworld.pretrain_sam import SamPretraining, mask_loss, report_sam, soft_iou
from regionspot.checkpoint.formats import load_checkpoint_file
from regionspot.modeling.localizers import Sam2Localizer
from regionspot.modeling.localizers.official_keys import rename_sam2
from regionspot.structures import Prompts

WEIGHTS = Path(__file__).parent / "weights"
CONFIG = WEIGHTS / "sam2.config.json"
PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # SAM 2's own, RGB in [0, 1]


class Sam2Pretraining(SamPretraining):
    """SAM 2 for images, and the same loss on the same scenes and prompts."""

    @staticmethod
    def build() -> Sam2Model:
        model = Sam2Model(Sam2Config(**json.loads(CONFIG.read_text())))
        shared = {
            f"sam_{key}".replace(".lin1.", ".layers.0.").replace(".lin2.", ".layers.1."): value.float()
            for key, value in load_checkpoint_file(WEIGHTS / "sam.safetensors").items()
            if not key.startswith("image_encoder.")
        }
        model.load_state_dict(rename_sam2(shared), strict=False)
        with torch.no_grad():
            # positions are 0 at the start, and without them it learns no place for a long time
            position = model.vision_encoder.backbone.pos_embed  # (1, width, 8, 8)
            position.add_(0.5 * sincos_2d(position.shape[2], position.shape[1])[1:].t().reshape(position.shape))
            for projection in (model.mask_decoder.conv_s0, model.mask_decoder.conv_s1):  # SAM has no finer levels
                projection.weight.zero_()
        return model

    def _encode(self, images: list[torch.Tensor]) -> Sequence[list[torch.Tensor]]:
        mean, std = (torch.tensor(x).view(3, 1, 1).to(self.model.device) for x in (PIXEL_MEAN, PIXEL_STD))
        features = self.model.get_image_features(torch.stack([(image / 255 - mean) / std for image in images]))
        maps = list(features.fpn_hidden_states)  # (h * w, B, C) each
        maps[-1] = maps[-1] + self.model.no_memory_embedding
        sizes = self.model.backbone_feature_sizes
        maps = [x.permute(1, 2, 0).unflatten(2, size) for x, size in zip(maps, sizes)]  # (B, C, h, w)
        return [[x[i : i + 1] for x in maps] for i in range(len(images))]

    def _loss(self, embedding: list[torch.Tensor], prompts: Prompts, target: torch.Tensor) -> torch.Tensor:
        # SAM 2's decoder returns either the single mask or the several ones: of boxes, one or the other at random
        multimask = prompts.boxes is None or bool(torch.rand(()) < 0.5)
        masks, ious = self._decode_masks(embedding, prompts, multimask)  # (N, M, s, s), (N, M)
        with torch.no_grad():
            real = soft_iou(masks > 0, target[:, None] > 0.5)
        return mask_loss(masks, target[:, None]).min(dim=1).values.mean() + F.mse_loss(ious, real)

    def _decode_masks(
        self, embedding: list[torch.Tensor], prompts: Prompts, multimask: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        model = self.model
        labels = None if prompts.point_labels is None else prompts.point_labels.long()
        parts = (prompts.points, labels, prompts.boxes)
        points, labels, boxes = (None if x is None else x[None] for x in parts)
        sparse, dense = model.prompt_encoder(points, labels, boxes, None)
        position = model.get_image_wide_positional_embeddings()
        masks, ious, *_ = model.mask_decoder(embedding[-1], position, sparse, dense, multimask, embedding[:-1])
        return masks[0].float(), ious[0].float()

    def report(self) -> dict[str, float]:
        return report_sam(self.model, Sam2Localizer)
