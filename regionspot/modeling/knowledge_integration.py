"""Position-aware tokens look at the semantic feature map: the only part that is trained (paper, section 3.3)."""

import torch
from detectron2.config import CfgNode, configurable
from torch import nn


class KnowledgeIntegration(nn.Module):
    """Linear -> decoder layers (regions attend to each other, then to the feature map) -> Linear.

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
            with_features: False leaves the cross-attention out ("without CLIP vision").
            depth: number of layers.
            num_heads: attention heads.
            ffn_dim: width of the feed-forward layers.
            dropout: in the decoder.
            region_attention: False decodes each region alone ("one box at a time").
        """
        super().__init__()
        if clip_width % num_heads or depth < 1:
            raise ValueError(
                "MODEL.REGIONSPOT.INTEGRATION: expected DEPTH of at least 1 and NUM_HEADS that divides "
                f"{clip_width}, CLIP's width; got {depth} and {num_heads}"
            )
        self.region_attention = region_attention
        self.to_clip = nn.Linear(token_dim, clip_width)
        self.decoder: nn.TransformerDecoder | nn.TransformerEncoder
        if with_features:
            layer = nn.TransformerDecoderLayer(clip_width, num_heads, ffn_dim, dropout, batch_first=True)
            self.decoder = nn.TransformerDecoder(layer, depth, nn.LayerNorm(clip_width))
        else:
            plain = nn.TransformerEncoderLayer(clip_width, num_heads, ffn_dim, dropout, batch_first=True)
            self.decoder = nn.TransformerEncoder(plain, depth, nn.LayerNorm(clip_width), enable_nested_tensor=False)
        self.projector = nn.Linear(clip_width, text_dim)
        for parameter in self.decoder.parameters():  # the layers are copies of one: let each start anew
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
        """Integrate what SAM and CLIP know of the regions of B images.

        Args:
            tokens: B tensors, (N_i, token_dim) float; N_i may be 0.
            feature_map: (B, L, clip_width) float, or None without CLIP's features.

        Returns:
            B tensors, (N_i, text_dim) float semantic tokens, not normalised.
        """
        lengths = [len(t) for t in tokens]
        padded = self.to_clip(
            nn.utils.rnn.pad_sequence([*tokens, tokens[0].new_zeros(1, tokens[0].shape[1])], batch_first=True)[:-1]
        )
        number = padded.shape[1]  # at least 1, by the row that was added and taken away
        if self.region_attention:
            padding = torch.arange(number)[None] >= torch.tensor(lengths)[:, None]  # (B, N), True at padding
            padding[:, 0] = False  # an image without regions attends to its padding: no NaN, and no one reads it
            masks = {"key_padding_mask": padding.to(padded.device), "mask": None}
        else:
            masks = {"key_padding_mask": None, "mask": ~torch.eye(number, dtype=torch.bool, device=padded.device)}
        if isinstance(self.decoder, nn.TransformerDecoder):
            assert feature_map is not None
            decoded = self.decoder(
                padded, feature_map, tgt_mask=masks["mask"], tgt_key_padding_mask=masks["key_padding_mask"]
            )
        else:
            decoded = self.decoder(padded, mask=masks["mask"], src_key_padding_mask=masks["key_padding_mask"])
        projected = self.projector(decoded)
        return [projected[i, :length] for i, length in enumerate(lengths)]
