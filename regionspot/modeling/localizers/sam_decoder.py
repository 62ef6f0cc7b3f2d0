"""SAM's mask decoder for many prompts: ``segment_anything``'s modules and numbers, a fifth of the work.

Two things make it cheap. Until the image is first updated all of its prompts share it, so that its keys, values and
queries are computed once. After that each prompt has an image of its own, whose projections would cost more than all
else. They are moved to the other side of the product, to the few tokens: ``(t Wq) (x Wk)^T = ((t Wq) Wk^T) x^T`` for
the scores, and ``a (x Wv) = (a x) Wv`` for the values.

Shapes: B images of P = h * w positions with C channels, N prompts with T tokens each, H heads of D channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from segment_anything.modeling import MaskDecoder
from segment_anything.modeling.transformer import Attention, TwoWayAttentionBlock
from torch import nn
from torch.nn import functional as F

PART_BYTES = 1 << 20  # of the images that a CPU works on at once


@dataclass(frozen=True)
class UpdatedPrompts:
    """N prompts behind the two-way layers, before the final attention.

    Attributes:
        tokens: (N, T, C) the output tokens and the prompts', as they began.
        queries: (N, T, C) what became of them.
        image: (N, P, C) that masks are made of.
        owners: (N,) int64, the image of each prompt, for decoders whose masks need more of it; else None.
    """

    tokens: torch.Tensor
    queries: torch.Tensor
    image: torch.Tensor
    owners: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: torch.Tensor | slice) -> "UpdatedPrompts":
        owners = None if self.owners is None else self.owners[rows]
        return UpdatedPrompts(self.tokens[rows], self.queries[rows], self.image[rows], owners)


class PromptDecoder:
    """Decodes prompts of images, in as many calls as memory asks for; it keeps what the prompts of an image share."""

    def __init__(self, decoder: MaskDecoder, embeddings: torch.Tensor, position: torch.Tensor) -> None:
        """
        Args:
            decoder: SAM's mask decoder.
            embeddings: (B, C, h, w) image embeddings; with the embedding of "no mask" where prompts have none.
            position: (1, C, h, w) positional encoding of an image.
        """
        self.decoder = decoder
        self.side = embeddings.shape[-1]
        self.image = embeddings.flatten(2).transpose(1, 2).contiguous()  # (B, P, C)
        self.position = position.flatten(2).transpose(1, 2).contiguous()  # (1, P, C)
        self._projections: dict[nn.Linear, torch.Tensor] = {}
        if self.image.device.type == "cpu":
            _keep_freed_memory()

    @property
    def output_tokens(self) -> torch.Tensor:
        """(O, C) tokens in front of the prompts': the IoU token, then the mask tokens, and others that a family has."""
        return torch.cat([self.decoder.iou_token.weight, self.decoder.mask_tokens.weight])

    @torch.no_grad()
    def update(self, sparse: torch.Tensor, dense: torch.Tensor | None, counts: Sequence[int] = ()) -> UpdatedPrompts:
        """Run the two-way layers of the transformer.

        Args:
            sparse: (N, T', C) embeddings of the prompts' boxes and points.
            dense: (N, C, h, w) embeddings of the prompts' masks; None in all calls if there are none.
            counts: how many of the prompts, which are in the order of the B images, belong to each; for one image not
                needed.
        """
        counts = counts or [len(sparse)]
        queries = tokens = torch.cat([self.output_tokens.expand(len(sparse), -1, -1), sparse], dim=1)  # (N, T, C)
        image, shared_by = self.image, counts if dense is None else None  # (B, P, C)
        if dense is not None:
            image = _repeat(image, counts) + dense.flatten(2).transpose(1, 2)  # (N, P, C)
        for layer in self.decoder.transformer.layers:
            if layer.skip_first_layer_pe:
                queries = layer.norm1(_attend_tokens(layer.self_attn, queries, queries))
            else:
                queries = layer.norm1(queries + _attend_tokens(layer.self_attn, queries + tokens, queries))
            attended = self._attend_image(layer.cross_attn_token_to_image, queries + tokens, image, shared_by)
            queries = layer.norm2(queries + attended)
            queries = layer.norm3(queries + layer.mlp(queries))
            image = self._update_image(layer, queries + tokens, queries, image, shared_by)
            shared_by = None
        return UpdatedPrompts(tokens, queries, image)

    def read(self, prompts: UpdatedPrompts, outputs: slice) -> torch.Tensor:
        """Run the final attention for the output tokens that are needed; 0 is the IoU token, then come the mask tokens.

        Returns:
            (N, O, C) output tokens.
        """
        transformer, image = self.decoder.transformer, prompts.image
        queries, tokens = prompts.queries[:, outputs], prompts.tokens[:, outputs]
        attended = self._attend_image(transformer.final_attn_token_to_image, queries + tokens, image, None)
        return transformer.norm_final_attn(queries + attended)

    def predict_masks(self, prompts: UpdatedPrompts, kernels: torch.Tensor) -> torch.Tensor:
        """Upscale the image and apply M kernels for each prompt.

        A transposed convolution whose stride is its kernel size is a linear layer with 2 x 2 outputs a position. They
        stay beside the channels until one channel is left, so that nothing large is moved around.

        Args:
            prompts: as ``update`` returns them.
            kernels: (N, M, C / 8), from the hypernetwork MLPs.

        Returns:
            (N, M, 4h, 4w) mask logits, float32 at least.
        """
        first, norm, activation, second, last_activation = self.decoder.output_upscaling
        x = upscale(first, prompts.image)  # (N, P, 2, 2, C / 4)
        x = activation(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
        x = last_activation(upscale(second, x))  # (N, P, 2, 2, 2, 2, C / 8)
        logits = x.flatten(1, -2) @ kernels.transpose(1, 2)  # (N, P * 16, M); kernels first would copy x in bf16
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.transpose(1, 2).to(dtype).contiguous()  # (N, M, P * 16)
        # h, w, then y, x in the 2 x 2, in that again; the last two x stay together: as one number they move faster
        pairs = torch.view_as_complex(logits.unflatten(2, (-1, self.side, 2, 2, 2, 2)))  # (N, M, h, w, 2, 2, 2)
        return torch.view_as_real(pairs.permute(0, 1, 2, 4, 6, 3, 5).contiguous()).flatten(5).flatten(2, 4)

    def _attend_image(
        self, attention: Attention, tokens: torch.Tensor, image: torch.Tensor, shared_by: Sequence[int] | None
    ) -> torch.Tensor:
        """Cross-attention of (N, T, C) tokens to the image: (N, P, C), or (B, P, C) that prompts share, by counts."""
        queries = split_heads(attention, attention.q_proj(tokens))  # (N, H, T, D)
        if shared_by is not None:
            keys = self._project_once(attention, attention.k_proj, image + self.position)  # (B, H, P, D)
            values = self._project_once(attention, attention.v_proj, image)

            def attend(together: torch.Tensor, i: int) -> torch.Tensor:
                return F.scaled_dot_product_attention(together[None], keys[i : i + 1], values[i : i + 1])[0]

            return attention.out_proj(merge_heads(_for_each_image(attend, queries, shared_by)))
        queries = queries * queries.shape[-1] ** -0.5
        # the keys' bias adds the same to all scores of a token; (N, H * T, C)
        projected = _multiply_heads(queries, by_head(attention, attention.k_proj.weight)).flatten(1, 2)
        attended = torch.empty_like(projected)
        for part in self._parts(image):
            placed = image[part] + self.position
            scores = torch.bmm(projected[part], placed.transpose(1, 2))  # (n, H * T, P); @ would copy one image
            attended[part] = torch.bmm(scores.softmax(dim=-1), image[part])
        value_weight = by_head(attention, attention.v_proj.weight).transpose(1, 2)  # (H, C, D)
        attended = _multiply_heads(attended.unflatten(1, queries.shape[1:3]), value_weight)  # (N, H, T, D)
        return attention.out_proj(merge_heads(attended) + attention.v_proj.bias)

    def _update_image(
        self,
        layer: TwoWayAttentionBlock,
        keys: torch.Tensor,
        values: torch.Tensor,
        image: torch.Tensor,
        shared_by: Sequence[int] | None,
    ) -> torch.Tensor:
        """Return the (N, P, C) image plus its cross-attention to tokens, (N, T, C) ``keys`` and ``values``, and norm.

        An image that prompts do not share is overwritten.
        """
        attention = layer.cross_attn_image_to_token
        keys = split_heads(attention, attention.k_proj(keys))  # (N, H, T, D)
        keys = keys * keys.shape[-1] ** -0.5
        updates = _token_updates(attention, values).flatten(1, 2)  # (N, H * T, C)
        if shared_by is not None:
            shared = self._project_once(attention, attention.q_proj, image + self.position).transpose(2, 3)
            all_scores = _for_each_image(lambda together, i: together @ shared[i], keys, shared_by)  # (N, H, T, P)
            base, image = _repeat(image, shared_by), image.new_empty(len(keys), *image.shape[1:])
        else:
            projected = _multiply_heads(keys, by_head(attention, attention.q_proj.weight)).flatten(1, 2)
            bias = (keys @ by_head(attention, attention.q_proj.bias)[..., None]).flatten(1, 2)  # (N, H * T, 1)
            base = image
        for part in self._parts(image):
            if shared_by is not None:
                scores = all_scores[part]
            else:
                placed = image[part] + self.position
                scores = torch.baddbmm(bias[part], projected[part], placed.transpose(1, 2))  # (n, H * T, P)
                scores = scores.unflatten(1, keys.shape[1:3])
                del placed  # its memory is used again
            weights = scores.softmax(dim=2).flatten(1, 2)  # how much each position attends to each token
            image[part] = layer.norm4(torch.baddbmm(base[part], weights.transpose(1, 2), updates[part]))
        return image

    def _parts(self, image: torch.Tensor) -> list[slice]:
        """Split (N, P, C) so that the images of a part stay in a CPU's cache; other devices take all at once."""
        size = max(PART_BYTES // image[0].nbytes, 1) if image.device.type == "cpu" else len(image)
        return [slice(i, i + size) for i in range(0, len(image), size)]

    def _project_once(self, attention: Attention, projection: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        """Return the (B, H, P, D) projection of what all prompts share; the first call computes it."""
        if projection not in self._projections:
            self._projections[projection] = split_heads(attention, projection(x))
        return self._projections[projection]


def _keep_freed_memory() -> None:
    """Let the C library keep up to 64 MB of freed memory for the next chunk of prompts: fresh pages take half the time.

    glibc gives memory back once twice the largest block that it has freed so far is free, of those up to 32 MB. This
    one is never written, so that it takes no memory.
    """
    torch.empty((1 << 25) - (1 << 16), dtype=torch.uint8)


def _token_updates(attention: Attention, values: torch.Tensor) -> torch.Tensor:
    """Return (N, H, T, C): what each of (N, T, C) tokens adds to a position that attends to it alone, by head."""
    values = split_heads(attention, attention.v_proj(values))  # (N, H, T, D)
    updates = _multiply_heads(values, by_head(attention, attention.out_proj.weight.t()))
    updates[:, 0] += attention.out_proj.bias  # added once: a head's weights sum to 1
    return updates


def by_head(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """Give each head its rows: (H * D, ...) to (H, D, ...)."""
    return x.unflatten(0, (attention.num_heads, -1))


def _multiply_heads(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply (N, H, T, X) with each head's (H, X, Y), one product a head: (N, H, T, Y)."""
    return _for_each_image(lambda together, _: together @ weight, x, [len(x)])


def _for_each_image(
    function: Callable[[torch.Tensor, int], torch.Tensor], tokens: torch.Tensor, counts: Sequence[int]
) -> torch.Tensor:
    """Apply a function to the tokens of each image's prompts together: one large product, not many small ones.

    Args:
        function: from (H, n * T, D) tokens, and the number of their image, to (H, n * T, X).
        tokens: (N, H, T, D), in the order of the images.
        counts: n of each image.

    Returns:
        (N, H, T, X).
    """
    results = []
    for i, part in enumerate(tokens.split(list(counts))):
        if len(part):
            result = function(part.transpose(0, 1).flatten(1, 2), i)  # (H, n * T, X)
            results.append(result.unflatten(1, (len(part), -1)).transpose(0, 1))
    return results[0] if len(results) == 1 else torch.cat(results)


def _repeat(image: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Return (N, P, C): each of the (B, P, C) images for each of its prompts."""
    if len(image) == 1:
        return image.expand(sum(counts), -1, -1)
    return torch.cat([part.expand(count, -1, -1) for part, count in zip(image.split(1), counts)])


def _attend_tokens(attention: Attention, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Self-attention of (N, T, C) tokens; the keys are the queries, too."""
    queries, keys, values = (
        split_heads(attention, projection(x))
        for projection, x in ((attention.q_proj, keys), (attention.k_proj, keys), (attention.v_proj, values))
    )
    return attention.out_proj(merge_heads(F.scaled_dot_product_attention(queries, keys, values)))


def split_heads(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """Split the channels by head: (B, L, H * D) to (B, H, L, D)."""
    return x.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """Join the heads: (B, H, L, D) to (B, L, H * D)."""
    return x.transpose(1, 2).flatten(2)


def upscale(layer: nn.ConvTranspose2d, x: torch.Tensor) -> torch.Tensor:
    """Apply a transposed convolution of stride 2 position by position: (..., C) to (..., 2, 2, channels)."""
    assert layer.bias is not None
    weight = layer.weight.permute(2, 3, 1, 0)  # (2, 2, channels, C)
    return F.linear(x, weight.flatten(0, 2), layer.bias.repeat(4)).unflatten(-1, weight.shape[:3])
