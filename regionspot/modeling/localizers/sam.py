"""SAM as localizer, at every size (paper, section 3.1)."""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from segment_anything.modeling import Sam
from torch import nn

from regionspot.modeling.localizers import sam_encoder
from regionspot.modeling.localizers.build_sam import build_sam, get_sam_size
from regionspot.modeling.localizers.localizer import LOCALIZER_REGISTRY
from regionspot.modeling.localizers.prompted import PromptedLocalizer, fit_longest_side
from regionspot.modeling.localizers.sam_decoder import PromptDecoder
from regionspot.modeling.masks import MaskUpsampler
from regionspot.structures import Prompts


@LOCALIZER_REGISTRY.register()
class SamLocalizer(PromptedLocalizer):
    """Frozen SAM: image embedding, then prompts in chunks.

    A SAM with another image encoder overrides ``build_sam`` and ``embed``.
    """

    compiled_step: Callable[..., Any] = staticmethod(sam_encoder.run_block)

    @classmethod
    def build_sam(cls, cfg: CfgNode) -> Sam:
        return build_sam(get_sam_size(cfg))

    @property
    def image_encoder(self) -> nn.Module:
        return self.sam.image_encoder

    @property
    def prompt_dim(self) -> int:
        return self.sam.mask_decoder.transformer_dim

    @property
    def image_size(self) -> int:
        return self.sam.image_encoder.img_size

    @property
    def mask_prompt_size(self) -> tuple[int, int]:
        return self.sam.prompt_encoder.mask_input_size

    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return fit_longest_side(image_size, self.image_size)

    def _encode(self, images: list[torch.Tensor]) -> torch.Tensor:
        inputs = [self.sam.preprocess(self._resize(image).float()) for image in images]
        return self.embed(torch.stack(inputs).to(self.dtype)).float()

    def embed(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the (B, C, h, w) embeddings of (B, 3, S, S) preprocessed images, both of the model's dtype."""
        return sam_encoder.encode(self.image_encoder, inputs, self._run_step)

    def _prompt_decoder(self, embeddings: torch.Tensor, prompts: Prompts) -> PromptDecoder:
        encoder = self.sam.prompt_encoder
        if prompts.masks is None:
            embeddings = embeddings + encoder.no_mask_embed.weight[:, :, None, None]
        position = encoder.get_dense_pe()
        return PromptDecoder(self.sam.mask_decoder, embeddings.to(self.dtype), position.to(self.dtype))

    def _encode_prompts(self, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor | None]:
        points = None if prompts.points is None else (prompts.points, prompts.point_labels)
        sparse, dense = self.sam.prompt_encoder(points=points, boxes=prompts.boxes, masks=prompts.masks)
        return sparse.to(self.dtype), None if prompts.masks is None else dense.to(self.dtype)

    def mask_upsampler(self, image_size: tuple[int, int]) -> MaskUpsampler:
        return MaskUpsampler(self.image_size, self.input_size(image_size), self.sam.mask_threshold)
