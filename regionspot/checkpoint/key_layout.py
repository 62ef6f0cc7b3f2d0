"""The key layout of the released checkpoints, and how it maps to the recognizer's own state dict.

Released keys are ``sam.*`` and ``clip_model.*`` (frozen) and ``to_clip.*``, ``decoder.*``, ``projector.*`` (trained),
all under ``model.``.
"""

import torch

TRAINED = "knowledge_integration."
FROZEN = {"sam": "localizer.sam.", "clip_model": "vision_language.clip_model."}
PARTS = {"trained": TRAINED, **FROZEN}  # the parts of a recognizer, and the prefixes of their keys
_TRAINED_MODULES = ("to_clip.", "decoder.", "projector.", "pool_norm.", "pool_proj.")  # the last two are ours
# OpenAI's archives hold these numbers among the weights; CLIP's own loader drops them, too.
_CLIP_EXTRAS = ("input_resolution", "context_length", "vocab_size")


def is_released_key(key: str) -> bool:
    """Return whether ``key`` is one of a released checkpoint."""
    return key.startswith(tuple(f"model.{prefix}" for prefix in (*_TRAINED_MODULES, "sam.", "clip_model.")))


def to_recognizer_key(key: str) -> str | None:
    """Return the recognizer's key for a released key (with or without ``model.``), or None if it has none."""
    key = key.removeprefix("model.")
    if key.startswith(_TRAINED_MODULES):
        return TRAINED + key
    part, _, rest = key.partition(".")
    return FROZEN[part] + rest if part in FROZEN and rest not in _CLIP_EXTRAS else None


def to_released_key(key: str) -> str:
    """Return the released key for one of the recognizer's."""
    for part, prefix in PARTS.items():
        if key.startswith(prefix):
            return f"model.{'' if part == 'trained' else f'{part}.'}{key.removeprefix(prefix)}"
    raise KeyError(key)


def rename_released_keys(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return ``state`` under the recognizer's keys, without entries that the recognizer has no key for."""
    return {renamed: value for key, value in state.items() if (renamed := to_recognizer_key(key)) is not None}


def translate_released_keys(state: dict[str, torch.Tensor], prefix: str) -> None:
    """Rename the released keys in ``state``, in place, to those of a recognizer under ``prefix``."""
    released = {key: state.pop(key) for key in list(state) if is_released_key(key)}
    state.update({prefix + key: value for key, value in rename_released_keys(released).items()})


def select(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the entries of ``state`` whose keys begin with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
