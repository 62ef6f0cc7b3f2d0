"""open_clip's models as vision-language models: OpenCLIP, DFN, MetaCLIP, EVA-CLIP, SigLIP, SigLIP 2."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable

from regionspot.modeling.frozen import get_dtype
from regionspot.modeling.vision_language.clip import project_values
from regionspot.modeling.vision_language.clip_tokenizer import ClipTokenizer
from regionspot.modeling.vision_language.open_clip_models import (
    NAME,
    OpenClipConfig,
    build_open_clip,
    read_open_clip_config,
)
from regionspot.modeling.vision_language.open_clip_text import FileTokenizer, can_trim, encode_trimmed, text_tower
from regionspot.modeling.vision_language.vision_language_model import VISION_LANGUAGE_REGISTRY, VisionLanguageModel

_TEXT = ("text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")
_SCALARS = ("logit_scale", "logit_bias")


def encode_patches(visual: Any, images: torch.Tensor, with_class_token: bool) -> torch.Tensor:
    """Return the output of the last transformer block, before the final norm and without any projection.

    Args:
        visual: open_clip's vision transformer, or one of timm inside ``TimmModel``.
        images: (B, 3, S, S), preprocessed.
        with_class_token: put the class token first; of a model without one, the pooled output.

    Returns:
        (B, L, width), L = grid^2 or 1 + grid^2.
    """
    if not hasattr(visual, "trunk"):
        [x] = _run_last_blocks(visual, images, 1)
        return x if with_class_token else x[:, 1:]
    options = {"indices": 1, "output_fmt": "NLC"}  # of the last block
    if has_class_token(visual):
        options |= {"intermediates_only": True, "return_prefix_tokens": True}
        [(patches, prefix)] = visual.trunk.forward_intermediates(images, **options)  # register tokens come second
    else:
        normed, [patches] = visual.trunk.forward_intermediates(images, **options)
        if not with_class_token:
            return patches
        prefix = visual.trunk.forward_head(normed, pre_logits=True)[:, None]
    return torch.cat([prefix[:, :1], patches], dim=1) if with_class_token else patches


def encode_densely(visual: Any, images: torch.Tensor, with_class_token: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ``encode_patches`` does, and dense features; of open_clip's own vision transformers alone."""
    before, x = _run_last_blocks(visual, images, 2)
    return x if with_class_token else x[:, 1:], project_values(visual, before)


def _run_last_blocks(visual: Any, images: torch.Tensor, number: int) -> list[torch.Tensor]:
    """Return the (B, 1 + grid^2, width) outputs of the last blocks."""
    output = visual.forward_intermediates(
        images, indices=number, intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
    )
    pairs = zip(output["image_intermediates_prefix"], output["image_intermediates"], strict=True)
    return [torch.cat(pair, dim=1) for pair in pairs]


def has_class_token(visual: Any) -> bool:
    """Return whether the tokens of an image encoder begin with a class token."""
    return not hasattr(visual, "trunk") or visual.trunk.cls_token is not None


def _set_dtype(clip_model: Any, dtype: torch.dtype) -> None:
    """Convert the weights, but for those that compute in float32: open_clip's layer norms, logit scale and bias."""
    if dtype == torch.float32:
        return
    from open_clip.transformer import LayerNormFp32

    norms = [module for module in clip_model.modules() if isinstance(module, LayerNormFp32)]
    kept = {id(x) for norm in norms for x in norm.parameters()} | {id(getattr(clip_model, key)) for key in _SCALARS}
    for x in (*clip_model.parameters(), *clip_model.buffers()):
        if x.is_floating_point() and id(x) not in kept:
            x.data = x.data.to(dtype)


@VISION_LANGUAGE_REGISTRY.register()
class OpenClipVisionLanguageModel(VisionLanguageModel):
    """A frozen model of open_clip with a vision transformer, open_clip's own or timm's.

    The feature map is the patch tokens before the final norm, as that of ``ClipVisionLanguageModel``. SigLIP has no
    class token: in "feature_map+class_token" the output of its attention pooling, which has the same width, stands for
    it.
    """

    @configurable
    def __init__(
        self,
        *,
        clip_model: Any,
        config: OpenClipConfig,
        features: str = "feature_map+class_token",
        precision: str = "float32",
        compile: bool = False,
    ) -> None:
        """
        Args:
            clip_model: of ``build_open_clip``.
            config: the model's.
            features: content of the feature map: "none", "feature_map" or "feature_map+class_token".
            precision: of both encoders; see ``MODEL.REGIONSPOT.PRECISION``.
            compile: compile the image encoder; see ``MODEL.REGIONSPOT.COMPILE``.

        Raises:
            ValueError: a class token is wanted of a model that has none, nor pools its tokens.
        """
        super().__init__()
        self.set_inputs(features, config.mean, config.std)
        visual = clip_model.visual
        if features == "feature_map+class_token" and not has_class_token(visual) and not visual.trunk.global_pool:
            raise ValueError(f"{NAME}: {config.name} has no class token; set CLIP.FEATURES to feature_map or none")
        self.clip_model, self.config = clip_model, config
        self.context_length = clip_model.context_length
        options = config.model["text_cfg"].get("tokenizer_kwargs") or {}
        self._tokenizer = FileTokenizer(config.tokenizer, self.context_length, **options) if config.tokenizer else None
        self._trims = can_trim(clip_model)
        _set_dtype(clip_model, get_dtype(precision))
        self._encode = torch.compile(encode_patches) if compile else encode_patches
        self._encode_densely = torch.compile(encode_densely) if compile else encode_densely
        self.freeze()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.REGIONSPOT
        config = read_open_clip_config(node.CLIP.NAME, node.CLIP.WEIGHTS)
        return {
            "clip_model": build_open_clip(config, get_dtype(node.PRECISION)),
            "config": config,
            "features": node.CLIP.FEATURES,
            "precision": node.PRECISION,
            "compile": node.COMPILE,
        }

    @property
    def width(self) -> int:
        visual = self.clip_model.visual
        return visual.trunk.embed_dim if hasattr(visual, "trunk") else visual.conv1.out_channels

    @property
    def text_dim(self) -> int:
        return self.config.model["embed_dim"]

    @property
    def dtype(self) -> torch.dtype:
        return text_tower(self.clip_model).token_embedding.weight.dtype

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.clip_model.logit_scale.squeeze()

    @property
    def logit_bias(self) -> torch.Tensor | None:
        bias = self.clip_model.logit_bias
        return None if bias is None else bias.squeeze()

    @property
    def image_size(self) -> int:
        return self.clip_model.visual.image_size[0]

    @torch.no_grad()
    def encode_images(self, images: list[torch.Tensor]) -> torch.Tensor | None:
        if self.features == "none":
            return None
        inputs = self.preprocess_batch(images).to(self.dtype)
        return self._encode(self.clip_model.visual, inputs, self.features == "feature_map+class_token").float()

    @property
    def has_dense_features(self) -> bool:
        """Whether it is open_clip's own vision transformer, and does not pool its patches by attention."""
        visual = self.clip_model.visual
        if hasattr(visual, "trunk") or visual.attn_pool is not None or visual.proj is None:
            return False
        blocks = visual.transformer.resblocks
        return len(blocks) > 1 and type(blocks[-1]).__name__ == "ResidualAttentionBlock"  # no custom one

    @torch.no_grad()
    def encode_images_densely(self, images: list[torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor]:
        inputs = self.preprocess_batch(images).to(self.dtype)
        with_class_token = self.features == "feature_map+class_token"
        patches, dense = self._encode_densely(self.clip_model.visual, inputs, with_class_token)
        return None if self.features == "none" else patches.float(), dense.float()

    def embed_images(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.clip_model.encode_image(inputs.to(self.dtype))

    def tokenize(self, names: Sequence[str], templates: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        if self._tokenizer is None:
            tokens, lengths = ClipTokenizer(templates, self.context_length)(names)
        else:
            tokens, lengths = self._tokenizer(names, templates)
        # SigLIP attends to the padding, too
        return tokens, lengths if self._trims else torch.full_like(lengths, self.context_length)

    def encode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        return encode_trimmed(self.clip_model, tokens) if self._trims else self.clip_model.encode_text(tokens)

    def text_weights(self) -> dict[str, torch.Tensor]:
        weights = dict(self.clip_model.named_parameters())
        return {key: x for key, x in weights.items() if not key.startswith("visual.") and key not in _SCALARS}

    def image_weights(self) -> dict[str, torch.Tensor]:
        return self.clip_model.visual.state_dict()

    @property
    def text_setup(self) -> str:
        tokenizer = "clip" if self._tokenizer is None else self._tokenizer.fingerprint
        return f"{self.config.describe('text_cfg')} {tokenizer}"

    @property
    def image_setup(self) -> str:
        return f"{self.config.describe('vision_cfg')} {json.dumps([self.config.mean, self.config.std])}"

    def rename_official_keys(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Adapt files in OpenAI's layout, which has no ``text.``, and scalars that are (1,) or () in a file."""
        own, has_text = self.clip_model.state_dict(), hasattr(self.clip_model, "text")
        renamed = {f"text.{key}" if has_text and key.startswith(_TEXT) else key: x for key, x in state.items()}
        scalars = {key: renamed[key].reshape(own[key].shape) for key in _SCALARS if key in renamed and key in own}
        return {**renamed, **scalars}
