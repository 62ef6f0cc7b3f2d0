"""Modules that never learn."""

from torch import nn


class FrozenModule(nn.Module):
    """A module whose parameters take no gradient and which stays in eval mode, whatever its parents are told."""

    def freeze(self) -> None:
        """Switch gradients off; to be called when the submodules are in place."""
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenModule":
        super().train(False)
        return self
