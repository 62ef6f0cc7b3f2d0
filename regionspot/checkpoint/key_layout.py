"""The key layout of the released checkpoints, and how it maps to the recognizer's own state dict.

Released keys are ``sam.*`` and ``clip_model.*`` (frozen) and ``to_clip.*``, ``decoder.*``, ``projector.*`` (trained),
all under ``model.``.
"""

import torch

TRAINED = "knowledge_integration."
FROZEN = {"sam": "localizer.sam.", "clip_model": "vision_language.clip_model."}
_TRAINED_PARTS = ("to_clip.", "decoder.", "projector.")
# OpenAI's archives hold these numbers beside the weights.
CLIP_EXTRAS = ("input_resolution", "context_length", "vocab_size")


def is_released_key(key: str) -> bool:
    """Tell whether ``key`` is one of a released checkpoint."""
    return key.startswith(tuple(f"model.{part}" for part in (*_TRAINED_PARTS, "sam.", "clip_model.")))


def to_recognizer_key(key: str) -> str | None:
    """Return the recognizer's key for a released key (with or without ``model.``), or None where it has none."""
    key = key.removeprefix("model.")
    if key.startswith(_TRAINED_PARTS):
        return TRAINED + key
    for part, prefix in FROZEN.items():
        if key.startswith(f"{part}.") and key.removeprefix(f"{part}.") not in CLIP_EXTRAS:
            return prefix + key.removeprefix(f"{part}.")
    return None


def to_released_key(key: str) -> str:
    """Return the released key for one of the recognizer's."""
    if key.startswith(TRAINED):
        return "model." + key.removeprefix(TRAINED)
    for part, prefix in FROZEN.items():
        if key.startswith(prefix):
            return f"model.{part}.{key.removeprefix(prefix)}"
    raise KeyError(key)


def translate_released_keys(state: dict[str, torch.Tensor], prefix: str) -> None:
    """Rename the released keys in ``state``, in place, to those of a recognizer under ``prefix``."""
    for key in [key for key in state if is_released_key(key)]:
        value = state.pop(key)
        if (renamed := to_recognizer_key(key)) is not None:
            state[prefix + renamed] = value
