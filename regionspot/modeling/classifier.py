"""The classifier: cosine logits of regions against a vocabulary (paper, equation 3)."""

import copy
import threading

import torch
from torch import nn

from regionspot.modeling.vision_language.text_encoder import TextEncoder
from regionspot.vocabulary import get_phrases

# Of all classifiers: a lock among a module's attributes would keep the module from being copied and pickled.
_LOCK = threading.RLock()


class TextClassifier(nn.Module):
    """Holds vocabularies, their embeddings as buffers, and scores semantic tokens against the one in use.

    Several vocabularies live side by side under keys. The embeddings are not part of the state dict: they follow
    from the names and from CLIP, and are encoded when they are first needed.

    Attributes:
        vocabularies: names by key.
        active: key of the vocabulary in use, "" for none.
    """

    def __init__(self, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.vocabularies: dict[str, list[str]] = {}
        self.active = ""

    def add(self, key: str, names: list[str], encode: bool = False) -> None:
        """Set the vocabulary under ``key``; the same names as before keep their embeddings.

        With ``encode`` they are encoded now; a ValueError from the encoder leaves the old vocabulary in place.
        """
        with _LOCK:
            is_same = self.vocabularies.get(key) == names
            needs_encoding = encode and not (is_same and hasattr(self, _buffer(key)))
            embeddings = self.text_encoder(names) if needs_encoding else None
            if not is_same:
                self.remove(key)
                self.vocabularies[key] = copy.copy(names)
            if embeddings is not None:
                self.register_buffer(_buffer(key), embeddings, persistent=False)

    def remove(self, key: str) -> None:
        """Remove the vocabulary under ``key``, if there is one, and its embeddings."""
        with _LOCK:
            if self.vocabularies.pop(key, None) is not None:
                self._forget(key)

    def forget_embeddings(self) -> None:
        """Drop all embeddings, to be encoded again when they are next needed: CLIP's weights have changed."""
        with _LOCK:
            for key in self.vocabularies:
                self._forget(key)

    def _forget(self, key: str) -> None:
        if hasattr(self, _buffer(key)):
            delattr(self, _buffer(key))

    @property
    def names(self) -> list[str]:
        """Class names of the vocabulary in use."""
        return self.get_names()

    @property
    def embeddings(self) -> torch.Tensor:
        """(K, text_dim) float32 text embeddings of the vocabulary in use."""
        return self.get()[1]

    def get_names(self, key: str = "") -> list[str]:
        """Return the class names of the vocabulary under ``key``, "" for the one in use."""
        key = key or self.active
        if not key:
            raise ValueError("no vocabulary is set: call set_vocabulary(names), or give MODEL.REGIONSPOT.VOCABULARY")
        if key not in self.vocabularies:
            raise KeyError(f"vocabulary {key!r} is not set: expected one of {', '.join(self.vocabularies) or 'none'}")
        return list(self.vocabularies[key])

    def get_phrases(self) -> list[tuple[str, ...]]:
        """Return what CLIP encodes for each class of the vocabulary in use: its name, or its synonyms."""
        self.get_names()
        return get_phrases(self.vocabularies[self.active])

    def get(self, key: str = "") -> tuple[list[str], torch.Tensor]:
        """Return the class names under ``key``, "" for those in use, and their (K, text_dim) float32 embeddings."""
        with _LOCK:  # another thread must not change the vocabulary in between
            names, buffer = self.get_names(key), _buffer(key or self.active)
            if not hasattr(self, buffer):
                embeddings = self.text_encoder(self.vocabularies[key or self.active])
                self.register_buffer(buffer, embeddings, persistent=False)
            return names, self.get_buffer(buffer)

    def forward(
        self,
        semantic_tokens: torch.Tensor,
        logit_scale: torch.Tensor,
        vocabulary: str | torch.Tensor = "",
        logit_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return exp(logit_scale) * cosine similarity + logit_bias.

        Args:
            semantic_tokens: (N, text_dim) float.
            logit_scale: CLIP's own, a scalar.
            vocabulary: its key, "" for the one in use; or its embeddings, (K, text_dim) float32.
            logit_bias: SigLIP's own, a scalar; none for CLIP.

        Returns:
            (N, K) float32 logits.
        """
        embeddings = vocabulary if isinstance(vocabulary, torch.Tensor) else self.get(vocabulary)[1]
        with torch.autocast(semantic_tokens.device.type, enabled=False):  # a logit scale of 100 needs float32
            tokens = semantic_tokens.float()
            tokens = tokens / (tokens.norm(dim=1, keepdim=True) + 1e-7)  # as in the released models
            logits = logit_scale.exp() * tokens @ embeddings.t()  # (N, text_dim) x (text_dim, K)
            return logits if logit_bias is None else logits + logit_bias


def _buffer(key: str) -> str:
    """Return the buffer's name; a key may hold dots, which names of buffers must not."""
    return "text_embeddings_" + key.encode().hex()
