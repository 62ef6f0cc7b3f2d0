"""The localizer: a frozen SAM that turns prompts into position-aware tokens and masks (paper, section 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode, configurable
from PIL import Image
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch.nn import functional as F
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image

from regionspot.modeling.frozen import FrozenModule
from regionspot.modeling.localizers.sam import build_sam, get_sam_size
from regionspot.modeling.masks import MaskUpsampler
from regionspot.structures import Prompts

TOKEN_STAGES = ("prompt_encoder", "transformer", "mlp")


@dataclass
class LocalizerOutput:
    """What SAM says of N prompts.

    Attributes:
        stage_tokens: for each stage asked for, (N, D) float32 position-aware tokens.
        iou: (N,) float32, SAM's own estimate of the mask's IoU.
        masks: (N, h, w) float32 mask logits over the padded square input, or None when not asked for.
    """

    stage_tokens: dict[str, torch.Tensor]
    iou: torch.Tensor
    masks: torch.Tensor | None

    @property
    def tokens(self) -> torch.Tensor:
        """(N, D) float32 tokens of the only stage that was asked for, by default the localizer's own."""
        [tokens] = self.stage_tokens.values()
        return tokens


def check_stages(stages: Sequence[str], what: str) -> None:
    """Refuse stages that SAM does not have; ``what`` names the option in the message."""
    for stage in stages:
        if stage not in TOKEN_STAGES:
            raise ValueError(f"{what}: expected one of {', '.join(TOKEN_STAGES)}; got {stage!r}")


class Localizer(FrozenModule):
    """Frozen SAM: image embedding, then prompts in chunks."""

    @configurable
    def __init__(
        self,
        *,
        sam: Sam,
        token_stage: str = "transformer",
        prompt_chunk: int = 64,
        multimask: bool = False,
        encoder_batch_size: int = 1,
    ) -> None:
        """
        Args:
            sam: the model, any size.
            token_stage: where the token is taken from: "prompt_encoder" (mean of the prompt's sparse embeddings, so
                that boxes and points give the same length), "transformer" (the mask token behind the two-way
                transformer) or "mlp" (that token behind its hypernetwork MLP).
            prompt_chunk: prompts decoded at once.
            multimask: choose among SAM's several masks by predicted IoU instead of taking the single-mask output.
            encoder_batch_size: images encoded at once.
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
        self.freeze()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.REGIONSPOT
        return {
            "sam": build_sam(get_sam_size(cfg)),
            "token_stage": node.TOKEN_STAGE,
            "prompt_chunk": node.SAM.PROMPT_CHUNK,
            "multimask": node.SAM.MULTIMASK,
            "encoder_batch_size": node.SAM.ENCODER_BATCH_SIZE,
        }

    @property
    def token_dim(self) -> int:
        """Length D of a position-aware token of the localizer's own stage."""
        return self.stage_dim(self.token_stage)

    def stage_dim(self, stage: str) -> int:
        """Return the length of the tokens of a stage."""
        dim = self.sam.mask_decoder.transformer_dim
        return dim // 8 if stage == "mlp" else dim

    @property
    def image_size(self) -> int:
        """Side of SAM's square input, pixels."""
        return self.sam.image_encoder.img_size

    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) that an image of (height, width) has in SAM's input, before padding."""
        height, width = ResizeLongestSide.get_preprocess_shape(*image_size, self.image_size)
        return max(height, 1), max(width, 1)

    @torch.no_grad()
    def encode_images(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Embed images, ``encoder_batch_size`` of them at once.

        Args:
            images: (3, H, W) RGB, uint8 or float in [0, 255], of any sizes.

        Returns:
            (B, C, h, w) float32 image embeddings.
        """
        size = self.encoder_batch_size
        return torch.cat([self._encode(images[i : i + size]) for i in range(0, len(images), size)])

    def _encode(self, images: list[torch.Tensor]) -> torch.Tensor:
        device = self.sam.pixel_mean.device
        inputs = [self.sam.preprocess(self._resize(image).to(device, non_blocking=True).float()) for image in images]
        return self.sam.image_encoder(torch.stack(inputs)).float()

    def _resize(self, image: torch.Tensor) -> torch.Tensor:
        size = self.input_size((image.shape[-2], image.shape[-1]))
        if tuple(image.shape[-2:]) == size:
            return image
        if image.dtype == torch.uint8 and image.device.type == "cpu":  # as SAM's own predictor does, to the bit
            resized = to_pil_image(image).resize(size[::-1], Image.Resampling.BILINEAR)
            return pil_to_tensor(resized)
        return resize(image, list(size), antialias=True)  # differs from the above by one gray level at the most

    @torch.no_grad()
    def forward(
        self, embedding: torch.Tensor, prompts: Prompts, with_masks: bool = False, stages: Sequence[str] = ()
    ) -> LocalizerOutput:
        """Decode the prompts of one image.

        Args:
            embedding: (1, C, h, w) image embedding.
            prompts: N prompts, boxes and points in pixels of SAM's input.
            with_masks: compute the masks, too.
            stages: where to take tokens from; the localizer's own stage by default.

        Returns:
            Tokens, IoU estimates and masks of the N prompts, in their order.
        """
        stages = stages or (self.token_stage,)
        chunks = [
            self._decode(embedding, prompts[i : i + self.prompt_chunk], with_masks, stages)
            for i in range(0, len(prompts), self.prompt_chunk)
        ]
        if not chunks:
            side = 4 * embedding.shape[-1]
            empty = embedding.new_zeros
            tokens = {stage: empty(0, self.stage_dim(stage)) for stage in stages}
            return LocalizerOutput(tokens, empty(0), empty(0, side, side) if with_masks else None)
        masks = torch.cat([chunk.masks for chunk in chunks if chunk.masks is not None]) if with_masks else None
        tokens = {stage: torch.cat([chunk.stage_tokens[stage] for chunk in chunks]) for stage in stages}
        return LocalizerOutput(tokens, torch.cat([chunk.iou for chunk in chunks]), masks)

    def _decode(
        self, embedding: torch.Tensor, prompts: Prompts, with_masks: bool, stages: Sequence[str]
    ) -> LocalizerOutput:
        decoder = self.sam.mask_decoder
        points = None if prompts.points is None else (prompts.points, prompts.point_labels)
        sparse, dense = self.sam.prompt_encoder(
            points=points, boxes=prompts.boxes, masks=prompts.masks
        )  # (N, P, C), (N, C, h, w)

        # One image feeds all prompts: its embedding keeps batch size 1 until the transformer's first layer makes it
        # differ from prompt to prompt, and the attention of that layer broadcasts.
        image = embedding + (dense if prompts.masks is not None else dense[:1])
        outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([outputs.expand(len(prompts), -1, -1), sparse], dim=1)
        hidden, image = decoder.transformer(image, self.sam.prompt_encoder.get_dense_pe(), tokens)

        ious = decoder.iou_prediction_head(hidden[:, 0])  # (N, M)
        rows = torch.arange(len(prompts), device=hidden.device)
        best = 1 + ious[:, 1:].argmax(dim=1) if self.multimask else torch.zeros_like(rows)
        mask_tokens = hidden[rows, 1 + best]  # (N, C)
        kernels = self._kernels(mask_tokens, best) if with_masks or "mlp" in stages else None  # (N, C / 8)
        return LocalizerOutput(
            stage_tokens={
                stage: self._stage_tokens(stage, prompts, sparse, mask_tokens, kernels).float() for stage in stages
            },
            iou=ious[rows, best].float(),
            masks=self._masks(image, embedding.shape[-2:], kernels).float() if with_masks else None,
        )

    def _kernels(self, mask_tokens: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        """Put each mask token through the hypernetwork MLP of its own output."""
        mlps = self.sam.mask_decoder.output_hypernetworks_mlps
        if not self.multimask:
            return mlps[0](mask_tokens)
        every = torch.stack([mlp(mask_tokens) for mlp in mlps], dim=1)  # (N, M, C / 8)
        return every[torch.arange(len(best), device=best.device), best]

    @staticmethod
    def _stage_tokens(
        stage: str, prompts: Prompts, sparse: torch.Tensor, mask_tokens: torch.Tensor, kernels: torch.Tensor | None
    ) -> torch.Tensor:
        if stage == "transformer":
            return mask_tokens
        if stage == "mlp":
            assert kernels is not None
            return kernels
        if sparse.shape[1] == 0:
            raise ValueError("TOKEN_STAGE prompt_encoder: a mask alone has no sparse embedding; give its box, too")
        weights = torch.ones(sparse.shape[:2], device=sparse.device)
        if prompts.point_labels is not None:  # padding is no part of a prompt
            number = prompts.point_labels.shape[1]
            weights[:, :number] = (prompts.point_labels >= 0).float()
            if prompts.boxes is None:
                weights[:, number:] = 0
        return (sparse * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True).clamp(min=1)

    def _masks(self, image: torch.Tensor, grid: torch.Size, kernels: torch.Tensor | None) -> torch.Tensor:
        assert kernels is not None
        image = image.transpose(1, 2).unflatten(2, grid)  # (N, C, h, w)
        upscaled = self.sam.mask_decoder.output_upscaling(image)  # (N, C / 8, 4h, 4w)
        return torch.einsum("nc,nchw->nhw", kernels, upscaled)

    def mask_upsampler(self, image_size: tuple[int, int]) -> MaskUpsampler:
        """Return what turns the mask logits of an image of (height, width) into binary masks."""
        return MaskUpsampler(self.image_size, self.input_size(image_size), self.sam.mask_threshold)

    def upsample_masks(
        self, masks: torch.Tensor, image_size: tuple[int, int], output_size: tuple[int, int]
    ) -> torch.Tensor:
        """Turn mask logits into binary masks of the output's size.

        Args:
            masks: (N, h, w) float logits, as in ``LocalizerOutput``.
            image_size: (height, width) of the image that was embedded.
            output_size: (height, width) wanted.

        Returns:
            (N, *output_size) bool.
        """
        return self.mask_upsampler(image_size)(masks, output_size)

    def mask_prompts(self, masks: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """Turn binary masks into SAM's mask prompts.

        Args:
            masks: (N, *image_size) bool, on any device.
            image_size: (height, width) of the image.

        Returns:
            (N, 1, h, w) float logits over the padded square input, +-10 inside and outside.
        """
        height, width = self.input_size(image_size)
        side = self.sam.prompt_encoder.mask_input_size
        prompts = [torch.zeros(0, 1, *side, device=self.sam.pixel_mean.device)]
        for part in masks.split(self.mask_upsampler(image_size).chunk_size(image_size)) if len(masks) else ():
            inputs = part[:, None].to(prompts[0].device, torch.float32)
            inputs = F.interpolate(inputs, (height, width), mode="bilinear", antialias=True)
            inputs = F.pad(inputs, (0, self.image_size - width, 0, self.image_size - height))
            prompts.append(20 * F.interpolate(inputs, side, mode="bilinear", antialias=True) - 10)
        return torch.cat(prompts)
