"""Position-aware tokens cross-attend to the semantic feature map: the only trained part (paper, section 3.3)."""

import copy
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from torch import nn
from torch.nn import functional as F

MAX_QUERIES = 1024  # regions that attend at once; images with more are not padded to each other
MAX_DEPTH = 100  # the paper compares 1, 3 and 6; a typo would build layers until memory is full


class RegionDecoderLayer(nn.Module):
    """A post-norm decoder layer: self-attention among regions, cross-attention to the feature map, FFN.

    Its parameters have the names of PyTorch's ``TransformerDecoderLayer``, or, without features, of its
    ``TransformerEncoderLayer``. PyTorch's own layers hold an N x N matrix per head: 13 GB for 20,000 regions.
    """

    def __init__(
        self, width: int, num_heads: int, ffn_dim: int, dropout: float, with_features: bool, region_attention: bool
    ) -> None:
        super().__init__()
        self.region_attention = region_attention
        self.self_attn = nn.MultiheadAttention(width, num_heads, dropout, batch_first=True)
        if with_features:
            self.multihead_attn = nn.MultiheadAttention(width, num_heads, dropout, batch_first=True)
        self.linear1 = nn.Linear(width, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if with_features:
            self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, regions: torch.Tensor, padding: torch.Tensor | None, feature_map: torch.Tensor | None
    ) -> torch.Tensor:
        """Decode (B, N, C) ``regions``; ``padding`` is (B, N) bool, True at padding, ``feature_map`` (B, L, C)."""
        # each chunk of queries attends to all regions: exact, and it bounds the memory on any device
        chunks = [self._decode(queries, regions, padding, feature_map) for queries in regions.split(MAX_QUERIES, dim=1)]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1)

    def _decode(
        self,
        queries: torch.Tensor,
        regions: torch.Tensor,
        padding: torch.Tensor | None,
        feature_map: torch.Tensor | None,
    ) -> torch.Tensor:
        x = self.norm1(queries + self.dropout(self._attend(queries, regions, padding)))
        norm = self.norm2
        if feature_map is not None:
            attended = _cross_attend(self.multihead_attn, x, feature_map)
            x, norm = self.norm2(x + self.dropout(attended)), self.norm3
        hidden = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return norm(x + self.dropout(hidden))

    def _attend(self, queries: torch.Tensor, regions: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        if self.region_attention:
            return self.self_attn(queries, regions, regions, padding, need_weights=False)[0]
        alone = queries.reshape(-1, 1, queries.shape[2])  # (B * N, 1, C): each region is a sequence of its own
        return self.self_attn(alone, alone, alone, need_weights=False)[0].view_as(queries)


def _cross_attend(attention: nn.MultiheadAttention, queries: torch.Tensor, feature_map: torch.Tensor) -> torch.Tensor:
    """Return the cross-attention of (B, N, C) regions to the (B, L, C) feature map, (B, N, C).

    Projections of the feature map cost 2 L C^2, whatever N is. With few regions they are moved to the other side of the
    product: ``q (x Wk)^T = (q Wk^T) x^T`` and ``a (x Wv) = (a x) Wv``.
    """
    num_regions, channels = queries.shape[1:]
    length, num_heads = feature_map.shape[1], attention.num_heads
    if num_regions * (channels + (num_heads - 1) * length) >= length * channels:
        return attention(queries, feature_map, feature_map, need_weights=False)[0]
    query_weight, key_weight, value_weight = attention.in_proj_weight.chunk(3)
    query_bias, _, value_bias = attention.in_proj_bias.chunk(3)  # a key's bias adds the same to all scores of a query
    projected = F.linear(queries, query_weight, query_bias).unflatten(2, (num_heads, -1))  # (B, N, H, D)
    projected = torch.einsum("bnhd,hdc->bnhc", projected, key_weight.unflatten(0, (num_heads, -1)))
    projected = projected.flatten(1, 2) * (channels // num_heads) ** -0.5  # (B, N * H, C)
    weights = (projected @ feature_map.transpose(1, 2)).softmax(dim=-1)  # (B, N * H, L)
    weights = F.dropout(weights, attention.dropout, attention.training)
    attended = (weights @ feature_map).unflatten(1, (num_regions, num_heads))  # (B, N, H, C)
    values = torch.einsum("bnhc,hdc->bnhd", attended, value_weight.unflatten(0, (num_heads, -1)))
    # dropout keeps weights from summing to 1: what a value's bias adds follows their sum
    sums = weights.sum(dim=-1).unflatten(1, (num_regions, num_heads))[..., None].to(values.dtype)
    return attention.out_proj((values + sums * value_bias.unflatten(0, (num_heads, -1))).flatten(2))


class RegionDecoder(nn.Module):
    """Decoder layers and a final LayerNorm."""

    def __init__(self, layer: RegionDecoderLayer, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(depth))
        self.norm = nn.LayerNorm(layer.linear1.in_features)

    def forward(
        self, regions: torch.Tensor, padding: torch.Tensor | None, feature_map: torch.Tensor | None
    ) -> torch.Tensor:
        for layer in self.layers:
            regions = layer(regions, padding, feature_map)
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
        compile: bool = False,
    ) -> None:
        """
        Args:
            token_dim: length of a position-aware token.
            clip_width: channels of the feature map.
            text_dim: length of a text embedding.
            with_features: False leaves out the cross-attention ("without CLIP vision" in the paper).
            depth: number of layers.
            num_heads: attention heads.
            ffn_dim: width of the feed-forward layers.
            dropout: in the decoder.
            region_attention: False decodes each region alone ("one box at a time" in the paper).
            compile: compile the decoder, see ``MODEL.REGIONSPOT.COMPILE``.
        """
        super().__init__()
        if clip_width % num_heads or not 1 <= depth <= MAX_DEPTH:
            raise ValueError(
                f"MODEL.REGIONSPOT.INTEGRATION: expected DEPTH of 1 to {MAX_DEPTH} and NUM_HEADS that divides "
                f"{clip_width}, CLIP's width; got {depth} and {num_heads}"
            )
        self.with_features = with_features
        self.to_clip = nn.Linear(token_dim, clip_width)
        layer = RegionDecoderLayer(clip_width, num_heads, ffn_dim, dropout, with_features, region_attention)
        self.decoder = RegionDecoder(layer, depth)
        self.projector = nn.Linear(clip_width, text_dim)
        for parameter in self.decoder.parameters():  # the layers are copies of one: give each its own start
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        if compile:
            self.decoder.compile(dynamic=True)  # numbers of images and regions vary

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
            "compile": node.COMPILE,
        }

    def forward(self, tokens: list[torch.Tensor], feature_map: torch.Tensor | None) -> list[torch.Tensor]:
        """Integrate position-aware tokens and semantic feature maps of B images.

        Args:
            tokens: B tensors, (N_i, token_dim) float; N_i may be 0.
            feature_map: (B, L, clip_width) float, or None without CLIP's features.

        Returns:
            B tensors, (N_i, text_dim) float semantic tokens, not normalized.
        """
        semantic_tokens: list[torch.Tensor] = [torch.empty(0)] * len(tokens)
        for rows in _group_by_length([len(x) for x in tokens]):
            maps = feature_map if feature_map is None or len(rows) == len(tokens) else feature_map[torch.tensor(rows)]
            for row, result in zip(rows, self._integrate([tokens[row] for row in rows], maps)):
                semantic_tokens[row] = result
        return semantic_tokens

    def _integrate(self, tokens: list[torch.Tensor], feature_map: torch.Tensor | None) -> Sequence[torch.Tensor]:
        """Integrate the tokens of images with similar numbers of regions, padded to the most."""
        lengths = torch.tensor([len(x) for x in tokens])
        together = self.to_clip(torch.cat(tokens))  # (sum of N_i, clip_width)
        max_length = max(int(lengths.max()), 1)
        is_padding = torch.arange(max_length)[None] >= lengths[:, None]  # (B, N)
        if not is_padding.any():
            decoded = self._decode(together.view(len(tokens), max_length, -1), None, feature_map)
            return self.projector(decoded.flatten(0, 1)).split(lengths.tolist())
        places = (~is_padding).flatten().nonzero()[:, 0].to(together.device)
        padded = together.new_zeros(is_padding.numel(), together.shape[1]).index_copy(0, places, together)
        # an image without regions attends to its padding, which avoids NaN; these outputs are discarded
        is_padding[:, 0] = False
        padding = is_padding.to(together.device)
        decoded = self._decode(padded.view(len(tokens), max_length, -1), padding, feature_map)
        return self.projector(decoded.flatten(0, 1)[places]).split(lengths.tolist())

    def _decode(
        self, regions: torch.Tensor, padding: torch.Tensor | None, feature_map: torch.Tensor | None
    ) -> torch.Tensor:
        return self.decoder(regions, padding, feature_map if self.with_features else None)


def _group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Split the indices of images so that padding at most doubles a group's regions; large images stay alone."""
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        longest = lengths[groups[-1][0]] if groups else 0
        if not groups or longest > MAX_QUERIES or 2 * lengths[row] < longest:
            groups.append([])
        groups[-1].append(row)
    return [sorted(group) for group in groups]
