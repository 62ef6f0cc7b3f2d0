"""SAM's mask decoder as exporters can trace it: many prompts of one image, out of place, in one chunk.

The products are those of ``regionspot.modeling.localizers.sam_decoder``: what prompts share is projected once, and
later projections of each prompt's own image are moved to the few tokens.

Shapes: N prompts with T tokens each, P = h * w positions with C channels, H heads of D channels.
"""

import torch
from segment_anything.modeling import MaskDecoder
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch.nn import functional as F

from regionspot.modeling.localizers.sam_decoder import by_head, merge_heads, split_heads, upscale


def decode_prompts(
    decoder: MaskDecoder, embeddings: torch.Tensor, position: torch.Tensor, sparse: torch.Tensor, num_outputs: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the two-way transformer.

    Args:
        decoder: SAM's mask decoder.
        embeddings: (1, C, h, w) image embeddings with the embedding of "no mask".
        position: (1, C, h, w) positional encoding of an image.
        sparse: (N, T', C) embeddings of the prompts' boxes and points.
        num_outputs: how many of SAM's output tokens are needed: the IoU token, then the mask tokens.

    Returns:
        (N, num_outputs, C) output tokens, and the (N, P, C) image that masks are made of.
    """
    image, place = (x.flatten(2).transpose(1, 2) for x in (embeddings, position))  # (1, P, C)
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([outputs.expand(sparse.shape[0], -1, -1), sparse], dim=1)  # (N, T, C)
    transformer, queries = decoder.transformer, tokens
    for number, layer in enumerate(transformer.layers):
        if layer.skip_first_layer_pe:
            queries = layer.norm1(_attend_tokens(layer.self_attn, queries, queries))
        else:
            queries = layer.norm1(queries + _attend_tokens(layer.self_attn, queries + tokens, queries))
        attend = _attend_shared_image if number == 0 else _attend_image
        attended = attend(layer.cross_attn_token_to_image, queries + tokens, image, place)
        queries = layer.norm2(queries + attended)
        queries = layer.norm3(queries + layer.mlp(queries))
        image = _update_image(layer, queries + tokens, queries, image, place)  # (N, P, C) from the first layer on
    queries, tokens = queries[:, :num_outputs], tokens[:, :num_outputs]
    attended = _attend_image(transformer.final_attn_token_to_image, queries + tokens, image, place)
    return transformer.norm_final_attn(queries + attended), image


def predict_masks(decoder: MaskDecoder, image: torch.Tensor, kernels: torch.Tensor, side: int) -> torch.Tensor:
    """Return the (N, 4h, 4w) mask logits of (N, P, C) images by (N, C / 8) kernels; h and w are ``side``.

    A transposed convolution whose stride is its kernel size is a linear layer with 2 x 2 outputs a position.
    """
    first, norm, activation, second, last_activation = decoder.output_upscaling
    x = upscale(first, image)  # (N, P, 2, 2, C / 4)
    x = activation(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
    x = last_activation(upscale(second, x)).flatten(1, -2)  # (N, P * 16, C / 8)
    logits = (x @ kernels[..., None])[..., 0].unflatten(1, (side, side, 2, 2, 2, 2))  # h, w, then y, x twice
    return logits.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)


def _attend_shared_image(
    attention: Attention, tokens: torch.Tensor, image: torch.Tensor, place: torch.Tensor
) -> torch.Tensor:
    """Cross-attention of (N, T, C) tokens to the (1, P, C) image of all prompts."""
    queries = split_heads(attention, attention.q_proj(tokens))  # (N, H, T, D)
    keys = split_heads(attention, attention.k_proj(image + place))  # (1, H, P, D)
    values = split_heads(attention, attention.v_proj(image))
    weights = (_scale(queries) @ keys.transpose(2, 3)).softmax(dim=-1)
    return attention.out_proj(merge_heads(weights @ values))


def _attend_image(attention: Attention, tokens: torch.Tensor, image: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Cross-attention of (N, T, C) tokens to the (N, P, C) image of each prompt."""
    queries = split_heads(attention, attention.q_proj(tokens))
    # the keys' bias adds the same to all scores of a token
    projected = _scale(queries) @ by_head(attention, attention.k_proj.weight)  # (N, H, T, C)
    scores = projected.flatten(1, 2) @ (image + place).transpose(1, 2)  # (N, H * T, P)
    attended = (scores.softmax(dim=-1) @ image).unflatten(1, (attention.num_heads, -1))  # (N, H, T, C)
    values = attended @ by_head(attention, attention.v_proj.weight).transpose(1, 2)  # (N, H, T, D)
    return attention.out_proj(merge_heads(values) + attention.v_proj.bias)


def _update_image(
    layer: TwoWayAttentionBlock, keys: torch.Tensor, values: torch.Tensor, image: torch.Tensor, place: torch.Tensor
) -> torch.Tensor:
    """Return the (N, P, C) image, or that of all prompts, plus its cross-attention to (N, T, C) tokens, normalized."""
    attention = layer.cross_attn_image_to_token
    keys = _scale(split_heads(attention, attention.k_proj(keys)))  # (N, H, T, D)
    weight, bias = (by_head(attention, x) for x in (attention.q_proj.weight, attention.q_proj.bias))
    projected = (keys @ weight).flatten(1, 2)  # (N, H * T, C)
    scores = projected @ (image + place).transpose(1, 2) + (keys @ bias[..., None]).flatten(1, 2)
    weights = scores.unflatten(1, (attention.num_heads, -1)).softmax(dim=2)  # over the tokens; (N, H, T, P)
    values = split_heads(attention, attention.v_proj(values))  # (N, H, T, D)
    # what a token adds to a position that attends to it alone: (N, H, T, C)
    updates = values @ by_head(attention, attention.out_proj.weight.t())
    change = weights.flatten(1, 2).transpose(1, 2) @ updates.flatten(1, 2)
    return layer.norm4(image + change + attention.out_proj.bias)


def _attend_tokens(attention: Attention, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Self-attention of (N, T, C) tokens; the keys are the queries, too."""
    queries, keys, values = (
        split_heads(attention, projection(x))
        for projection, x in ((attention.q_proj, keys), (attention.k_proj, keys), (attention.v_proj, values))
    )
    return attention.out_proj(merge_heads((_scale(queries) @ keys.transpose(2, 3)).softmax(dim=-1) @ values))


def _scale(queries: torch.Tensor) -> torch.Tensor:
    return queries * queries.shape[-1] ** -0.5
