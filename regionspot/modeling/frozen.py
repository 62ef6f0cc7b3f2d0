"""Modules that are never trained."""

from typing import Any

import torch
from fvcore.common.registry import Registry
from torch import nn

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def get_dtype(precision: str) -> torch.dtype:
    """Return the dtype of a precision's name."""
    if precision not in PRECISIONS:
        raise ValueError(f"MODEL.REGIONSPOT.PRECISION: expected one of {', '.join(PRECISIONS)}; got {precision!r}")
    return PRECISIONS[precision]


class FrozenModule(nn.Module):
    """A module without gradients that stays in eval mode when its parents are set to train."""

    def freeze(self) -> None:
        """Turn gradients off; called when all submodules are in place."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenModule":
        super().train(False)
        return self

    def rename_official_keys(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the weights of an official file under the keys of the model's own state dict, without unused ones.

        Weights under the model's own keys are returned as they are.
        """
        return state


def get_registered(registry: Registry, name: str, key: str) -> Any:
    """Return the class that is registered by a name; ``key`` is the config key that has it.

    Raises:
        ValueError: no class of that name.
    """
    if name not in registry:
        known = ", ".join(registered for registered, _ in registry)
        raise ValueError(f"{key}: expected one of {known}; got {name!r}")
    return registry.get(name)
