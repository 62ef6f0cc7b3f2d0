"""SAM's image encoder: ``segment_anything``'s modules and numbers in a fraction of the time and memory.

``segment_anything`` adds the decomposed relative positions to the whole attention matrix, (h * w)^2 for each head. Here
that matrix never exists. On a GPU the positions are channels of queries and keys, for the fused kernels of
``scaled_dot_product_attention``. On a CPU that would be three times the arithmetic: there a few rows of the matrix are
made at a time, and stay in the cache.
"""

from collections.abc import Callable

import torch
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block, window_partition, window_unpartition
from torch.nn import functional as F

CPU_ROWS = 512  # of a head's attention matrix that a CPU makes at once: 8 MB at SAM's size, in float32


def run_block(block: Block, x: torch.Tensor) -> torch.Tensor:
    """Return the (B, h, w, width) output of one transformer block."""
    x = x + _attend(block.attn, block.norm1(x), block.window_size)
    return x + block.mlp(block.norm2(x))


def encode(
    encoder: ImageEncoderViT, images: torch.Tensor, run: Callable[[Block, torch.Tensor], torch.Tensor] = run_block
) -> torch.Tensor:
    """Return the (B, C, h, w) embeddings of (B, 3, S, S) preprocessed images; ``run`` may be ``run_block`` compiled."""
    x = encoder.patch_embed(images)  # (B, h, w, width)
    if encoder.pos_embed is not None:
        x = x + encoder.pos_embed
    for block in encoder.blocks:
        x = run(block, x)
    return encoder.neck(x.permute(0, 3, 1, 2))


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
    scaled = queries * attention.scale
    if attention.use_rel_pos:
        # score += q . rel_h[row, key's row] + q . rel_w[column, key's column]
        grid = queries.unflatten(2, (height, width))
        rel_h = torch.einsum("bnhwc,hkc->bnhwk", grid, _relative_positions(attention.rel_pos_h, height)).flatten(2, 3)
        rel_w = torch.einsum("bnhwc,wkc->bnhwk", grid, _relative_positions(attention.rel_pos_w, width)).flatten(2, 3)
        if qkv.device.type == "cpu" and height * width > CPU_ROWS and not qkv.requires_grad:
            attended = _attend_by_rows(scaled, keys, values, rel_h, rel_w)
        else:
            attended = _attend_with_positions(scaled, keys, values, rel_h, rel_w)
    else:
        attended = F.scaled_dot_product_attention(scaled, keys, values, scale=1.0)
    return attended.transpose(1, 2).flatten(2).unflatten(1, (height, width))


def _attend_with_positions(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rel_h: torch.Tensor, rel_w: torch.Tensor
) -> torch.Tensor:
    """Attend with relative positions as channels: a query's products with all rows and columns are its own channels,
    and a key has a one at its row and at its column.

    Args:
        queries, keys, values: (B, heads, H * W, D); the queries are scaled.
        rel_h, rel_w: (B, heads, H * W, H) and (B, heads, H * W, W).

    Returns:
        (B, heads, H * W, D).
    """
    height, width, head_dim = rel_h.shape[-1], rel_w.shape[-1], keys.shape[-1]
    rows = torch.eye(height, dtype=keys.dtype, device=keys.device).repeat_interleave(width, dim=0)
    columns = torch.eye(width, dtype=keys.dtype, device=keys.device).repeat(height, 1)
    places = torch.cat([rows, columns], dim=1).expand(*keys.shape[:3], -1)  # (B, heads, H * W, H + W)
    queries, keys = torch.cat([queries, rel_h, rel_w], dim=-1), torch.cat([keys, places], dim=-1)
    # fused kernels want one length for all three, a multiple of 8
    length = -(-queries.shape[-1] // 8) * 8
    queries, keys, values = (F.pad(x, (0, length - x.shape[-1])) for x in (queries, keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, scale=1.0)[..., :head_dim]


def _attend_by_rows(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rel_h: torch.Tensor, rel_w: torch.Tensor
) -> torch.Tensor:
    """Do the same as ``_attend_with_positions``, some rows of one head's matrix at a time."""
    attended = queries.new_empty(queries.shape)  # contiguous, so that what follows are views of it
    heads = (x.flatten(0, 1) for x in (queries, keys, values, rel_h, rel_w, attended))
    for head_queries, head_keys, head_values, by_row, by_column, output in zip(*heads):
        chunks = (x.split(CPU_ROWS) for x in (head_queries, by_row, by_column, output))
        for part, part_rows, part_columns, part_output in zip(*chunks):
            scores = (part_rows[:, :, None] + part_columns[:, None]).flatten(1)  # (rows, H * W)
            scores.addmm_(part, head_keys.t())
            torch.mm(scores.softmax(dim=-1), head_values, out=part_output)
    return attended


def _relative_positions(embeddings: torch.Tensor, size: int) -> torch.Tensor:
    """Return (size, size, D) for each query and key position of (2 * size - 1, D) embeddings of their distance."""
    positions = torch.arange(size, device=embeddings.device)
    return embeddings[positions[:, None] - positions + size - 1]
