"""The interface of localizers: prompts -> position-aware tokens and masks (paper, section 3.1)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from fvcore.common.registry import Registry

from regionspot.modeling.frozen import FrozenModule, get_registered
from regionspot.modeling.masks import MaskUpsampler
from regionspot.structures import Prompts
from regionspot.utils.files import sha256_of_file

TOKEN_STAGES = ("prompt_encoder", "transformer", "mlp")
MASK_STAGE = "mask"  # what the mask covers, see ``mask_pooling``; it stands beside the tokens of another stage

LOCALIZER_REGISTRY = Registry("LOCALIZER")
LOCALIZER_REGISTRY.__doc__ = "Localizers, ``MODEL.REGIONSPOT.LOCALIZER.NAME``; called with a config."


@dataclass
class LocalizerOutput:
    """What a localizer gives for N prompts.

    Attributes:
        stage_tokens: for each requested stage, (N, D) float32 position-aware tokens.
        iou: (N,) float32, the localizer's own estimate of each mask's IoU, or None when not requested.
        masks: (N, h, w) float32 mask logits over the whole square input, or None when not requested.
        coverage: (N, COVERAGE_DIM) float32, what each mask covers, see ``mask_pooling``; or None when not requested.
    """

    stage_tokens: dict[str, torch.Tensor]
    iou: torch.Tensor | None
    masks: torch.Tensor | None
    coverage: torch.Tensor | None = None

    @property
    def tokens(self) -> torch.Tensor:
        """(N, D) float32 tokens of the stages that were requested, side by side; by default the localizer's own."""
        tokens = list(self.stage_tokens.values())
        return tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)

    def split(self, counts: Sequence[int]) -> list["LocalizerOutput"]:
        """Return the outputs of images, ``counts`` prompts each."""
        sizes = list(counts)
        stage_tokens = {stage: tokens.split(sizes) for stage, tokens in self.stage_tokens.items()}
        ious = [None] * len(sizes) if self.iou is None else self.iou.split(sizes)
        masks = [None] * len(sizes) if self.masks is None else self.masks.split(sizes)
        coverage = [None] * len(sizes) if self.coverage is None else self.coverage.split(sizes)
        return [
            LocalizerOutput({stage: tokens[i] for stage, tokens in stage_tokens.items()}, *parts)
            for i, parts in enumerate(zip(ious, masks, coverage))
        ]


def check_stages(stages: Sequence[str], what: str, known: Sequence[str] = TOKEN_STAGES) -> None:
    """Refuse unknown stages; ``what`` names the option in the message."""
    for stage in stages:
        if stage not in known:
            raise ValueError(f"{what}: expected one of {', '.join(known)}; got {stage!r}")


class Localizer(FrozenModule, ABC):
    """What ``RegionRecognizer`` needs of a frozen model that is prompted with regions.

    Attributes:
        sam: the model itself, of any family; the name is that of the released checkpoints' keys.
        dtype: of its weights.
        token_stage: where its tokens are taken from, one of ``TOKEN_STAGES``.
        setup: what outputs depend on beside weights and their shapes; "" for the sizes that have names.
        variant: which of the family it is, ``MODEL.REGIONSPOT.SAM.NAME``; "" if it was built without a config.
    """

    variant = ""
    setup = ""
    sam: Any
    dtype: torch.dtype
    token_stage: str

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the square input, pixels."""

    @property
    @abstractmethod
    def token_dim(self) -> int:
        """Length D of a position-aware token of the localizer's own stage."""

    @abstractmethod
    def stage_dim(self, stage: str) -> int:
        """Return the length of the tokens of a stage."""

    @abstractmethod
    def input_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) that an image of (height, width) has in the localizer's input."""

    @abstractmethod
    def encode_images(self, images: list[torch.Tensor]) -> torch.Tensor:
        """Embed images.

        Args:
            images: (3, H, W) RGB, uint8 or float in [0, 255], of any sizes.

        Returns:
            (B, C, h, w) float32 image embeddings; some families pack finer features into further channels.
        """

    @abstractmethod
    def forward(
        self,
        embeddings: torch.Tensor,
        prompts: Sequence[Prompts],
        with_masks: bool = False,
        stages: Sequence[str] = (),
        with_iou: bool = False,
    ) -> list[LocalizerOutput]:
        """Decode the prompts of B images.

        Args:
            embeddings: (B, C, h, w) image embeddings.
            prompts: for each image its N_i prompts, boxes and points in pixels of the localizer's input.
            with_masks: compute the masks, too.
            stages: where to take tokens from; the localizer's own stage by default.
            with_iou: estimate the IoU of the masks, too.

        Returns:
            For each image the tokens, IoU estimates and masks of its prompts, in their order.
        """

    @abstractmethod
    def mask_upsampler(self, image_size: tuple[int, int]) -> MaskUpsampler:
        """Return what turns the mask logits of an image of (height, width) into binary masks."""

    @abstractmethod
    def mask_prompts(self, masks: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """Turn binary masks into mask prompts.

        Args:
            masks: (N, *image_size) bool, on any device.
            image_size: (height, width) of the image.

        Returns:
            (N, 1, h, w) float logits over the whole square input.
        """

    def upsample_masks(
        self, masks: torch.Tensor, image_size: tuple[int, int], output_size: tuple[int, int]
    ) -> torch.Tensor:
        """Turn mask logits into binary masks of the output's size.

        Args:
            masks: (N, h, w) float logits, as in ``LocalizerOutput``.
            image_size: (height, width) of the image that was embedded.
            output_size: (height, width) of the output.

        Returns:
            (N, *output_size) bool.
        """
        return self.mask_upsampler(image_size)(masks, output_size)


def build_localizer(cfg: CfgNode) -> Localizer:
    """Build the localizer of ``MODEL.REGIONSPOT.LOCALIZER.NAME`` with random weights."""
    key = "MODEL.REGIONSPOT.LOCALIZER.NAME"
    localizer = get_registered(LOCALIZER_REGISTRY, cfg.MODEL.REGIONSPOT.LOCALIZER.NAME, key)(cfg)
    localizer.variant = name = cfg.MODEL.REGIONSPOT.SAM.NAME
    if name == "custom":
        localizer.setup = cfg.MODEL.REGIONSPOT.SAM.CUSTOM.dump()
    elif Path(name).is_file():
        localizer.setup = sha256_of_file(name)
    return localizer
