"""The image encoders of SAM and CLIP as backbones of any Detectron2 model."""

import torch
from clip.model import VisionTransformer
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import nn

from regionspot.modeling.localizers import sam_encoder
from regionspot.modeling.localizers.build_sam import build_image_encoder, get_sam_size
from regionspot.modeling.vision_language.clip import encode_patches, get_clip_size


class SquareBackbone(Backbone):
    """A vision transformer with one feature map and an input of one size.

    The input is normalized and, by ``GeneralizedRCNN``, padded to the square of ``padding_constraints``.
    """

    def __init__(self, feature: str, channels: int, patch_size: int, image_size: int) -> None:
        super().__init__()
        self.feature, self.channels = feature, channels
        self.patch_size, self.image_size = patch_size, image_size

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {self.feature: ShapeSpec(channels=self.channels, stride=self.patch_size)}

    @property
    def size_divisibility(self) -> int:
        return self.patch_size

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"square_size": self.image_size}


@BACKBONE_REGISTRY.register()
class SamImageEncoder(SquareBackbone):
    """SAM's image encoder; its feature map is ``sam``."""

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> None:
        size = get_sam_size(cfg)
        super().__init__("sam", size.prompt_dim, size.patch_size, size.image_size)
        self.image_encoder = build_image_encoder(size)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode (B, 3, S, S) float images into ``{"sam": (B, C, S / stride, S / stride)}``."""
        return {"sam": sam_encoder.encode(self.image_encoder, images)}


@BACKBONE_REGISTRY.register()
class ClipImageEncoder(SquareBackbone):
    """CLIP's vision transformer; its feature map ``clip`` is the patch tokens before ``ln_post``."""

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> None:
        size = get_clip_size(cfg)
        super().__init__("clip", size.width, size.patch_size, size.image_size)
        self.visual = VisionTransformer(
            size.image_size, size.patch_size, size.width, size.layers, size.width // 64, size.embed_dim
        )
        # the paper takes the patch tokens before these, so they would have no gradient
        self.visual.ln_post, self.visual.proj = nn.Identity(), None

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode (B, 3, S, S) float images into ``{"clip": (B, width, S / stride, S / stride)}``."""
        patches = encode_patches(self.visual, images)[:, 1:]  # (B, grid * grid, width), without the class token
        grid = self.image_size // self.patch_size
        return {"clip": patches.transpose(1, 2).unflatten(2, (grid, grid))}
