"""SAM's sizes, and SAM with random weights; its ``state_dict`` has the names of the official files."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from detectron2.config import CfgNode
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn


@dataclass(frozen=True)
class SamSize:
    """What distinguishes one SAM from another; the defaults are ViT-B's."""

    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)
    image_size: int = 1024
    patch_size: int = 16
    window_size: int = 14
    prompt_dim: int = 256
    decoder_depth: int = 2
    decoder_num_heads: int = 8
    decoder_mlp_dim: int = 2048
    num_multimasks: int = 3


SAM_SIZES = {
    "vit_b": SamSize(),
    "vit_l": SamSize(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": SamSize(1280, 32, 16, (7, 15, 23, 31)),
}


def get_sam_size(cfg: CfgNode, sizes_by_name: Mapping[str, SamSize] = SAM_SIZES) -> SamSize:
    """Return the size that ``cfg.MODEL.REGIONSPOT.SAM`` names."""
    node = cfg.MODEL.REGIONSPOT.SAM
    if node.NAME == "custom":
        sizes = {key.lower(): value for key, value in node.CUSTOM.items()}
        wrong = [key for key, value in node.CUSTOM.items() if type(value) is int and not 0 <= value < 1 << 16]
        if wrong or not sizes["patch_size"] or sizes["image_size"] < sizes["patch_size"]:
            raise ValueError(
                f"MODEL.REGIONSPOT.SAM.CUSTOM: expected sizes below 65536, and an image of one patch at least; got "
                f"{', '.join(wrong) or 'IMAGE_SIZE'} {node.CUSTOM[wrong[0] if wrong else 'IMAGE_SIZE']}"
            )
        return SamSize(**{**sizes, "global_attn_indexes": tuple(sizes["global_attn_indexes"])})
    if node.NAME not in sizes_by_name:
        raise ValueError(
            f"MODEL.REGIONSPOT.SAM.NAME: expected one of {', '.join(sizes_by_name)}, custom; got {node.NAME!r}"
        )
    return sizes_by_name[node.NAME]


def build_image_encoder(size: SamSize) -> ImageEncoderViT:
    """Build SAM's image encoder with random weights."""
    return ImageEncoderViT(
        img_size=size.image_size,
        patch_size=size.patch_size,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        mlp_ratio=4,
        out_chans=size.prompt_dim,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=size.window_size,
        global_attn_indexes=size.global_attn_indexes,
    )


def build_sam(size: SamSize, image_encoder: nn.Module | None = None) -> Sam:
    """Build a SAM with random weights; its ``state_dict`` has the names of the official files.

    ``image_encoder`` replaces SAM's own; it has ``img_size``, and returns (B, prompt_dim, grid, grid).
    """
    grid = size.image_size // size.patch_size
    prompt_encoder = PromptEncoder(
        embed_dim=size.prompt_dim,
        image_embedding_size=(grid, grid),
        input_image_size=(size.image_size, size.image_size),
        mask_in_chans=16,
    )
    transformer = TwoWayTransformer(
        depth=size.decoder_depth,
        embedding_dim=size.prompt_dim,
        num_heads=size.decoder_num_heads,
        mlp_dim=size.decoder_mlp_dim,
    )
    mask_decoder = MaskDecoder(
        transformer_dim=size.prompt_dim,
        transformer=transformer,
        num_multimask_outputs=size.num_multimasks,
        iou_head_depth=3,
        iou_head_hidden_dim=256,
    )
    return Sam(image_encoder or build_image_encoder(size), prompt_encoder, mask_decoder)
