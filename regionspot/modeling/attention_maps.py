"""What regions attend to in the feature map (paper, figure 4): recomputed from the weights, outside the hot path."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from regionspot.modeling.knowledge_integration import KnowledgeIntegration, RegionDecoderLayer


@torch.no_grad()
def cross_attention_weights(
    integration: KnowledgeIntegration,
    tokens: torch.Tensor,
    feature_map: torch.Tensor,
    regions: Sequence[int] | None = None,
    layer: int = -1,
) -> torch.Tensor:
    """Return a layer's cross-attention weights of regions of an image; each head's sum to 1 over the feature map.

    Args:
        integration: the trained module, with a feature map.
        tokens: (N, token_dim) float, the position-aware tokens of all regions: they attend to each other.
        feature_map: (1, L, width) float.
        regions: n rows of ``tokens``; all by default.
        layer: of the decoder, counted from the end if negative.

    Returns:
        (heads, n, L) float.

    Raises:
        ValueError: a model without CLIP's features, which has no cross-attention.
    """
    if not integration.with_features:
        raise ValueError("cross_attention: this model has no feature map to attend to (CLIP.FEATURES none)")
    layers = [module for module in integration.decoder.layers if isinstance(module, RegionDecoderLayer)]
    x, features = integration.to_clip(tokens), feature_map[0]
    for earlier in layers[: range(len(layers))[layer]]:
        x = _decode(earlier, x, features)
    queries = _attend_to_regions(layers[layer], x)
    queries = queries if regions is None else queries[list(regions)]
    attention = layers[layer].multihead_attn
    q, k = _project(attention, 0, queries), _project(attention, 1, features)  # (heads, n, d), (heads, L, d)
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)


def _decode(layer: RegionDecoderLayer, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Return the layer's output for (N, C) regions and (L, C) features, without dropout."""
    x = _attend_to_regions(layer, x)
    x = layer.norm2(x + _attend(layer.multihead_attn, x, features))
    return layer.norm3(x + layer.linear2(F.relu(layer.linear1(x))))


def _attend_to_regions(layer: RegionDecoderLayer, x: torch.Tensor) -> torch.Tensor:
    if layer.region_attention:
        return layer.norm1(x + _attend(layer.self_attn, x, x))
    values = _project(layer.self_attn, 2, x)  # a region alone attends to itself, with a weight of 1
    return layer.norm1(x + layer.self_attn.out_proj(values.transpose(0, 1).flatten(1)))


def _attend(attention: nn.MultiheadAttention, x: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    q, k, v = (_project(attention, index, source) for index, source in enumerate((x, others, others)))
    return attention.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))


def _project(attention: nn.MultiheadAttention, index: int, x: torch.Tensor) -> torch.Tensor:
    """Return the queries (``index`` 0), keys (1) or values (2) of (N, C), as (heads, N, C / heads)."""
    weight, bias = attention.in_proj_weight.chunk(3)[index], attention.in_proj_bias.chunk(3)[index]
    return F.linear(x, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
