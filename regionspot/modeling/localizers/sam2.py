"""SAM 2 and what follows it as localizers: SAM 2 and 2.1, SAM 3's tracker, EdgeTAM."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode
from torch import nn

from regionspot.modeling.localizers.localizer import LOCALIZER_REGISTRY
from regionspot.modeling.localizers.official_keys import rename_sam2, rename_sam3
from regionspot.modeling.localizers.transformers_decoder import Sam2PromptDecoder
from regionspot.modeling.localizers.transformers_sam import TransformersLocalizer
from regionspot.modeling.masks import MaskUpsampler
from regionspot.structures import Prompts


def _size(width: int, heads: int, blocks: list[int], global_blocks: list[int], **backbone: Any) -> dict[str, Any]:
    """Return the config of a Hiera whose width and heads double with each of its four stages."""
    widths = [width << i for i in range(4)]
    hiera = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": width,
        "num_attention_heads": heads,
        "blocks_per_stage": blocks,
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [heads << i for i in range(4)],
        "global_attention_blocks": global_blocks,
        **backbone,
    }
    return {"vision_config": {"backbone_config": hiera, "backbone_channel_list": widths[::-1]}}


_SIZES = {
    "tiny": _size(96, 1, [1, 2, 7, 2], [5, 7, 9]),
    "small": _size(96, 1, [1, 2, 11, 2], [7, 10, 13]),
    "base_plus": _size(112, 2, [2, 3, 16, 3], [12, 16, 20], window_positional_embedding_background_size=[14, 14]),
    "large": _size(144, 2, [2, 6, 36, 4], [23, 33, 43], window_size_per_stage=[8, 4, 16, 8]),
}


@LOCALIZER_REGISTRY.register()
class Sam2Localizer(TransformersLocalizer):
    """Frozen SAM 2 or 2.1, by ``Sam2Model``, which has no memory.

    Images are resized to the square input without keeping their aspect ratio.

    Without MULTIMASK, token and mask are always those of the single-mask output. SAM 2's own predictors replace a
    single mask that is not stable by the best of the others (``dynamic_multimask_via_stability``): not here, as the
    token would then depend on a mask, which is not made where only tokens are needed.

    Image embeddings are (B, C + 4 * C / 4 + 16 * C / 8, h, w): behind the C channels for the prompts come the two finer
    levels of the feature pyramid, as the mask decoder projects them, (B, C / 8, 4h, 4w) and (B, C / 4, 2h, 2w), by
    ``pixel_unshuffle``.
    """

    model_class, config_class = "Sam2Model", "Sam2Config"
    sizes = {f"{version}_hiera_{name}": size for version in ("sam2.1", "sam2") for name, size in _SIZES.items()}
    decoder_class = Sam2PromptDecoder

    @classmethod
    def build_sam(cls, cfg: CfgNode) -> Any:
        sam: Any = super().build_sam(cfg)
        # neither tokens nor masks need the positions of the features, sines and cosines at three or four sizes
        sam.vision_encoder.neck.position_encoding = _NoPositions()
        return sam

    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return self.image_size, self.image_size

    def mask_upsampler(self, image_size: tuple[int, int]) -> MaskUpsampler:
        side, _ = self.mask_prompt_size  # the logits are resized to the image at once
        return MaskUpsampler(side, (side, side), threshold=0.0)

    @property
    def _feature_sizes(self) -> list[tuple[int, int]]:
        return [(self.prompt_dim // 8, 4), (self.prompt_dim // 4, 2)]

    def _read_features(self, output: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        # from fine to coarse; SAM 3 has a fourth, which its tracker does not use
        fine, middle, embeddings = output.fpn_hidden_states[:3]
        embeddings = embeddings + self.sam.no_memory_embedding.view(1, -1, 1, 1)
        return embeddings, [self.sam.mask_decoder.conv_s0(fine), self.sam.mask_decoder.conv_s1(middle)]

    def _encode_prompts(self, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor | None]:
        if prompts.boxes is None and prompts.points is None:  # the library then gives a point that is none
            assert prompts.masks is not None
            points = prompts.masks.new_zeros(len(prompts), 1, 2)
            prompts = replace(prompts, points=points, point_labels=torch.full_like(points[..., 0], -1).long())
        return super()._encode_prompts(prompts)

    def rename_official_keys(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return rename_sam2(state)


@LOCALIZER_REGISTRY.register()
class EdgeTamLocalizer(Sam2Localizer):
    """Frozen EdgeTAM, by ``EdgeTamModel``: SAM 2 with RepViT as image encoder."""

    model_class, config_class = "EdgeTamModel", "EdgeTamConfig"
    packages = ("transformers", "timm")
    sizes = {
        "edgetam": {
            "vision_config": {
                "backbone_config": {
                    "model_type": "timm_wrapper",
                    "architecture": "repvit_m1.dist_in1k",
                    "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
                    "num_classes": 1,  # of a head that it does not have; timm's config needs a number
                }
            }
        }
    }


@LOCALIZER_REGISTRY.register()
class Sam3TrackerLocalizer(Sam2Localizer):
    """Frozen SAM 3 with boxes, points and masks as prompts, by ``Sam3TrackerModel``.

    The embedding of "no memory" is added to the level that prompts are decoded with, as ``Sam3TrackerVideoModel`` and
    ``Sam3VideoModel`` do. With the four levels of SAM 3's default config, ``Sam3TrackerModel`` adds it to the fourth,
    which is not used.
    """

    model_class, config_class = "Sam3TrackerModel", "Sam3TrackerConfig"
    sizes: ClassVar[dict[str, dict[str, Any]]] = {"sam3_tracker": {}}
    mean = std = (0.5, 0.5, 0.5)

    @classmethod
    def _select_config(cls, content: dict[str, Any]) -> dict[str, Any]:
        return content.get("tracker_config") or content  # the hub's file is of the detector and the tracker

    def rename_official_keys(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return rename_sam3(state)


class _NoPositions(nn.Module):
    """Takes the place of the neck's positional encoding."""

    def forward(self, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(0, device=device, dtype=dtype)
