"""Trains the miniature SigLIP, another vision-language model: a sigmoid for each pair, a text tower that is not causal.

It starts from the weights of the miniature CLIP, where it has them, and sees the same images and captions.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from miniworld.captions import CONTEXT
from miniworld.pretrain_clip import ClipPretraining, report_clip
from regionspot.checkpoint.formats import load_checkpoint_file
from regionspot.modeling.vision_language.open_clip import OpenClipVisionLanguageModel
from regionspot.modeling.vision_language.open_clip_models import build_open_clip, read_open_clip_config

WEIGHTS = Path(__file__).parent / "weights"
CONFIG = WEIGHTS / "siglip.config.json"


class SiglipPretraining(ClipPretraining):
    """SigLIP, the head that predicts words, and their loss."""

    @staticmethod
    def build() -> Any:
        model = build_open_clip(read_open_clip_config(str(CONFIG)))
        clip = load_checkpoint_file(WEIGHTS / "clip.safetensors")
        own = model.state_dict()
        start = {key if key in own else f"text.{key}": value for key, value in clip.items() if "logit" not in key}
        model.load_state_dict({key: value.float() for key, value in start.items() if key in own}, strict=False)
        return model

    def batch(self, iteration: int, progress: float, size: int) -> dict[str, torch.Tensor]:
        return self.images.batch(self.seed, iteration, 0.6 + 0.4 * progress, size)  # CLIP has seen the easy ones

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, words: torch.Tensor, same: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of a batch as ``CaptionedImages.batch`` gives it."""
        seen = self.model.encode_image(images).float()
        read = self.model.encode_text(F.pad(tokens, (0, CONTEXT - tokens.shape[1]))).float()
        logits = self.model.logit_scale.exp() * F.normalize(seen, dim=1) @ F.normalize(read, dim=1).t()
        pairs = F.binary_cross_entropy_with_logits(logits + self.model.logit_bias, same, reduction="none")
        named = sum(F.binary_cross_entropy_with_logits(self.words(feature), words) for feature in (seen, read))
        return pairs.sum(dim=1).mean() + 8 * named

    def state(self) -> dict[str, torch.Tensor]:
        """Return the weights that are kept."""
        return self.model.state_dict()

    def report(self) -> dict[str, float]:
        kind = partial(OpenClipVisionLanguageModel, config=read_open_clip_config(str(CONFIG)))
        return report_clip(self.model, kind)
