"""What the localizers of SAM's families share: images in batches, prompts in chunks, tokens by stage."""

import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from PIL import Image
from segment_anything.utils.transforms import ResizeLongestSide
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image

from regionspot.modeling.frozen import get_dtype
from regionspot.modeling.localizers.localizer import Localizer, LocalizerOutput, check_stages
from regionspot.modeling.localizers.pil_resize import resize_bytes
from regionspot.modeling.localizers.sam_decoder import PromptDecoder, UpdatedPrompts
from regionspot.structures import Prompts

# Of the images of the prompts that a CPU decodes at once, and makes masks of: more leave its cache.
CPU_BYTES = 1 << 24
CPU_MASK_BYTES = 1 << 21


def run_encoder(encoder: nn.Module, inputs: torch.Tensor) -> Any:
    """Return the encoder's output; a function, so that it can be compiled without changing the model."""
    return encoder(inputs)


class PromptedLocalizer(Localizer):
    """A frozen SAM of any family.

    ``sam`` has a ``prompt_encoder`` with ``no_mask_embed``, and a ``mask_decoder`` with an ``iou_prediction_head`` and
    ``output_hypernetworks_mlps``, one for each mask token.
    """

    # Of the image encoder: what COMPILE compiles.
    compiled_step: Callable[..., Any] = staticmethod(run_encoder)

    @configurable
    def __init__(
        self,
        *,
        sam: Any,
        token_stage: str = "transformer",
        prompt_chunk: int = 64,
        multimask: bool = False,
        encoder_batch_size: int = 1,
        precision: str = "float32",
        compile: bool = False,
    ) -> None:
        """
        Args:
            sam: the model, any size.
            token_stage: where the token is taken from: "prompt_encoder" (mean of the prompt's sparse embeddings, so
                that boxes and points give the same length), "transformer" (the mask token behind the two-way
                transformer) or "mlp" (that token behind its hypernetwork MLP).
            prompt_chunk: number of prompts decoded at once.
            multimask: choose among SAM's several masks by predicted IoU instead of taking the single-mask output.
            encoder_batch_size: number of images encoded at once.
            precision: of the image encoder and the mask decoder; prompts are encoded in float32, as their coordinates
                need it.
            compile: compile the image encoder, see ``MODEL.REGIONSPOT.COMPILE``.
        """
        super().__init__()
        check_stages([token_stage], "MODEL.REGIONSPOT.TOKEN_STAGE")
        for key, value in (("PROMPT_CHUNK", prompt_chunk), ("ENCODER_BATCH_SIZE", encoder_batch_size)):
            if value < 1:
                raise ValueError(f"MODEL.REGIONSPOT.SAM.{key}: expected at least 1, got {value}")
        self.sam = sam
        self.token_stage = token_stage
        self.prompt_chunk = prompt_chunk
        self.multimask = multimask
        self.encoder_batch_size = encoder_batch_size
        self.dtype = get_dtype(precision)
        self.image_encoder.to(self.dtype)
        sam.mask_decoder.to(self.dtype)
        self._run_step = torch.compile(self.compiled_step) if compile else self.compiled_step
        self.freeze()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.REGIONSPOT
        return {
            "sam": cls.build_sam(cfg),
            "token_stage": node.TOKEN_STAGE,
            "prompt_chunk": node.SAM.PROMPT_CHUNK,
            "multimask": node.SAM.MULTIMASK,
            "encoder_batch_size": node.SAM.ENCODER_BATCH_SIZE,
            "precision": node.PRECISION,
            "compile": node.COMPILE,
        }

    @classmethod
    @abstractmethod
    def build_sam(cls, cfg: CfgNode) -> Any:
        """Build the model that ``cfg.MODEL.REGIONSPOT.SAM`` names, with random weights."""

    @property
    @abstractmethod
    def image_encoder(self) -> nn.Module:
        """The part of ``sam`` that sees images."""

    @property
    @abstractmethod
    def prompt_dim(self) -> int:
        """Length C of SAM's tokens."""

    @property
    @abstractmethod
    def mask_prompt_size(self) -> tuple[int, int]:
        """(height, width) of mask prompts."""

    @abstractmethod
    def _encode(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Embed images, one batch, as ``encode_images``."""

    @abstractmethod
    def _prompt_decoder(self, embeddings: torch.Tensor, prompts: Prompts) -> PromptDecoder:
        """Return the decoder of the prompts, which are all of one kind, of B images."""

    @abstractmethod
    def _encode_prompts(self, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (N, T, C) embeddings of points, then boxes, then any padding, and (N, C, h, w) of masks or None."""

    @property
    def token_dim(self) -> int:
        return self.stage_dim(self.token_stage)

    def stage_dim(self, stage: str) -> int:
        return self.prompt_dim // 8 if stage == "mlp" else self.prompt_dim

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.sam.prompt_encoder.no_mask_embed.weight.device

    @torch.no_grad()
    def encode_images(self, images: list[torch.Tensor]) -> torch.Tensor:
        size = self.encoder_batch_size
        return torch.cat([self._encode(images[i : i + size]) for i in range(0, len(images), size)])

    def _resize(self, image: torch.Tensor) -> torch.Tensor:
        """Return (3, h, w) of ``input_size``, uint8 or float as the image, on the model's device unless on a CPU."""
        size = self.input_size((image.shape[-2], image.shape[-1]))
        if self.device.type != "cpu" or tuple(image.shape[-2:]) == size:
            image = image.to(self.device, non_blocking=True)
        if tuple(image.shape[-2:]) == size:
            return image
        if image.dtype != torch.uint8:
            return resize(image, list(size), antialias=True).to(self.device)
        if image.device.type != "cpu":
            return resize_bytes(image, size)
        resized = to_pil_image(image).resize(size[::-1], Image.Resampling.BILINEAR)  # bit-exact with SAM's predictor
        return pil_to_tensor(resized)

    @torch.no_grad()
    def forward(
        self,
        embeddings: torch.Tensor,
        prompts: Sequence[Prompts],
        with_masks: bool = False,
        stages: Sequence[str] = (),
        with_iou: bool = False,
    ) -> list[LocalizerOutput]:
        outputs: list[LocalizerOutput] = []
        # Training's autocast would round the coordinates of boxes to 8 bits.
        with torch.autocast(embeddings.device.type, enabled=False):
            for rows in self._images_together(embeddings, prompts):
                group = list(prompts[rows.start : rows.stop])
                outputs += self._forward(embeddings[rows.start : rows.stop], group, with_masks, stages, with_iou)
        return outputs

    def _images_together(self, embeddings: torch.Tensor, prompts: Sequence[Prompts]) -> list[range]:
        """Return ranges of images whose prompts are decoded together.

        On a GPU a few prompts of one image cannot fill it: images whose prompts are boxes alone are one range. A CPU
        gains nothing from more prompts at once.
        """
        only_boxes = [x.boxes is not None and x.points is None and x.masks is None for x in prompts]
        if embeddings.device.type != "cpu" and all(only_boxes) and len(prompts):
            return [range(len(prompts))]
        return [range(i, i + 1) for i in range(len(prompts))]

    def _forward(
        self,
        embeddings: torch.Tensor,
        prompts: list[Prompts],
        with_masks: bool,
        stages: Sequence[str],
        with_iou: bool,
    ) -> list[LocalizerOutput]:
        """Decode the prompts of B images, which are all of one kind."""
        stages = stages or (self.token_stage,)
        counts, together = [len(x) for x in prompts], Prompts.cat(prompts)
        if not len(together):
            side = 4 * embeddings.shape[-1]
            empty = embeddings.new_zeros
            tokens = {stage: empty(0, self.stage_dim(stage)) for stage in stages}
            masks = empty(0, side, side) if with_masks else None
            return [LocalizerOutput(tokens, empty(0) if with_iou else None, masks) for _ in prompts]
        decoder = self._prompt_decoder(embeddings, together)
        images = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))  # of each prompt
        chunks, start = [], 0
        for part in self._split(together, decoder):
            part_counts = images[start : start + len(part)].bincount(minlength=len(counts)).tolist()
            chunks.append(self._decode(decoder, part, part_counts, with_masks, stages, with_iou))
            start += len(part)
        tokens = {stage: torch.cat([chunk.stage_tokens[stage] for chunk in chunks]) for stage in stages}
        iou = torch.cat([chunk.iou for chunk in chunks if chunk.iou is not None]) if with_iou else None
        masks = torch.cat([chunk.masks for chunk in chunks if chunk.masks is not None]) if with_masks else None
        return LocalizerOutput(tokens, iou, masks).split(counts)

    @torch.no_grad()
    def all_masks(
        self, embedding: torch.Tensor, prompts: Prompts, min_iou: float
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Decode SAM's several masks of each prompt; yield those of a chunk of prompts that may be good.

        Args:
            embedding, prompts: as in ``forward``; no mask prompts.
            min_iou: masks whose estimated IoU is not above it are not made.

        Yields:
            (n,) float32 estimated IoUs, and (n, h, w) float32 mask logits, as in ``LocalizerOutput``.
        """
        decoder, prompt_decoder = self.sam.mask_decoder, self._prompt_decoder(embedding, prompts)
        for part in self._split(prompts, prompt_decoder):
            sparse, _ = self._encode_prompts(part)
            updated = prompt_decoder.update(sparse, None)
            iou_tokens = prompt_decoder.read(updated, slice(0, 1))[:, 0]
            ious = decoder.iou_prediction_head(iou_tokens)[:, 1:].float()  # (N, M), without the single-mask output
            rows, outputs = torch.where(ious > min_iou)
            used, positions = rows.unique(return_inverse=True)
            if len(used):
                updated = updated if len(used) == len(part) else updated[used]
                mlps = decoder.output_hypernetworks_mlps
                mask_tokens = prompt_decoder.read(updated, slice(2, 1 + len(mlps))).unbind(dim=1)
                kernels = torch.stack([mlp(x) for mlp, x in zip(mlps[1:], mask_tokens, strict=True)], dim=1)
                masks = _predict_masks(prompt_decoder, updated, kernels)  # by (n, M, C / 8) kernels
                yield ious[rows, outputs], masks[positions, outputs]

    def _split(self, prompts: Prompts, decoder: PromptDecoder) -> list[Prompts]:
        size = min(self.prompt_chunk, _number_at_once(decoder.image, CPU_BYTES))
        return [prompts[i : i + size] for i in range(0, len(prompts), size)]

    def _decode(
        self,
        prompt_decoder: PromptDecoder,
        prompts: Prompts,
        counts: Sequence[int],
        with_masks: bool,
        stages: Sequence[str],
        with_iou: bool,
    ) -> LocalizerOutput:
        """Decode prompts, ``counts`` of them for each image of the decoder."""
        decoder = self.sam.mask_decoder
        sparse, mask_embeddings = self._encode_prompts(prompts)
        updated = prompt_decoder.update(sparse, mask_embeddings, counts)
        # the output tokens: the IoU token, then M mask tokens, of which the first is the single-mask output's
        first = 0 if with_iou or self.multimask else 1
        last = len(decoder.output_hypernetworks_mlps) if self.multimask else 1
        hidden = prompt_decoder.read(updated, slice(first, last + 1))

        rows = torch.arange(len(prompts), device=hidden.device)
        best = torch.zeros_like(rows)
        ious = decoder.iou_prediction_head(hidden[:, 0]) if first == 0 else None  # (N, M)
        if self.multimask:
            assert ious is not None
            best = 1 + ious[:, 1:].argmax(dim=1)
        mask_tokens = hidden[rows, 1 - first + best]  # (N, C)
        kernels = self._kernels(mask_tokens, best) if with_masks or "mlp" in stages else None  # (N, C / 8)
        masks = None
        if with_masks:
            assert kernels is not None
            masks = _predict_masks(prompt_decoder, updated, kernels[:, None])[:, 0]
        return LocalizerOutput(
            stage_tokens={
                stage: self._stage_tokens(stage, prompts, sparse, mask_tokens, kernels).float() for stage in stages
            },
            iou=ious[rows, best].float() if with_iou and ious is not None else None,
            masks=masks,
        )

    def _kernels(self, mask_tokens: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        """Put each mask token through the hypernetwork MLP of its own output."""
        mlps = self.sam.mask_decoder.output_hypernetworks_mlps
        if not self.multimask:
            return mlps[0](mask_tokens)
        kernels = torch.stack([mlp(mask_tokens) for mlp in mlps], dim=1)  # (N, M, C / 8)
        return kernels[torch.arange(len(best), device=best.device), best]

    @staticmethod
    def _stage_tokens(
        stage: str, prompts: Prompts, sparse: torch.Tensor, mask_tokens: torch.Tensor, kernels: torch.Tensor | None
    ) -> torch.Tensor:
        if stage == "transformer":
            return mask_tokens
        if stage == "mlp":
            assert kernels is not None
            return kernels
        if prompts.boxes is None and prompts.points is None:
            raise ValueError("TOKEN_STAGE prompt_encoder: a mask alone has no sparse embedding; give its box, too")
        # padding does not count, neither the user's points nor what SAM itself pads with
        weights = torch.zeros(sparse.shape[:2], device=sparse.device)
        num_points = 0
        if prompts.point_labels is not None:
            num_points = prompts.point_labels.shape[1]
            weights[:, :num_points] = (prompts.point_labels >= 0).float()
        if prompts.boxes is not None:
            weights[:, num_points : num_points + 2] = 1
        return (sparse * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1)

    def mask_prompts(self, masks: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        height, width = self.input_size(image_size)
        side = self.mask_prompt_size
        prompts = [torch.zeros(0, 1, *side, device=self.device)]
        chunk_size = self.mask_upsampler(image_size).chunk_size
        size = min(chunk_size(image_size), chunk_size((self.image_size, self.image_size)))  # both are made below
        for part in masks.split(size) if len(masks) else ():
            inputs = part[:, None].to(self.device, torch.float32)
            inputs = F.interpolate(inputs, (height, width), mode="bilinear", antialias=True)
            inputs = F.pad(inputs, (0, self.image_size - width, 0, self.image_size - height))
            prompts.append(20 * F.interpolate(inputs, side, mode="bilinear", antialias=True) - 10)
        return torch.cat(prompts)


def fit_longest_side(image_size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the (height, width) of an image that is resized so that its longest side is ``side``, as SAM does it."""
    height, width = ResizeLongestSide.get_preprocess_shape(*image_size, side)
    return max(height, 1), max(width, 1)


def _number_at_once(image: torch.Tensor, cpu_bytes: int) -> int:
    """Return how many images a CPU takes at once, each as large as the first of ``image``; other devices take all."""
    return max(cpu_bytes // image[0].nbytes, 1) if image.device.type == "cpu" else sys.maxsize


def _predict_masks(decoder: PromptDecoder, prompts: UpdatedPrompts, kernels: torch.Tensor) -> torch.Tensor:
    """Return the (N, M, 4h, 4w) float32 mask logits of N prompts and (N, M, C / 8) kernels."""
    size = min(_number_at_once(prompts.image, CPU_MASK_BYTES), len(prompts))
    parts = [slice(i, i + size) for i in range(0, len(prompts), size)]
    masks = [decoder.predict_masks(prompts[part], kernels[part]).float() for part in parts]
    return masks[0] if len(masks) == 1 else torch.cat(masks)
