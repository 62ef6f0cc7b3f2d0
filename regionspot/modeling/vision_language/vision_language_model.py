"""The interface of vision-language models: image -> semantic feature map, text -> embeddings (paper, section 3.2)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch.nn import functional as F

from regionspot.modeling.frozen import FrozenModule, get_registered

FEATURES = ("none", "feature_map", "feature_map+class_token")

VISION_LANGUAGE_REGISTRY = Registry("VISION_LANGUAGE")
VISION_LANGUAGE_REGISTRY.__doc__ = (
    "Vision-language models, ``MODEL.REGIONSPOT.VISION_LANGUAGE.NAME``; called with a config."
)


class VisionLanguageModel(FrozenModule, ABC):
    """What ``RegionRecognizer`` needs of a frozen model of images and text.

    Attributes:
        clip_model: the model itself, of any family; the name is that of the released checkpoints' keys. What its text
            embeddings depend on is ``text_weights``, and on its images ``image_weights``.
        features: content of the feature map, one of ``FEATURES``.
        pixel_mean: (3, 1, 1) float, RGB in [0, 1]; it is on the model's device.
        pixel_std: (3, 1, 1) float, likewise.
        context_length: tokens of a prompt.
    """

    clip_model: Any
    features: str
    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor
    context_length: int

    def set_inputs(self, features: str, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set ``features``, ``pixel_mean`` and ``pixel_std``; called in the constructor.

        Raises:
            ValueError: unknown features.
        """
        if features not in FEATURES:
            raise ValueError(f"MODEL.REGIONSPOT.CLIP.FEATURES: expected one of {', '.join(FEATURES)}; got {features!r}")
        self.features = features
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    @abstractmethod
    def width(self) -> int:
        """Channels of the feature map."""

    @property
    @abstractmethod
    def text_dim(self) -> int:
        """Length of a text embedding."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of most weights."""

    @property
    @abstractmethod
    def logit_scale(self) -> torch.Tensor:
        """Scalar, the logarithm of the factor of cosine similarities."""

    @property
    def logit_bias(self) -> torch.Tensor | None:
        """Scalar that is added to logits; None for models without."""
        return None

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Side of the model's square input, pixels."""

    def preprocess(self, image: torch.Tensor) -> torch.Tensor:
        """Resize a whole (3, H, W) RGB image in [0, 255] to the model's input, and normalize it."""
        return self._normalize(self._resize(image))

    def preprocess_batch(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the (B, 3, S, S) inputs of B images of any sizes, each as from ``preprocess``."""
        return self._normalize(torch.stack([self._resize(image) for image in images]))

    def _resize(self, image: torch.Tensor) -> torch.Tensor:
        # bilinear without antialias, aspect ratio not kept: the released models were trained that way
        image = image.to(self.pixel_mean.device, non_blocking=True).float()  # it moves as bytes
        size = (self.image_size, self.image_size)
        return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]

    def _normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels / 255 - self.pixel_mean) / self.pixel_std

    @abstractmethod
    def encode_images(self, images: list[torch.Tensor]) -> torch.Tensor | None:
        """Return the semantic feature map V of images.

        Args:
            images: (3, H, W) RGB, uint8 or float in [0, 255], of any sizes.

        Returns:
            (B, L, width) float32, L = 1 + grid^2 with the class token first, grid^2 without it; None for "none".
        """

    @property
    def has_dense_features(self) -> bool:
        """Whether ``encode_images_densely`` works: its patch tokens can be compared with text."""
        return False

    def encode_images_densely(self, images: list[torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return what ``encode_images`` does, and dense features in the space of text embeddings.

        Those are the values of the last block's attention, each taken for the block's output, as in MaskCLIP (arXiv
        2112.01071): (B, grid^2, text_dim) float32, not normalized.
        """
        raise NotImplementedError(f"{type(self).__name__} has no dense features")

    @abstractmethod
    def embed_images(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the (B, text_dim) embeddings, not normalized, of (B, 3, S, S) images from ``preprocess``."""

    @abstractmethod
    def tokenize(self, names: Sequence[str], templates: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (K * T, context) int tokens of K names in T templates, name by name, and their (K * T,) lengths.

        Raises:
            ValueError: a name is too long.
        """

    @abstractmethod
    def encode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the (N, text_dim) embeddings, not normalized, of (N, L) tokens cut to the longest of their lengths."""

    @abstractmethod
    def text_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights that text embeddings depend on."""

    @abstractmethod
    def image_weights(self) -> dict[str, torch.Tensor]:
        """Return the weights that feature maps depend on."""

    @property
    def text_setup(self) -> str:
        """What text embeddings depend on beside ``text_weights``, such as activation and tokenizer; "" for CLIP's own.

        It may fetch the tokenizer's files, which text needs anyway.
        """
        return ""

    @property
    def image_setup(self) -> str:
        """What feature maps depend on beside ``image_weights``, such as activation and normalization; "" for CLIP's."""
        return ""


def build_vision_language_model(cfg: CfgNode) -> VisionLanguageModel:
    """Build the model of ``MODEL.REGIONSPOT.VISION_LANGUAGE.NAME`` with random weights."""
    key = "MODEL.REGIONSPOT.VISION_LANGUAGE.NAME"
    return get_registered(VISION_LANGUAGE_REGISTRY, cfg.MODEL.REGIONSPOT.VISION_LANGUAGE.NAME, key)(cfg)
