"""What regions attend to in the feature map (paper, figure 4): recomputed from the weights, outside the hot path."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from regionspot.modeling.knowledge_integration import KnowledgeIntegration, RegionDecoderLayer, residual


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
    decoder_layer = integration.decoder.layers[layer]
    assert isinstance(decoder_layer, RegionDecoderLayer)
    # the decoder never computes the weights: they are computed from its queries, which a norm gives
    inputs: list[torch.Tensor] = []
    hook = decoder_layer.query_norm.register_forward_hook(lambda module, args, output: inputs.append(output))
    compiled, decoder_layer.residual = decoder_layer.residual, residual  # a compiled one calls no hooks
    try:
        integration([tokens], feature_map)
    finally:
        decoder_layer.residual = compiled
        hook.remove()
    [queries], attention = inputs, decoder_layer.multihead_attn  # (N, C)
    queries = queries if regions is None else queries[list(regions)]
    q, k = _project(attention, 0, queries), _project(attention, 1, feature_map[0])  # (heads, n, d), (heads, L, d)
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)


def _project(attention: nn.MultiheadAttention, index: int, x: torch.Tensor) -> torch.Tensor:
    """Return the queries (``index`` 0) or keys (1) of (N, C), as (heads, N, C / heads)."""
    weight, bias = attention.in_proj_weight.chunk(3)[index], attention.in_proj_bias.chunk(3)[index]
    return F.linear(x, weight, bias).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)


def cross_attention(
    integration: KnowledgeIntegration,
    tokens: torch.Tensor,
    feature_map: torch.Tensor,
    regions: Sequence[int] | None = None,
) -> torch.Tensor:
    """Return the last layer's cross-attention of an image's regions to the feature map, averaged over the heads.

    Args:
        integration: the trained module, with a feature map.
        tokens: (N, token_dim) float, of all regions.
        feature_map: (1, L, width) float, L = grid^2 or 1 + grid^2.
        regions: n rows of ``tokens``; all by default.

    Returns:
        (n, grid, grid) float, without the weight of the class token.
    """
    weights = cross_attention_weights(integration, tokens, feature_map, regions).mean(dim=0)  # (n, L)
    grid = int(weights.shape[1] ** 0.5)  # the same with and without the class token, which comes first
    return weights[:, -grid * grid :].unflatten(1, (grid, grid))
