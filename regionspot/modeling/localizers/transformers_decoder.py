"""The mask decoders of SAM 2 and SAM-HQ in the library ``transformers``, run by ``PromptDecoder``.

Their two-way transformers are SAM's, with other names of the modules. The output tokens have no positions, so that
their order is free: those that SAM does not have come last. What differs is how masks are made.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from regionspot.modeling.localizers.sam_decoder import PromptDecoder, UpdatedPrompts


class TransformersPromptDecoder(PromptDecoder):
    """What both families share."""

    def __init__(
        self, decoder: nn.Module, embeddings: torch.Tensor, position: torch.Tensor, features: Sequence[torch.Tensor]
    ) -> None:
        """
        Args:
            decoder: the library's mask decoder.
            embeddings, position: as for ``PromptDecoder``.
            features: what masks need of the images beside the embeddings, (B, c, k * h, k * w) each.
        """
        super().__init__(_named_as_sam(decoder), embeddings, position)
        self.mask_decoder: Any = decoder
        self.features = features

    def update(self, sparse: torch.Tensor, dense: torch.Tensor | None, counts: Sequence[int] = ()) -> UpdatedPrompts:
        updated = super().update(sparse, dense, counts)
        if len(self.image) == 1:
            return updated
        owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return replace(updated, owners=owners.to(sparse.device))

    def _grid(self, prompts: UpdatedPrompts) -> torch.Tensor:
        """Return the (N, C, h, w) images of prompts."""
        return prompts.image.transpose(1, 2).unflatten(2, (-1, self.side))

    def _features_of(self, prompts: UpdatedPrompts) -> list[torch.Tensor]:
        """Return the features of each prompt's image, (N, c, k * h, k * w) or, with one image, (1, ...)."""
        return [x if prompts.owners is None else x[prompts.owners] for x in self.features]


class Sam2PromptDecoder(TransformersPromptDecoder):
    """SAM 2's: the two finer levels of its feature pyramid are added where the image is upscaled.

    ``features`` are (B, C / 8, 4h, 4w) and (B, C / 4, 2h, 2w).
    """

    @property
    def output_tokens(self) -> torch.Tensor:
        return torch.cat([super().output_tokens, self.mask_decoder.obj_score_token.weight])

    def predict_masks(self, prompts: UpdatedPrompts, kernels: torch.Tensor) -> torch.Tensor:
        decoder, (fine, middle) = self.mask_decoder, self._features_of(prompts)
        x = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(self._grid(prompts)) + middle))
        x = decoder.activation(decoder.upscale_conv2(x) + fine)  # (N, C / 8, 4h, 4w)
        return (kernels @ x.flatten(2)).unflatten(2, x.shape[2:])


class SamHqPromptDecoder(TransformersPromptDecoder):
    """SAM-HQ's: to the mask of each SAM token it adds that of its own token, in features of its own.

    ``features`` is one, (B, C / 8, 4h, 4w).
    """

    @property
    def output_tokens(self) -> torch.Tensor:
        return torch.cat([super().output_tokens, self.mask_decoder.hq_token.weight])

    def predict_masks(self, prompts: UpdatedPrompts, kernels: torch.Tensor) -> torch.Tensor:
        decoder, [features] = self.mask_decoder, self._features_of(prompts)
        x = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(self._grid(prompts))))
        x = decoder.activation(decoder.upscale_conv2(x))  # (N, C / 8, 4h, 4w)
        fine = decoder.mask_conv2(decoder.activation(decoder.mask_norm(decoder.mask_conv1(x)))) + features
        last = 1 + len(decoder.output_hypernetworks_mlps)
        fine_kernels = decoder.hq_mask_mlp(self.read(prompts, slice(last, last + 1)))  # (N, 1, C / 8)
        masks = kernels @ x.flatten(2) + fine_kernels @ fine.flatten(2)  # (N, M, 16 * h * w)
        return masks.unflatten(2, x.shape[2:])


def pack_features(embeddings: torch.Tensor, features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Append (B, c, k * h, k * w) features to (B, C, h, w) embeddings as k * k * c channels each; nothing is lost."""
    side = embeddings.shape[-1]
    return torch.cat([embeddings, *(F.pixel_unshuffle(x, x.shape[-1] // side) for x in features)], dim=1)


def unpack_features(
    packed: torch.Tensor, channels: int, features: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Undo ``pack_features``: C is ``channels``, and each of ``features`` is (c, k)."""
    embeddings, *parts = packed.split([channels, *(c * k * k for c, k in features)], dim=1)
    return embeddings, [F.pixel_shuffle(part, k) for part, (_, k) in zip(parts, features)]


def _named_as_sam(decoder: Any) -> SimpleNamespace:
    """Return the modules of a decoder under the names of ``segment_anything``; they stay the same objects."""
    transformer = decoder.transformer
    layers = [
        SimpleNamespace(
            skip_first_layer_pe=layer.skip_first_layer_pe,
            mlp=layer.mlp,
            **{f"norm{i}": getattr(layer, f"layer_norm{i}") for i in range(1, 5)},
            **{name: _attention(getattr(layer, name)) for name in _ATTENTIONS},
        )
        for layer in transformer.layers
    ]
    two_way = SimpleNamespace(
        layers=layers,
        final_attn_token_to_image=_attention(transformer.final_attn_token_to_image),
        norm_final_attn=transformer.layer_norm_final_attn,
    )
    return SimpleNamespace(transformer=two_way, iou_token=decoder.iou_token, mask_tokens=decoder.mask_tokens)


_ATTENTIONS = ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")


def _attention(attention: Any) -> SimpleNamespace:
    return SimpleNamespace(
        num_heads=attention.num_attention_heads,
        q_proj=attention.q_proj,
        k_proj=attention.k_proj,
        v_proj=attention.v_proj,
        out_proj=attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj,
    )
