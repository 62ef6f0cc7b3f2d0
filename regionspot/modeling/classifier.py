"""Regions against a vocabulary: cosine logits (paper, equation 3)."""

import copy
import threading

import torch
from torch import nn

from regionspot.modeling.vision_language.text_encoder import TextEncoder
from regionspot.vocabulary import get_phrases

_LOCK = threading.RLock()  # of the vocabularies; a lock of a module's own would keep it from being copied


class TextClassifier(nn.Module):
    """Holds vocabularies, their embeddings as buffers, and scores semantic tokens against the one in use.

    Several vocabularies live side by side under keys. The embeddings are not part of the state dict: they follow
    from the names and from CLIP, and are encoded when they are first needed.
    """

    def __init__(self, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.vocabularies: dict[str, list[str]] = {}
        self.active = ""

    def add(self, key: str, names: list[str], encode: bool = False) -> None:
        """Keep ``names`` under ``key``; what was there before is forgotten, unless it is the same.

        With ``encode`` they are encoded now; a ValueError of that leaves what was there.
        """
        with _LOCK:
            same, buffer = self.vocabularies.get(key) == names, _buffer(key)
            embeddings = self.text_encoder(names) if encode and not (same and buffer in self._buffers) else None
            if not same:
                self.remove(key)
                self.vocabularies[key] = copy.copy(names)
            if embeddings is not None:
                self.register_buffer(buffer, embeddings, persistent=False)

    def remove(self, key: str) -> None:
        """Forget the vocabulary under ``key``, if there is one."""
        with _LOCK:
            if self.vocabularies.pop(key, None) is not None:
                self._buffers.pop(_buffer(key), None)

    def forget_embeddings(self) -> None:
        """Let all embeddings be encoded anew when they are next needed: CLIP's weights have changed."""
        with _LOCK:
            for key in self.vocabularies:
                self._buffers.pop(_buffer(key), None)

    @property
    def names(self) -> list[str]:
        """Class names of the vocabulary in use."""
        return self.get_names()

    @property
    def embeddings(self) -> torch.Tensor:
        """(K, text_dim) float32 text embeddings of the vocabulary in use."""
        return self.get_embeddings()

    def get_names(self, key: str = "") -> list[str]:
        """Return the class names of the vocabulary under ``key``, "" for the one in use."""
        key = key or self.active
        if not key:
            raise ValueError("no vocabulary is set: call set_vocabulary(names), or give MODEL.REGIONSPOT.VOCABULARY")
        if key not in self.vocabularies:
            raise KeyError(f"vocabulary {key!r} is not set: expected one of {', '.join(self.vocabularies) or 'none'}")
        return list(self.vocabularies[key])

    def get_phrases(self) -> list[tuple[str, ...]]:
        """Return what CLIP reads for each class of the vocabulary in use: its name, or its synonyms."""
        self.get_names()
        return get_phrases(self.vocabularies[self.active])

    def get_embeddings(self, key: str = "") -> torch.Tensor:
        """Return the (K, text_dim) float32 embeddings of the vocabulary under ``key``, "" for the one in use."""
        return self.get(key)[1]

    def get(self, key: str = "") -> tuple[list[str], torch.Tensor]:
        """Return the class names under ``key``, "" for those in use, and their embeddings, which belong together."""
        with _LOCK:
            names, buffer = self.get_names(key), _buffer(key or self.active)
            if buffer not in self._buffers:
                embeddings = self.text_encoder(self.vocabularies[key or self.active])
                self.register_buffer(buffer, embeddings, persistent=False)
            return names, self.get_buffer(buffer)

    def forward(
        self, semantic_tokens: torch.Tensor, logit_scale: torch.Tensor, vocabulary: str | torch.Tensor = ""
    ) -> torch.Tensor:
        """Return exp(logit_scale) * cosine.

        Args:
            semantic_tokens: (N, text_dim) float.
            logit_scale: CLIP's own, a scalar.
            vocabulary: its key, "" for the one in use; or its embeddings, (K, text_dim) float32.

        Returns:
            (N, K) float32 logits.
        """
        embeddings = vocabulary if isinstance(vocabulary, torch.Tensor) else self.get_embeddings(vocabulary)
        with torch.autocast(semantic_tokens.device.type, enabled=False):
            tokens = semantic_tokens.float()
            tokens = tokens / (tokens.norm(dim=1, keepdim=True) + 1e-7)
            return logit_scale.exp() * tokens @ embeddings.t()


def _buffer(key: str) -> str:
    return "text_embeddings_" + key.encode().hex()
