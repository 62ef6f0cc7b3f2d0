"""Position-aware tokens cross-attend to the semantic feature map: the only trained part (paper, section 3.3)."""

import copy

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
            attended, _ = self.multihead_attn(x, feature_map, feature_map, need_weights=False)
            x, norm = self.norm2(x + self.dropout(attended)), self.norm3
        hidden = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return norm(x + self.dropout(hidden))

    def _attend(self, queries: torch.Tensor, regions: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        if self.region_attention:
            return self.self_attn(queries, regions, regions, padding, need_weights=False)[0]
        alone = queries.reshape(-1, 1, queries.shape[2])  # (B * N, 1, C): each region is a sequence of its own
        return self.self_attn(alone, alone, alone, need_weights=False)[0].view_as(queries)


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
        }

    def forward(self, tokens: list[torch.Tensor], feature_map: torch.Tensor | None) -> list[torch.Tensor]:
        """Integrate position-aware tokens and semantic feature maps of B images.

        Args:
            tokens: B tensors, (N_i, token_dim) float; N_i may be 0.
            feature_map: (B, L, clip_width) float, or None without CLIP's features.

        Returns:
            B tensors, (N_i, text_dim) float semantic tokens, not normalized.
        """
        lengths = [len(t) for t in tokens]
        if len(tokens) > 1 and max(lengths) > MAX_QUERIES:  # one image at a time, without padding
            maps = [None] * len(tokens) if feature_map is None else feature_map.split(1)
            return [self([t], image_map)[0] for t, image_map in zip(tokens, maps, strict=True)]
        padded = self.to_clip(  # (B, N, clip_width)
            nn.utils.rnn.pad_sequence([*tokens, tokens[0].new_zeros(1, tokens[0].shape[1])], batch_first=True)[:-1]
        )
        max_length = padded.shape[1]  # at least 1, by the row that was appended above and removed again
        padding = None
        if min(lengths) < max_length:
            padding = torch.arange(max_length)[None] >= torch.tensor(lengths)[:, None]  # (B, N), True at padding
            # an image without regions attends to its padding, which avoids NaN; these outputs are discarded
            padding[:, 0] = False
            padding = padding.to(padded.device)
        decoded = self.decoder(padded, padding, feature_map if self.with_features else None)
        projected = self.projector(decoded)
        return [projected[i, :length] for i, length in enumerate(lengths)]
