"""SAM's image encoder with fused attention: ``segment_anything``'s modules and numbers in a fraction of the memory.

``segment_anything`` adds the decomposed relative positions to the whole attention matrix, (h * w)^2 for each head. Here
they are channels of queries and keys, so that ``scaled_dot_product_attention`` never builds that matrix.
"""

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block, window_partition, window_unpartition
from torch.nn import functional as F


def encode(encoder: ImageEncoderViT, images: torch.Tensor) -> torch.Tensor:
    """Return the (B, C, h, w) embeddings of (B, 3, S, S) preprocessed images."""
    x = encoder.patch_embed(images)  # (B, h, w, width)
    if encoder.pos_embed is not None:
        x = x + encoder.pos_embed
    for block in encoder.blocks:
        x = _run_block(block, x)
    return encoder.neck(x.permute(0, 3, 1, 2))


def _run_block(block: Block, x: torch.Tensor) -> torch.Tensor:
    x = x + _attend(block.attn, block.norm1(x), block.window_size)
    return x + block.mlp(block.norm2(x))


def _attend(attention: Attention, x: torch.Tensor, window_size: int) -> torch.Tensor:
    """Attend among the positions of (B, h, w, width), or of each of its windows."""
    size = (x.shape[1], x.shape[2])
    # The linear layers run without the padding of windows. SAM pads before them, with zeros: there qkv is its bias.
    qkv = F.linear(x, attention.qkv.weight)  # (B, h, w, 3 * width)
    if window_size > 0:
        qkv, padded_size = window_partition(qkv, window_size)
    if attention.qkv.bias is not None:
        qkv = qkv + attention.qkv.bias
    x = _attend_qkv(attention, qkv)
    if window_size > 0:
        x = window_unpartition(x, window_size, padded_size, size)
    return attention.proj(x)


def _attend_qkv(attention: Attention, qkv: torch.Tensor) -> torch.Tensor:
    """Return (B, H, W, width) of (B, H, W, 3 * width)."""
    height, width = qkv.shape[1:3]
    qkv = qkv.flatten(1, 2).unflatten(2, (3, attention.num_heads, -1))  # (B, H * W, 3, heads, D)
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, H * W, D) each
    head_dim = queries.shape[-1]
    scaled = queries * attention.scale
    if attention.use_rel_pos:
        # score += q . rel_h[row, key's row] + q . rel_w[column, key's column]: q's products with all rows and columns
        # become channels of the query; the key has a one at its own row and its own column
        grid = queries.unflatten(2, (height, width))
        rel_h = torch.einsum("bnhwc,hkc->bnhwk", grid, _relative_positions(attention.rel_pos_h, height))
        rel_w = torch.einsum("bnhwc,wkc->bnhwk", grid, _relative_positions(attention.rel_pos_w, width))
        scaled = torch.cat([scaled, rel_h.flatten(2, 3), rel_w.flatten(2, 3)], dim=-1)
        rows = torch.eye(height, dtype=keys.dtype, device=keys.device).repeat_interleave(width, dim=0)
        columns = torch.eye(width, dtype=keys.dtype, device=keys.device).repeat(height, 1)
        places = torch.cat([rows, columns], dim=1).expand(*keys.shape[:3], -1)  # (B, heads, H * W, H + W)
        keys = torch.cat([keys, places], dim=-1)
    # fused kernels want one length for all three, a multiple of 8
    length = -(-scaled.shape[-1] // 8) * 8
    scaled, keys, values = (F.pad(x, (0, length - x.shape[-1])) for x in (scaled, keys, values))
    attended = F.scaled_dot_product_attention(scaled, keys, values, scale=1.0)[..., :head_dim]
    return attended.transpose(1, 2).flatten(2).unflatten(1, (height, width))


def _relative_positions(embeddings: torch.Tensor, size: int) -> torch.Tensor:
    """Return (size, size, D) for each query and key position of (2 * size - 1, D) embeddings of their distance."""
    positions = torch.arange(size, device=embeddings.device)
    return embeddings[positions[:, None] - positions + size - 1]
