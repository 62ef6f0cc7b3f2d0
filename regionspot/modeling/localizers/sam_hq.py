"""SAM-HQ as localizer (Ke et al., "Segment Anything in High Quality")."""

from typing import Any

import torch

from regionspot.modeling.localizers.localizer import LOCALIZER_REGISTRY
from regionspot.modeling.localizers.official_keys import rename_sam_hq
from regionspot.modeling.localizers.prompted import fit_longest_side
from regionspot.modeling.localizers.transformers_decoder import SamHqPromptDecoder
from regionspot.modeling.localizers.transformers_sam import TransformersLocalizer
from regionspot.modeling.masks import MaskUpsampler


def _size(width: int, depth: int, heads: int, global_layers: list[int]) -> dict[str, Any]:
    vision = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "global_attn_indexes": global_layers,
    }
    # 1e-5 is the decoder's in the official package, which trained it
    return {"vision_config": vision, "mask_decoder_config": {"vit_dim": width, "layer_norm_eps": 1e-5}}


@LOCALIZER_REGISTRY.register()
class SamHqLocalizer(TransformersLocalizer):
    """Frozen SAM-HQ, by ``SamHQModel``.

    The token is the mask token that belongs to the mask, as in SAM: SAM-HQ's own token is one for all masks. The masks
    are the sum of SAM's and the HQ token's, the library's default, and equal those of the authors' package: made of
    the image behind the two-way transformer, where ``SamHQModel`` itself (5.24) takes the one before it, transposed.

    Image embeddings are (B, C + 16 * C / 8, h, w): behind the C channels of SAM's come the HQ features, (B, C / 8, 4h,
    4w), made of the embedding and of an early layer's features, by ``pixel_unshuffle``.
    """

    model_class, config_class = "SamHQModel", "SamHQConfig"
    sizes = {
        "sam_hq_vit_b": _size(768, 12, 12, [2, 5, 8, 11]),
        "sam_hq_vit_l": _size(1024, 24, 16, [5, 11, 17, 23]),
        "sam_hq_vit_h": _size(1280, 32, 16, [7, 15, 23, 31]),
    }
    decoder_class = SamHqPromptDecoder

    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return fit_longest_side(image_size, self.image_size)

    def mask_upsampler(self, image_size: tuple[int, int]) -> MaskUpsampler:
        return MaskUpsampler(self.image_size, self.input_size(image_size), threshold=0.0)

    @property
    def _feature_sizes(self) -> list[tuple[int, int]]:
        return [(self.prompt_dim // 8, 4)]

    def _read_features(self, output: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        decoder, embeddings = self.sam.mask_decoder, output.last_hidden_state
        x = decoder.activation(decoder.encoder_norm(decoder.encoder_conv1(embeddings)))
        early = output.intermediate_embeddings[0].permute(0, 3, 1, 2)  # (B, width, h, w)
        early = decoder.activation(decoder.compress_vit_norm(decoder.compress_vit_conv1(early)))
        return embeddings, [decoder.encoder_conv2(x) + decoder.compress_vit_conv2(early)]

    def rename_official_keys(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return rename_sam_hq(state)
