"""Regions against a vocabulary: cosine logits (paper, equation 3)."""

import torch
from torch import nn


class TextClassifier(nn.Module):
    """Holds vocabularies as buffers and scores semantic tokens against the one in use.

    Several vocabularies live side by side under keys, so that going from one to another costs nothing. The
    embeddings are not part of the state dict: they follow from the names and from CLIP.
    """

    def __init__(self) -> None:
        super().__init__()
        self.vocabularies: dict[str, list[str]] = {}
        self.active = ""

    def set_vocabulary(self, key: str, names: list[str], embeddings: torch.Tensor) -> None:
        """Store a vocabulary under ``key`` and use it; embeddings are (K, text_dim) float, L2-normalised."""
        assert len(names) == len(embeddings), (len(names), len(embeddings))
        self.register_buffer(self._buffer(key), embeddings, persistent=False)
        self.vocabularies[key] = names
        self.active = key

    def drop_vocabularies(self) -> dict[str, list[str]]:
        """Forget all embeddings (CLIP has changed, say) and return the names that they stood for."""
        for key in self.vocabularies:
            delattr(self, self._buffer(key))
        dropped, self.vocabularies, self.active = self.vocabularies, {}, ""
        return dropped

    @staticmethod
    def _buffer(key: str) -> str:
        return "text_embeddings_" + key.encode().hex()

    @property
    def names(self) -> list[str]:
        """Class names of the vocabulary in use."""
        if not self.active:
            raise ValueError("no vocabulary is set: call set_vocabulary(names), or give MODEL.REGIONSPOT.VOCABULARY")
        return self.vocabularies[self.active]

    @property
    def embeddings(self) -> torch.Tensor:
        """(K, text_dim) float text embeddings of the vocabulary in use."""
        assert self.names
        return getattr(self, self._buffer(self.active))

    def forward(self, semantic_tokens: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
        """Return exp(logit_scale) * cosine.

        Args:
            semantic_tokens: (N, text_dim) float.
            logit_scale: CLIP's own, a scalar.

        Returns:
            (N, K) float32 logits.
        """
        with torch.autocast(semantic_tokens.device.type, enabled=False):
            tokens = semantic_tokens.float()
            tokens = tokens / (tokens.norm(dim=1, keepdim=True) + 1e-7)
            return logit_scale.exp() * tokens @ self.embeddings.t()
