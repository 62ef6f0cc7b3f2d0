"""Position-aware tokens cross-attend to the semantic feature map: the only trained part (paper, section 3.3).

Shapes: M regions of B images, one image's after the other's; C channels in H heads of D; a feature map of L positions.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from torch import nn
from torch.nn import functional as F

from regionspot.modeling.mask_pooling import COVERAGE_DIM, pool_features
from regionspot.modeling.region_groups import RegionGroups

MAX_QUERIES = 1024  # regions that attend at once
MAX_DEPTH = 100  # the paper compares 1, 3 and 6; a typo would build layers until memory is full


class RegionDecoderLayer(nn.Module):
    """A decoder layer: self-attention among regions, cross-attention to the feature map, FFN; the paper's is post-norm.

    Its parameters have the names of PyTorch's ``TransformerDecoderLayer``, or, without features, of its
    ``TransformerEncoderLayer``. PyTorch's own layers pad all images to the most regions, hold an N x N matrix per head
    (13 GB for 20,000 regions), and project the feature map, whatever the number of regions is.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        with_features: bool,
        region_attention: bool,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        self.region_attention, self.pre_norm = region_attention, pre_norm
        self.self_attn = nn.MultiheadAttention(width, num_heads, dropout, batch_first=True)
        if with_features:
            self.multihead_attn = nn.MultiheadAttention(width, num_heads, dropout, batch_first=True)
        self.linear1 = nn.Linear(width, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if with_features:
            self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.residual: Callable[..., torch.Tensor] = residual

    def forward(self, regions: torch.Tensor, groups: RegionGroups, feature_map: torch.Tensor | None) -> torch.Tensor:
        """Decode (M, C) ``regions``; ``feature_map`` is (B, L, C)."""
        x = self._add(regions, lambda y: self._attend(y, groups), self.norm1)
        norm = self.norm2
        if feature_map is not None:
            x, norm = self._add(x, lambda y: self._cross_attend(y, groups, feature_map), self.norm2), self.norm3
        return self._add(x, lambda y: self.linear2(self.dropout(F.relu(self.linear1(y)))), norm)

    def _add(self, x: torch.Tensor, sublayer: Callable[[torch.Tensor], torch.Tensor], norm: nn.Module) -> torch.Tensor:
        if self.pre_norm:  # what is added is never normalized: gradients reach the first layer, however deep
            return x + self.dropout(sublayer(norm(x)))
        return self.residual(x, sublayer(x), norm, self.dropout)

    @property
    def query_norm(self) -> nn.Module:
        """The norm whose output the cross-attention takes its queries from."""
        return self.norm2 if self.pre_norm else self.norm1

    def _attend(self, regions: torch.Tensor, groups: RegionGroups) -> torch.Tensor:
        """Self-attention of (M, C) regions, among those of an image or of each region alone."""
        attention = self.self_attn
        if not self.region_attention:  # each region is a sequence of its own
            return attention(regions[:, None], regions[:, None], regions[:, None], need_weights=False)[0][:, 0]
        qkv = F.linear(regions, attention.in_proj_weight, _in_proj_bias(attention))
        qkv = qkv.unflatten(1, (3, attention.num_heads, -1))  # (M, 3, H, D)
        attended = [
            _attend_heads(attention, padded.permute(2, 0, 3, 1, 4), mask)
            for padded, mask in zip(groups.pad(qkv), groups.masks)
        ]
        return attention.out_proj(groups.unpad(attended).flatten(1))

    def _cross_attend(self, regions: torch.Tensor, groups: RegionGroups, feature_map: torch.Tensor) -> torch.Tensor:
        """Cross-attention of (M, C) regions to their image's part of the (B, L, C) feature map.

        Projections of the feature map cost 2 L C^2, whatever the number of regions is. With few regions they are moved
        to the other side of the product: ``q (x Wk)^T = (q Wk^T) x^T`` and ``a (x Wv) = (a x) Wv``.
        """
        attention, (length, channels) = self.multihead_attn, feature_map.shape[1:]
        num_heads = attention.num_heads
        query_weight, key_value_weight = attention.in_proj_weight.split([channels, 2 * channels])
        query_bias, key_value_bias = _in_proj_bias(attention).split([channels, 2 * channels])
        queries = F.linear(regions, query_weight, query_bias).unflatten(1, (num_heads, -1))  # (M, H, D)
        are_few = groups.longest * (channels + (num_heads - 1) * length) < length * channels
        if not are_few:
            projected = F.linear(feature_map, key_value_weight, key_value_bias).unflatten(2, (2, num_heads, -1))
            attended = []
            for i, padded in enumerate(groups.pad(queries)):
                keys, values = groups.select(projected, i).permute(2, 0, 3, 1, 4)
                attended.append(_attend_heads(attention, (padded.transpose(1, 2), keys, values)))
            return attention.out_proj(groups.unpad(attended).flatten(1))
        key_weight, value_weight = key_value_weight.unflatten(0, (2, num_heads, -1))  # (H, D, C) each
        projected = torch.einsum("mhd,hdc->mhc", queries * queries.shape[-1] ** -0.5, key_weight)
        contexts, sums = [], []
        for i, padded in enumerate(groups.pad(projected)):  # (b, N, H, C)
            maps, (num_images, num_regions) = groups.select(feature_map, i), padded.shape[:2]
            weights = (padded.flatten(1, 2) @ maps.transpose(1, 2)).softmax(dim=-1)  # (b, N * H, L)
            weights = F.dropout(weights, attention.dropout, self.training)
            contexts.append((weights @ maps).view(num_images, num_regions, num_heads, -1))
            sums.append(weights.sum(dim=-1).view(num_images, num_regions, num_heads))
        values = torch.einsum("mhc,hdc->mhd", groups.unpad(contexts), value_weight)
        # dropout keeps weights from summing to 1: what a value's bias adds follows their sum
        value_bias = key_value_bias[channels:].unflatten(0, (num_heads, -1))
        return attention.out_proj((values + groups.unpad(sums)[..., None] * value_bias).flatten(1))


def _in_proj_bias(attention: nn.MultiheadAttention) -> torch.Tensor:
    """Return the (3 C,) bias of queries, keys and values, without that of the keys.

    It adds the same to all scores of a query, which softmax ignores. Its gradient would be rounding errors alone, which
    AdamW makes full steps of.
    """
    query_bias, key_bias, value_bias = attention.in_proj_bias.chunk(3)
    return torch.cat([query_bias, torch.zeros_like(key_bias), value_bias])


def residual(x: torch.Tensor, change: torch.Tensor, norm: nn.LayerNorm, dropout: nn.Dropout) -> torch.Tensor:
    """Add what a sublayer changes, and normalize."""
    return norm(x + dropout(change))


def _attend_heads(
    attention: nn.MultiheadAttention,
    queries_keys_values: torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return (b, N, H, D) of (b, H, N, D) queries and (b, H, L, D) keys and values; ``mask`` is True at valid keys."""
    queries, keys, values = queries_keys_values
    dropout = attention.dropout if attention.training else 0.0
    # each chunk of queries attends to all keys: exact, and it bounds the memory on any device; a program that is traced
    # for any number of regions cannot have a number of chunks
    parts = (queries,) if torch.compiler.is_compiling() else queries.split(MAX_QUERIES, dim=2)
    chunks = [F.scaled_dot_product_attention(part, keys, values, mask, dropout) for part in parts]
    return (chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)).transpose(1, 2)


class RegionDecoder(nn.Module):
    """Decoder layers and a final LayerNorm."""

    def __init__(self, layer: RegionDecoderLayer, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(depth))
        self.norm = nn.LayerNorm(layer.linear1.in_features)

    def forward(self, regions: torch.Tensor, groups: RegionGroups, feature_map: torch.Tensor | None) -> torch.Tensor:
        for layer in self.layers:
            regions = layer(regions, groups, feature_map)
        return self.norm(regions)


class KnowledgeIntegration(nn.Module):
    """Linear -> decoder layers (self-attention among regions, cross-attention to the feature map) -> Linear.

    The submodules have the names of the released checkpoints.
    """

    @configurable
    def __init__(
        self,
        *,
        token_dim: int,
        clip_width: int,
        text_dim: int,
        with_features: bool = True,
        depth: int = 3,
        num_heads: int = 8,
        ffn_dim: int = 2048,
        dropout: float = 0.1,
        region_attention: bool = True,
        pre_norm: bool = False,
        mask_pooling: bool = False,
        compile: bool = False,
    ) -> None:
        """
        Args:
            token_dim: length of a position-aware token, without ``COVERAGE_DIM``.
            clip_width: channels of the feature map.
            text_dim: length of a text embedding.
            with_features: False leaves out the cross-attention ("without CLIP vision" in the paper).
            depth: number of layers.
            num_heads: attention heads.
            ffn_dim: width of the feed-forward layers.
            dropout: in the decoder.
            region_attention: False decodes each region alone ("one box at a time" in the paper).
            pre_norm: normalize what sublayers take instead of what they give, for deep modules.
            mask_pooling: add to each region the mean of the feature map inside its mask; tokens are then followed by
                the mask's ``mask_coverage``.
            compile: compile the decoder, see ``MODEL.REGIONSPOT.COMPILE``.
        """
        super().__init__()
        if clip_width % num_heads or not 1 <= depth <= MAX_DEPTH:
            raise ValueError(
                f"MODEL.REGIONSPOT.INTEGRATION: expected DEPTH of 1 to {MAX_DEPTH} and NUM_HEADS that divides "
                f"{clip_width}, CLIP's width; got {depth} and {num_heads}"
            )
        if mask_pooling and not with_features:
            raise ValueError("MODEL.REGIONSPOT.INTEGRATION.MASK_POOLING: expected CLIP.FEATURES other than none")
        self.with_features, self.mask_pooling = with_features, mask_pooling
        self.to_clip = nn.Linear(token_dim, clip_width)
        if mask_pooling:
            self.pool_norm, self.pool_proj = nn.LayerNorm(clip_width), nn.Linear(clip_width, clip_width)
        layer = RegionDecoderLayer(clip_width, num_heads, ffn_dim, dropout, with_features, region_attention, pre_norm)
        self.decoder = RegionDecoder(layer, depth)
        self.projector = nn.Linear(clip_width, text_dim)
        for parameter in self.decoder.parameters():  # the layers are copies of one: give each its own start
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        if compile:
            compiled = torch.compile(residual, dynamic=True)  # the number of regions varies
            for decoder_layer in self.decoder.layers:
                decoder_layer.residual = compiled  # type: ignore[assignment]

    @classmethod
    def from_config(cls, cfg: CfgNode, *, token_dim: int, clip_width: int, text_dim: int) -> dict:
        node = cfg.MODEL.REGIONSPOT
        return {
            "token_dim": token_dim,
            "clip_width": clip_width,
            "text_dim": text_dim,
            "with_features": node.CLIP.FEATURES != "none",
            "depth": node.INTEGRATION.DEPTH,
            "num_heads": node.INTEGRATION.NUM_HEADS,
            "ffn_dim": node.INTEGRATION.FFN_DIM,
            "dropout": node.INTEGRATION.DROPOUT,
            "region_attention": node.INTEGRATION.REGION_ATTENTION,
            "pre_norm": node.INTEGRATION.PRE_NORM,
            "mask_pooling": node.INTEGRATION.MASK_POOLING,
            "compile": node.COMPILE,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """What outputs depend on beside the weights and their shapes."""
        layer = self.decoder.layers[0]
        assert isinstance(layer, RegionDecoderLayer)
        return {
            "NUM_HEADS": layer.self_attn.num_heads,
            "PRE_NORM": layer.pre_norm,
            "REGION_ATTENTION": layer.region_attention,
        }

    def forward(self, tokens: list[torch.Tensor], feature_map: torch.Tensor | None) -> list[torch.Tensor]:
        """Integrate position-aware tokens and semantic feature maps of B images.

        Args:
            tokens: B tensors, (N_i, token_dim) float, with ``mask_pooling`` (N_i, token_dim + COVERAGE_DIM); N_i may
                be 0.
            feature_map: (B, L, clip_width) float, or None without CLIP's features.

        Returns:
            B tensors, (N_i, text_dim) float semantic tokens, not normalized.
        """
        lengths, together = [len(x) for x in tokens], torch.cat(tokens)
        counts = lengths
        if not len(together):  # in training all parameters get a gradient, which other processes wait for
            counts, together = [1, *lengths[1:]], together.new_zeros(1, together.shape[1])
        groups = RegionGroups(counts, together.device)
        regions = self._embed(together, groups, feature_map)
        decoded = self.decoder(regions, groups, feature_map if self.with_features else None)
        return list(self.projector(decoded)[: sum(lengths)].split(lengths))

    def _embed(self, tokens: torch.Tensor, groups: RegionGroups, feature_map: torch.Tensor | None) -> torch.Tensor:
        """Return the (M, C) inputs of the decoder."""
        if not self.mask_pooling:
            return self.to_clip(tokens)
        assert feature_map is not None
        tokens, coverage = tokens.split([self.to_clip.in_features, COVERAGE_DIM], dim=1)
        return self.to_clip(tokens) + self.pool_proj(self.pool_norm(pool_features(coverage, feature_map, groups)))
