"""The interface of vision-language models: image -> semantic feature map (paper, section 3.2)."""

from abc import ABC, abstractmethod
from typing import Any

import torch

from regionspot.modeling.frozen import FrozenModule

FEATURES = ("none", "feature_map", "feature_map+class_token")


class VisionLanguageModel(FrozenModule, ABC):
    """What ``RegionRecognizer`` needs of a frozen model of images and text.

    Attributes:
        clip_model: the model itself, of any family; the name is that of the released checkpoints' keys.
        features: content of the feature map, one of ``FEATURES``.
        pixel_mean: (3, 1, 1) float, RGB in [0, 1]; it is on the model's device.
    """

    clip_model: Any
    features: str
    pixel_mean: torch.Tensor

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of the feature map."""

    @property
    @abstractmethod
    def text_dim(self) -> int:
        """Length of a text embedding."""

    @abstractmethod
    def preprocess(self, image: torch.Tensor) -> torch.Tensor:
        """Resize a whole (3, H, W) RGB image in [0, 255] to the model's input, and normalize it."""

    @abstractmethod
    def encode_images(self, images: list[torch.Tensor]) -> torch.Tensor | None:
        """Return the semantic feature map V of images.

        Args:
            images: (3, H, W) RGB, uint8 or float in [0, 255], of any sizes.

        Returns:
            (B, L, width) float32, L = 1 + grid^2 with the class token first, grid^2 without it; None for "none".
        """
