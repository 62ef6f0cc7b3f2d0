"""Modules that are never trained."""

from torch import nn


class FrozenModule(nn.Module):
    """A module without gradients that stays in eval mode when its parents are set to train."""

    def freeze(self) -> None:
        """Turn gradients off; called when all submodules are in place."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenModule":
        super().train(False)
        return self
