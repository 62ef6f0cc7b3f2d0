"""CLIP as vision-language model, at every size: its feature map and its prompts (paper, sections 3.2 and 3.3)."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from clip.model import CLIP, LayerNorm, ResidualAttentionBlock, VisionTransformer
from detectron2.config import CfgNode, configurable
from torch.nn import functional as F

from regionspot.modeling.frozen import get_dtype
from regionspot.modeling.vision_language.clip_tokenizer import ClipTokenizer
from regionspot.modeling.vision_language.vision_language_model import VISION_LANGUAGE_REGISTRY, VisionLanguageModel

# CLIP's own, RGB in [0, 1].
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
VOCAB_SIZE = 49408  # of the tokenizer that comes with CLIP


@dataclass(frozen=True)
class ClipSize:
    """What distinguishes one CLIP (with a vision transformer) from another; the defaults are ViT-B/16's."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    text_width: int = 512
    text_layers: int = 12
    embed_dim: int = 512
    context_length: int = 77


CLIP_SIZES = {
    "ViT-B/32": ClipSize(patch_size=32),
    "ViT-B/16": ClipSize(),
    "ViT-L/14": ClipSize(224, 14, 1024, 24, 768, 12, 768),
    "ViT-L/14@336px": ClipSize(336, 14, 1024, 24, 768, 12, 768),
}


def get_clip_size(cfg: CfgNode) -> ClipSize:
    """Return the size that ``cfg.MODEL.REGIONSPOT.CLIP`` names."""
    node = cfg.MODEL.REGIONSPOT.CLIP
    if node.NAME == "custom":
        size = ClipSize(**{key.lower(): value for key, value in node.CUSTOM.items()})
        for key in ("width", "text_width"):
            if asdict(size)[key] % 64:
                raise ValueError(
                    f"MODEL.REGIONSPOT.CLIP.CUSTOM.{key.upper()}: expected a multiple of 64, got {asdict(size)[key]}"
                )
        return size
    if node.NAME not in CLIP_SIZES:
        raise ValueError(
            f"MODEL.REGIONSPOT.CLIP.NAME: expected one of {', '.join(CLIP_SIZES)}, custom; got {node.NAME!r}"
        )
    return CLIP_SIZES[node.NAME]


def build_clip(size: ClipSize) -> CLIP:
    """Build a CLIP with random weights, in float32; ``logit_scale`` becomes a buffer of the same name."""
    arguments = {
        "embed_dim": size.embed_dim, "image_resolution": size.image_size, "vision_layers": size.layers,
        "vision_width": size.width, "vision_patch_size": size.patch_size, "context_length": size.context_length,
        "vocab_size": VOCAB_SIZE, "transformer_width": size.text_width, "transformer_heads": size.text_width // 64,
        "transformer_layers": size.text_layers,
    }  # fmt: skip
    if not set(arguments) <= set(inspect.signature(CLIP).parameters):  # "clip" on PyPI is another package
        raise ImportError("the package clip is not OpenAI's: install it from https://github.com/openai/CLIP")
    clip_model = CLIP(**arguments)
    scale = clip_model.logit_scale
    del clip_model.logit_scale
    clip_model.register_buffer("logit_scale", scale.detach())
    return clip_model


def run_block(block: ResidualAttentionBlock, x: torch.Tensor, is_causal: bool = False) -> torch.Tensor:
    """Return the (B, L, width) output of a transformer block; ``is_causal`` in text.

    CLIP's own forward pass has the batch second, so that attention copies all of its inputs.
    """
    attention, normed = block.attn, block.ln_1(x)
    qkv = F.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
    qkv = qkv.unflatten(2, (3, attention.num_heads, -1))
    queries, keys, values = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, D) each
    attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=is_causal)
    x = x + attention.out_proj(attended.transpose(1, 2).flatten(2))
    return x + block.mlp(block.ln_2(x))


def encode_patches(
    visual: VisionTransformer,
    images: torch.Tensor,
    run: Callable[[ResidualAttentionBlock, torch.Tensor], torch.Tensor] = run_block,
) -> torch.Tensor:
    """Return the vision transformer's output before ``ln_post``, without CLIP's output projection.

    Arguments and shape are those of ``encode_last_block``.
    """
    return encode_last_block(visual, images, run)[1]


def encode_last_block(
    visual: VisionTransformer,
    images: torch.Tensor,
    run: Callable[[ResidualAttentionBlock, torch.Tensor], torch.Tensor] = run_block,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input and output of the vision transformer's last block.

    Args:
        visual: CLIP's vision transformer.
        images: (B, 3, S, S) float, preprocessed.
        run: ``run_block``, or the same compiled.

    Returns:
        Both (B, 1 + grid^2, width), the class token first.
    """
    x = visual.conv1(images.to(visual.conv1.weight.dtype)).flatten(2).transpose(1, 2)  # (B, grid^2, width)
    x = torch.cat([visual.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
    x = visual.ln_pre(x + visual.positional_embedding.to(x.dtype))
    for block in visual.transformer.resblocks[:-1]:
        x = run(block, x)
    return x, run(visual.transformer.resblocks[-1], x)


def project_values(visual: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the dense features of ``encode_images_densely``.

    Args:
        visual: a vision transformer of CLIP or open_clip.
        x: (B, 1 + grid^2, width), the input of its last block.

    Returns:
        (B, grid^2, text_dim).
    """
    block, width = visual.transformer.resblocks[-1], x.shape[2]
    weight, bias = block.attn.in_proj_weight[2 * width :], block.attn.in_proj_bias[2 * width :]  # queries, keys, values
    attended = block.attn.out_proj(F.linear(block.ln_1(x[:, 1:]), weight, bias))
    scaled = block.ls_1(attended) if hasattr(block, "ls_1") else attended  # open_clip's
    return visual.ln_post(scaled) @ visual.proj


def _set_dtype(clip_model: CLIP, dtype: torch.dtype) -> None:
    """Convert the weights, but for those that CLIP itself uses in float32: layer norms and the logit scale."""
    if clip_model.dtype == dtype:
        return
    logit_scale = clip_model.logit_scale
    clip_model.to(dtype)
    clip_model.logit_scale = logit_scale
    for module in clip_model.modules():
        if isinstance(module, LayerNorm):
            module.float()


def encode_tokens(clip_model: CLIP, tokens: torch.Tensor) -> torch.Tensor:
    """Encode prompts, their context trimmed to the longest of them.

    The text transformer is causal, so the feature of the end-of-text token does not depend on the padding behind it.

    Args:
        clip_model: CLIP.
        tokens: (N, L) int64 with L from 1 to the context length.

    Returns:
        (N, text_dim) float, not normalized.
    """
    positions = clip_model.positional_embedding[: tokens.shape[1]]
    x = clip_model.token_embedding(tokens).type(clip_model.dtype) + positions.type(clip_model.dtype)  # (N, L, width)
    for block in clip_model.transformer.resblocks:
        x = run_block(block, x, is_causal=True)
    # end-of-text has the highest id of all tokens
    ends = x[torch.arange(len(tokens), device=tokens.device), tokens.argmax(dim=1)]
    return clip_model.ln_final(ends) @ clip_model.text_projection


@VISION_LANGUAGE_REGISTRY.register()
class ClipVisionLanguageModel(VisionLanguageModel):
    """Frozen CLIP: image -> semantic feature map. ``TextEncoder`` uses its text side."""

    @configurable
    def __init__(
        self,
        *,
        clip_model: CLIP,
        features: str = "feature_map+class_token",
        precision: str = "float32",
        compile: bool = False,
    ) -> None:
        """
        Args:
            clip_model: the model, any size, with a vision transformer.
            features: content of the feature map: "none", "feature_map" or "feature_map+class_token".
            precision: of both encoders; see ``MODEL.REGIONSPOT.PRECISION``.
            compile: compile the image encoder; see ``MODEL.REGIONSPOT.COMPILE``.
        """
        super().__init__()
        self.set_inputs(features, PIXEL_MEAN, PIXEL_STD)
        self.clip_model = clip_model
        self.context_length = clip_model.context_length
        _set_dtype(clip_model, get_dtype(precision))
        self._run_block = torch.compile(run_block) if compile else run_block
        self.freeze()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.REGIONSPOT
        return {
            "clip_model": build_clip(get_clip_size(cfg)),
            "features": node.CLIP.FEATURES,
            "precision": node.PRECISION,
            "compile": node.COMPILE,
        }

    @property
    def width(self) -> int:
        return self.clip_model.visual.conv1.out_channels

    @property
    def text_dim(self) -> int:
        return self.clip_model.text_projection.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.clip_model.dtype

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.clip_model.logit_scale

    def embed_images(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.clip_model.encode_image(inputs)

    def tokenize(self, names: Sequence[str], templates: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return ClipTokenizer(templates, self.context_length)(names)

    def encode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        return encode_tokens(self.clip_model, tokens)

    def text_weights(self) -> dict[str, torch.Tensor]:
        weights = dict(self.clip_model.named_parameters())
        return {key: x for key, x in weights.items() if not key.startswith("visual.") and key != "logit_scale"}

    def image_weights(self) -> dict[str, torch.Tensor]:
        return self.clip_model.visual.state_dict()

    @property
    def image_size(self) -> int:
        return self.clip_model.visual.input_resolution

    @torch.no_grad()
    def encode_images(self, images: list[torch.Tensor]) -> torch.Tensor | None:
        if self.features == "none":
            return None
        return self._select(encode_patches(self.clip_model.visual, self.preprocess_batch(images), self._run_block))

    @property
    def has_dense_features(self) -> bool:
        return True

    @torch.no_grad()
    def encode_images_densely(self, images: list[torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor]:
        visual, inputs = self.clip_model.visual, self.preprocess_batch(images)
        before, patches = encode_last_block(visual, inputs, self._run_block)
        feature_map = None if self.features == "none" else self._select(patches)
        return feature_map, project_values(visual, before).float()

    def _select(self, patches: torch.Tensor) -> torch.Tensor:
        """Return the configured features of (B, 1 + grid^2, width) patch tokens."""
        return (patches if self.features == "feature_map+class_token" else patches[:, 1:]).float()
