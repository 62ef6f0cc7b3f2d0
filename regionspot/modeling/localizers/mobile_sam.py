"""MobileSAM as localizer (arXiv 2306.14289): SAM's prompt encoder and mask decoder behind a TinyViT of ``timm``."""

import re
from typing import Any

import torch
from detectron2.config import CfgNode
from segment_anything.modeling import Sam
from segment_anything.modeling.common import LayerNorm2d
from torch import nn

from regionspot.modeling.localizers.build_sam import SamSize, build_sam, get_sam_size
from regionspot.modeling.localizers.localizer import LOCALIZER_REGISTRY
from regionspot.modeling.localizers.prompted import run_encoder
from regionspot.modeling.localizers.sam import SamLocalizer

STRIDE = 16
# TinyViT-5M: width and heads of the last stage, the depth of all four together.
MOBILE_SAM_SIZES = {"mobile_sam": SamSize(embed_dim=320, depth=12, num_heads=10, window_size=7)}
# From the official keys to those of timm, in this order.
_RENAMED = (
    (r"^image_encoder\.(patch_embed|layers)\.", r"image_encoder.trunk.\1."),
    (r"\.patch_embed\.seq\.0\.", ".patch_embed.conv1."),
    (r"\.patch_embed\.seq\.2\.", ".patch_embed.conv2."),
    (r"\.c\.weight$", ".conv.weight"),
)
# TinyViT's classifier, and indices that timm computes.
_UNUSED = re.compile(r"^image_encoder\.(norm_head|head)\.|\.attention_bias_idxs$")


class TinyVitEncoder(nn.Module):
    """MobileSAM's image encoder: TinyViT, and the neck of SAM's own encoder."""

    def __init__(self, size: SamSize) -> None:
        """Build it with random weights.

        Raises:
            ImportError: no timm.
            ValueError: sizes that a TinyViT cannot have.
        """
        super().__init__()
        try:
            from timm.models.tiny_vit import TinyVit
        except ImportError as error:
            raise ImportError("MobileSamLocalizer needs timm: pip install 'regionspot[models]'") from error
        if size.patch_size != STRIDE or size.image_size % STRIDE or size.depth % 6 or size.num_heads % 10:
            raise ValueError(
                f"MODEL.REGIONSPOT.SAM.CUSTOM: MobileSAM needs PATCH_SIZE {STRIDE}, and IMAGE_SIZE, DEPTH and "
                f"NUM_HEADS in multiples of {STRIDE}, 6 and 10; got {size.patch_size}, {size.image_size}, "
                f"{size.depth} and {size.num_heads}"
            )
        head_dim, depth, window = size.embed_dim // size.num_heads, size.depth // 6, size.window_size
        heads = tuple(size.num_heads * tenths // 10 for tenths in (2, 4, 5, 10))  # of the four stages
        self.img_size = size.image_size
        trunk: Any = TinyVit(
            num_classes=0,
            embed_dims=tuple(head_dim * x for x in heads),
            depths=(depth, depth, 3 * depth, depth),
            num_heads=heads,
            window_sizes=(window, window, 2 * window, window),
            drop_path_rate=0.0,
        )
        trunk.head = nn.Identity()
        trunk.stages[3].downsample.conv2.conv.stride = (1, 1)  # MobileSAM stays at stride 16
        self.trunk = trunk
        self.neck = nn.Sequential(
            nn.Conv2d(size.embed_dim, size.prompt_dim, kernel_size=1, bias=False),
            LayerNorm2d(size.prompt_dim),
            nn.Conv2d(size.prompt_dim, size.prompt_dim, kernel_size=3, padding=1, bias=False),
            LayerNorm2d(size.prompt_dim),
        )
        self.register_load_state_dict_post_hook(_forget_biases)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the (B, C, S / 16, S / 16) embeddings of (B, 3, S, S) preprocessed images."""
        return self.neck(self.trunk.forward_features(images))


def _forget_biases(encoder: TinyVitEncoder, _: object) -> None:
    for module in encoder.modules():  # timm keeps what it made of the weights before
        getattr(module, "attention_bias_cache", {}).clear()


@LOCALIZER_REGISTRY.register()
class MobileSamLocalizer(SamLocalizer):
    """Frozen MobileSAM; all but the image encoder is SAM's."""

    compiled_step = staticmethod(run_encoder)

    @classmethod
    def build_sam(cls, cfg: CfgNode) -> Sam:
        size = get_sam_size(cfg, MOBILE_SAM_SIZES)
        return build_sam(size, TinyVitEncoder(size))

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._run_step(self.image_encoder, inputs)

    def rename_official_keys(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {_rename(key): value for key, value in state.items() if not _UNUSED.search(key)}


def _rename(key: str) -> str:
    for pattern, replacement in _RENAMED:
        key = re.sub(pattern, replacement, key)
    # a stage begins with the downsampling that ends the official layer before it
    key = re.sub(r"\.layers\.(\d)\.downsample", lambda match: f".stages.{int(match[1]) + 1}.downsample", key)
    return key.replace(".trunk.layers.", ".trunk.stages.")
