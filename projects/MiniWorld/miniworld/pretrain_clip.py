"""Trains the miniature CLIP as the real one was: on whole images with captions.

It sees images of 1 to 3 objects, framed loosely, under captions in CLIP's own prompt templates. It sees no tight
crops, no boxes and none of the annotated scenes; all categories, novel ones too, occur in captions, as they did on
the web. Beside CLIP's contrastive loss, a second head predicts the caption's words from either feature and is
discarded after the training: without it, so small a model takes far longer to attend to shapes.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from miniworld.captions import CONTEXT, WORDS, CaptionedImages, halve, to_input
from miniworld.categories import CATEGORIES, NAMES
from miniworld.generator import draw_captioned
from regionspot.modeling.vision_language import VisionLanguageModel
from regionspot.modeling.vision_language.clip import ClipSize, ClipVisionLanguageModel, build_clip, encode_tokens
from regionspot.modeling.vision_language.text_encoder import TextEncoder

CLIP_SIZE = ClipSize(
    image_size=96,
    patch_size=8,
    width=128,
    layers=4,
    text_width=128,
    text_layers=3,
    embed_dim=128,
    context_length=CONTEXT,
)


class ClipPretraining(nn.Module):
    """CLIP, the head that predicts words, and their loss."""

    def __init__(self, directory: Path, seed: int, num_images: int, workers: int) -> None:
        """
        Args:
            directory: where the drawn images are kept.
            seed: of the images and of the training.
            num_images: how many to draw.
            workers: drawing processes.
        """
        super().__init__()
        self.images, self.seed = CaptionedImages(directory, num_images, seed, workers), seed
        self.model = self.build()
        self.words = nn.Linear(CLIP_SIZE.embed_dim, len(WORDS))
        self.log_scale = nn.Parameter(self.model.logit_scale.clone())

    @staticmethod
    def build() -> Any:
        """Return the model that learns, with random weights."""
        model = build_clip(CLIP_SIZE)
        # A feature map that contains the position: it starts from a sine-cosine term.
        with torch.no_grad():
            grid = CLIP_SIZE.image_size // CLIP_SIZE.patch_size
            model.visual.positional_embedding.mul_(0.1).add_(0.5 * sincos_2d(grid, CLIP_SIZE.width))
        return model

    def batch(self, iteration: int, progress: float, size: int) -> dict[str, torch.Tensor]:
        return self.images.batch(self.seed, iteration, progress, size)

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, words: torch.Tensor, same: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of a batch as ``CaptionedImages.batch`` gives it."""
        seen = self.model.encode_image(images).float()
        read = encode_tokens(self.model, tokens).float()
        scale = self.log_scale.exp().clamp(max=100)
        logits = scale * F.normalize(seen, dim=1) @ F.normalize(read, dim=1).t()
        targets = same / same.sum(dim=1, keepdim=True)
        contrastive = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.t(), targets)) / 2
        named = sum(F.binary_cross_entropy_with_logits(self.words(feature), words) for feature in (seen, read))
        return contrastive + 8 * named

    def state(self) -> dict[str, torch.Tensor]:
        """Return the weights that are kept: CLIP's alone."""
        self.model.logit_scale.copy_(self.log_scale.detach().clamp(max=float(np.log(100))))
        return self.model.state_dict()

    def report(self) -> dict[str, float]:
        return report_clip(self.model)


def sincos_2d(grid: int, width: int) -> torch.Tensor:
    """Return (1 + grid^2, width) 2-D sine-cosine positions, 0 for the class token."""
    ys, xs = torch.meshgrid(torch.arange(grid).float(), torch.arange(grid).float(), indexing="ij")
    frequencies = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.cat([xs.flatten()[:, None] * frequencies, ys.flatten()[:, None] * frequencies], dim=1)
    return torch.cat([torch.zeros(1, width), torch.cat([angles.sin(), angles.cos()], dim=1)])


@torch.no_grad()
def report_clip(
    clip_model: Any,
    kind: Callable[..., VisionLanguageModel] = ClipVisionLanguageModel,
    num_images: int = 400,
    seed: int = 1,
    templates: str = "all",
) -> dict[str, float]:
    """Return zero-shot accuracies over all names on images of one object, anywhere in the image.

    Args:
        clip_model: the model.
        kind: the class of its vision-language model.
        num_images: of one object.
        seed: of the world; training uses another.
        templates: around the names, see ``CLIP.TEMPLATES``.
    """
    images: list[np.ndarray] = []
    labels: list[int] = []
    index = 0
    while len(images) < num_images:
        scene = draw_captioned(index, seed)
        index += 1
        if len(scene.classes) == 1:
            images.append(halve(scene))
            labels.append(int(scene.classes[0]))
    device = next(clip_model.parameters()).device
    vision_language = kind(clip_model=copy.deepcopy(clip_model)).to(device)  # it would freeze the model
    seen = torch.cat([vision_language.embed_images(part.to(device)) for part in to_input(np.stack(images)).split(100)])
    predictions = (seen.float() @ TextEncoder(vision_language, templates).encode(NAMES).t()).argmax(dim=1).tolist()
    result = {"top1": float(np.mean([predicted == label for predicted, label in zip(predictions, labels)]))}
    for k, attribute in enumerate(("pattern", "color", "shape")):
        result[attribute] = float(np.mean([CATEGORIES[g][k] == CATEGORIES[t][k] for g, t in zip(predictions, labels)]))
    return result
