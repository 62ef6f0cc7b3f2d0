"""Frozen vision-language models; importing this registers them."""

from regionspot.modeling.vision_language.clip import ClipVisionLanguageModel
from regionspot.modeling.vision_language.open_clip import OpenClipVisionLanguageModel
from regionspot.modeling.vision_language.vision_language_model import (
    VISION_LANGUAGE_REGISTRY,
    VisionLanguageModel,
    build_vision_language_model,
)

__all__ = [
    "VISION_LANGUAGE_REGISTRY",
    "ClipVisionLanguageModel",
    "OpenClipVisionLanguageModel",
    "VisionLanguageModel",
    "build_vision_language_model",
]
