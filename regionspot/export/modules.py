"""The recognizer's parts as exporters can trace them: tensors in, tensors out, any numbers of regions and names.

They run the recognizer's own modules. Only what a trace cannot follow is written differently: SAM's attention by rows
and its decoder by chunks, which write in place, the groups of several images, and point embeddings set by indexing.
"""

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from segment_anything.modeling.image_encoder import (
    Attention,
    Block,
    ImageEncoderViT,
    get_rel_pos,
    window_partition,
    window_unpartition,
)
from torch import nn
from torch.nn import functional as F

from regionspot.export.prompt_decoder import decode_prompts, predict_masks
from regionspot.modeling.knowledge_integration import residual
from regionspot.modeling.localizers import sam_encoder
from regionspot.modeling.localizers.sam import SamLocalizer
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.modeling.vision_language.clip import ClipVisionLanguageModel, LayerNorm, encode_patches

# A head's attention matrix with more entries is made alone: SAM's 4096 x 4096 of 12 heads would be 0.8 GB at once.
MAX_MATRIX = 1 << 20
Module = TypeVar("Module", bound=nn.Module)


class ImageEncoders(nn.Module):
    """SAM's and CLIP's image encoders: one image, preprocessed, to what all of its regions share."""

    def __init__(self, recognizer: RegionRecognizer, dtype: torch.dtype) -> None:
        """Copy both encoders, as ``dtype``, to the CPU."""
        super().__init__()
        localizer, vision_language = parts_of(recognizer)
        self.dtype, self.features = dtype, vision_language.features
        self.sam_encoder = as_dtype(localizer.sam.image_encoder, dtype)
        self.visual = as_dtype(vision_language.clip_model.visual, dtype) if self.features != "none" else None

    def forward(self, sam_image: torch.Tensor, clip_image: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Encode an image.

        Args:
            sam_image: (1, 3, S, S) float32, normalized, and padded by zeros to the right and below.
            clip_image: (1, 3, s, s) float32, normalized; not with ``CLIP.FEATURES`` none.

        Returns:
            (1, C, h, w) float32 image embeddings and (1, L, width) float32 feature map.
        """
        embeddings = sam_encoder.encode(self.sam_encoder, sam_image.to(self.dtype), run_block).float()
        if self.visual is None:
            return (embeddings,)
        assert clip_image is not None
        patches = encode_patches(self.visual, clip_image).float()
        return embeddings, patches if self.features == "feature_map+class_token" else patches[:, 1:]


class RegionDecoder(nn.Module):
    """SAM's prompt encoder and mask decoder: points and corners of boxes to position-aware tokens and masks."""

    position: torch.Tensor
    no_mask: torch.Tensor

    def __init__(self, recognizer: RegionRecognizer, dtype: torch.dtype) -> None:
        """Copy SAM's prompt encoder in float32, as coordinates need it, and its mask decoder as ``dtype``."""
        super().__init__()
        localizer, _ = parts_of(recognizer)
        prompt_encoder = localizer.sam.prompt_encoder
        self.dtype, self.multimask, self.token_stage = dtype, localizer.multimask, localizer.token_stage
        self.image_size = localizer.image_size
        self.decoder = as_dtype(localizer.sam.mask_decoder, dtype)
        self.point_encoding = as_dtype(prompt_encoder.pe_layer, torch.float32)
        # by label + 1: padding, background, foreground, and a box's first and second corner
        table = [prompt_encoder.not_a_point_embed.weight, *(x.weight for x in prompt_encoder.point_embeddings)]
        self.label_embeddings = nn.Embedding.from_pretrained(torch.cat(table).detach().float().cpu().clone())
        self.register_buffer("position", prompt_encoder.get_dense_pe().detach().to("cpu", dtype))
        self.register_buffer("no_mask", prompt_encoder.no_mask_embed.weight.detach().float().cpu()[:, :, None, None])

    def forward(
        self, image_embeddings: torch.Tensor, point_coords: torch.Tensor, point_labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decode N regions of an image; points and labels are those of SAM's own ONNX export.

        Args:
            image_embeddings: (1, C, h, w) float32.
            point_coords: (N, P, 2) float32, XY, pixels of SAM's input.
            point_labels: (N, P) int64: 1 foreground, 0 background, 2 and 3 the corners x0, y0 and x1, y1 of a box, -1
                padding. SAM pads regions without a box by one point.

        Returns:
            (N, D) position-aware tokens, (N,) estimated IoUs and (N, 4h, 4w) mask logits over SAM's input; float32.
        """
        sparse = self._encode_points(point_coords, point_labels)  # (N, P, C), float32
        embeddings = (image_embeddings + self.no_mask).to(self.dtype)
        num_outputs = 1 + (self.decoder.num_mask_tokens if self.multimask else 1)
        hidden, image = decode_prompts(self.decoder, embeddings, self.position, sparse.to(self.dtype), num_outputs)
        ious = self.decoder.iou_prediction_head(hidden[:, 0])  # (N, M)
        mlps = self.decoder.output_hypernetworks_mlps
        if self.multimask:
            best = 1 + ious[:, 1:].argmax(dim=1, keepdim=True)  # (N, 1)
            mask_tokens = _take(hidden[:, 1:], best)
            kernels = _take(torch.stack([mlp(hidden[:, 1 + i]) for i, mlp in enumerate(mlps)], dim=1), best)
            iou = ious.gather(1, best)[:, 0]
        else:
            mask_tokens, iou = hidden[:, 1], ious[:, 0]
            kernels = mlps[0](mask_tokens)  # (N, C / 8)
        masks = predict_masks(self.decoder, image, kernels, embeddings.shape[-1])
        if self.token_stage == "prompt_encoder":
            is_point = (point_labels >= 0).float()[..., None]  # (N, P, 1)
            tokens = (sparse * is_point).sum(dim=1) / is_point.sum(dim=1).clamp(min=1)
        else:
            tokens = mask_tokens if self.token_stage == "transformer" else kernels
        return tokens.float(), iou.float(), masks.float()

    def _encode_points(self, coords: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        size = (self.image_size, self.image_size)
        position = self.point_encoding.forward_with_coords(coords + 0.5, size)  # to the center of the pixel
        return position * (labels != -1).float()[..., None] + self.label_embeddings(labels + 1)


class RegionClassifier(nn.Module):
    """Knowledge integration and classifier: position-aware tokens to logits (paper, sections 3.3 and 3.4)."""

    logit_scale: torch.Tensor

    def __init__(self, recognizer: RegionRecognizer, dtype: torch.dtype) -> None:
        """Copy the trained module as ``dtype``; the classifier is in float32."""
        super().__init__()
        self.dtype = dtype
        self.integration = as_dtype(recognizer.knowledge_integration, dtype)
        for layer in self.integration.decoder.layers:
            layer.residual = residual  # type: ignore[assignment]  # not compiled
        scale = recognizer.vision_language.logit_scale.detach().float().exp().cpu()
        self.register_buffer("logit_scale", scale)

    def forward(
        self, tokens: torch.Tensor, text_embeddings: torch.Tensor, feature_map: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Classify the N regions of an image, which attend to each other: all of them together.

        Args:
            tokens: (N, D) float32, ``RegionDecoder``'s.
            text_embeddings: (K, text_dim) float32, as ``RegionRecognizer.encode_vocabulary`` returns them.
            feature_map: (1, L, width) float32; not with ``CLIP.FEATURES`` none.

        Returns:
            (N, K) logits, and (N, text_dim) semantic embeddings, L2-normalized; float32.
        """
        integration, features = self.integration, None if feature_map is None else feature_map.to(self.dtype)
        decoded = integration.decoder(integration.to_clip(tokens.to(self.dtype)), OneImage(), features)
        semantic = integration.projector(decoded).float()
        semantic = semantic / (semantic.norm(dim=1, keepdim=True) + 1e-7)  # as in the released models
        return self.logit_scale * semantic @ text_embeddings.t(), semantic


class OneImage:
    """``RegionGroups`` of a single image: nothing is padded, whatever its number of regions is."""

    masks = (None,)
    longest = 1 << 62  # the feature map is projected, which costs little in one image

    def pad(self, regions: torch.Tensor) -> list[torch.Tensor]:
        return [regions[None]]

    def unpad(self, padded: Sequence[torch.Tensor]) -> torch.Tensor:
        return padded[0][0]

    def select(self, x: torch.Tensor, group: int) -> torch.Tensor:
        return x


def parts_of(recognizer: RegionRecognizer) -> tuple[SamLocalizer, ClipVisionLanguageModel]:
    """Return the frozen parts of a recognizer.

    Raises:
        ValueError: what has no export form: a baseline, parts other than SAM and CLIP, mask pooling, an ensemble.
    """
    localizer, vision_language = recognizer.localizer, recognizer.vision_language
    if type(recognizer) is not RegionRecognizer:
        raise ValueError(f"export: expected a RegionRecognizer, got {type(recognizer).__name__}")
    if not isinstance(localizer, SamLocalizer) or not isinstance(vision_language, ClipVisionLanguageModel):
        kinds = f"{type(localizer).__name__} and {type(vision_language).__name__}"
        raise ValueError(f"export: expected SAM and CLIP as the frozen parts, got {kinds}")
    if recognizer.knowledge_integration.mask_pooling:
        raise ValueError("export: MODEL.REGIONSPOT.INTEGRATION.MASK_POOLING has no export form")
    if recognizer.ensemble is not None:
        raise ValueError("export: MODEL.REGIONSPOT.GEOMETRIC_ENSEMBLE has no export form; export with ALPHA and BETA 0")
    if not isinstance(localizer.sam.image_encoder, ImageEncoderViT):
        raise ValueError(f"export: expected SAM's own image encoder, got that of {type(localizer).__name__}")
    return localizer, vision_language


def as_dtype(module: Module, dtype: torch.dtype) -> Module:
    """Return a copy on the CPU in eval mode; CLIP's layer norms, which compute in float32, stay in it."""
    copied = copy.deepcopy(module).to("cpu", dtype).eval().requires_grad_(False)
    for part in copied.modules():
        if isinstance(part, LayerNorm):
            part.float()
    return copied


def run_block(block: Block, x: torch.Tensor) -> torch.Tensor:
    """Return the (B, h, w, width) output of one of SAM's transformer blocks, as ``sam_encoder.run_block``."""
    size, normed = (x.shape[1], x.shape[2]), block.norm1(x)
    if block.window_size > 0:
        normed, padded_size = window_partition(normed, block.window_size)
    attended = _attend(block.attn, normed)
    if block.window_size > 0:
        attended = window_unpartition(attended, block.window_size, padded_size, size)
    x = x + attended
    return x + block.mlp(block.norm2(x))


def _attend(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """Attend among the positions of (B, H, W, width)."""
    height, width = x.shape[1:3]
    qkv = attention.qkv(x).flatten(1, 2).unflatten(2, (3, attention.num_heads, -1))  # (B, H * W, 3, heads, D)
    qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, heads, H * W, D)
    are_large = height * width * height * width > MAX_MATRIX
    heads = qkv.split(1, dim=2) if are_large else [qkv]
    positions = None
    if attention.use_rel_pos:  # (H, H, D) and (W, W, D), once for all heads
        sides = ((height, attention.rel_pos_h), (width, attention.rel_pos_w))
        positions = [get_rel_pos(side, side, embeddings) for side, embeddings in sides]
    attended = torch.cat([_attend_heads(attention, part, (height, width), positions) for part in heads], dim=1)
    return attention.proj(attended.transpose(1, 2).flatten(2).unflatten(1, (height, width)))


def _attend_heads(
    attention: Attention, qkv: torch.Tensor, size: tuple[int, int], positions: Sequence[torch.Tensor] | None
) -> torch.Tensor:
    """Return (B, n, H * W, D) of (3, B, n, H * W, D): the queries, keys and values of n heads."""
    queries, keys, values = qkv
    scores = (queries * attention.scale) @ keys.transpose(2, 3)  # (B, n, H * W, H * W)
    if positions is not None:
        grid = queries.unflatten(2, size)  # (B, n, H, W, D)
        rel_h = grid @ positions[0].transpose(1, 2)  # (B, n, H, W, H)
        rel_w = (grid.transpose(2, 3) @ positions[1].transpose(1, 2)).transpose(2, 3)  # (B, n, H, W, W)
        scores = scores.unflatten(3, size).unflatten(2, size)
        scores = (scores + rel_h[..., None] + rel_w[..., None, :]).flatten(4, 5).flatten(2, 3)
    return F.softmax(scores, dim=-1) @ values


def _take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return (N, C) of (N, M, C) by (N, 1) int64 indices into M."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))[:, 0]
