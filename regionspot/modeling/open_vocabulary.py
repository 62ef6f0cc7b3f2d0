"""The open-vocabulary side of a recognizer: class names in use, and scores of regions against them."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from regionspot.modeling.classifier import TextClassifier
from regionspot.modeling.entry_embeddings import embed_vocabulary
from regionspot.modeling.geometric_ensemble import GeometricEnsemble
from regionspot.modeling.vision_language import VisionLanguageModel
from regionspot.vocabulary import VocabularySource, load_vocabulary

BACKGROUND = "background of MODEL.REGIONSPOT.UNKNOWN"  # key of its names in the classifier


class OpenVocabulary(nn.Module):
    """A mixin of ``RegionRecognizer``, whose constructor sets the attributes: its methods about names."""

    vision_language: VisionLanguageModel
    classifier: TextClassifier
    background: list[str]
    ensemble: GeometricEnsemble | None

    def set_vocabulary(self, names: VocabularySource, key: str = "default") -> None:
        """Recognize ``names`` from now on.

        Args:
            names: class names in the order of the class indices, or anything else ``load_vocabulary`` takes.
            key: name of the vocabulary; setting the same names under the same key again costs nothing.

        Raises:
            ValueError: no names, an empty name, or a name too long for CLIP; the old vocabulary then stays.
        """
        self.classifier.add(key, embed_vocabulary(self, load_vocabulary(names, with_examples=True)), encode=True)
        self.classifier.active = key

    def encode_vocabulary(self, names: VocabularySource) -> tuple[list[str], torch.Tensor]:
        """Return names and their (K, text_dim) embeddings for ``classify``; the vocabulary in use stays."""
        loaded = embed_vocabulary(self, load_vocabulary(names, with_examples=True))
        return list(loaded), self.classifier.text_encoder(loaded)

    @contextmanager
    def using_vocabulary(self, names: VocabularySource) -> Iterator[None]:
        """Recognize ``names`` inside the block and the vocabulary before it again after it."""
        before = self.classifier.active
        key = f"within {before}"  # nested blocks have different keys
        self.set_vocabulary(names, key)
        try:
            yield
        finally:
            self.classifier.active = before
            self.classifier.remove(key)

    @property
    def vocabulary(self) -> list[str]:
        """Class names in use. Raises a ValueError when none are set."""
        return self.classifier.names

    def score_images(
        self,
        embeddings: list[torch.Tensor],
        vocabularies: Sequence[str | torch.Tensor] = (),
        with_background: bool = False,
        dense_embeddings: list[torch.Tensor] | None = None,
        names: Sequence[str] = (),
    ) -> list[torch.Tensor]:
        """Return the logits of B images' regions, each as from ``score``; ``vocabularies`` are as for ``classify``."""
        vocabularies = vocabularies or [""] * len(embeddings)
        keys = {id(x) if isinstance(x, torch.Tensor) else x for x in vocabularies}
        if len(embeddings) == len(vocabularies) and len(keys) == 1:  # all images together
            all_dense = torch.cat(dense_embeddings) if dense_embeddings else None
            logits = self.score(torch.cat(embeddings), vocabularies[0], with_background, all_dense, names)
            return list(logits.split([len(x) for x in embeddings]))
        parts = zip(embeddings, vocabularies, dense_embeddings or itertools.repeat(None, len(embeddings)), strict=True)
        return [self.score(x, vocabulary, with_background, dense, names) for x, vocabulary, dense in parts]

    def score(
        self,
        embeddings: torch.Tensor,
        vocabulary: str | torch.Tensor = "",
        with_background: bool = False,
        dense_embeddings: torch.Tensor | None = None,
        names: Sequence[str] = (),
    ) -> torch.Tensor:
        """Return the logits of regions against a vocabulary, see ``TextClassifier``.

        Args:
            embeddings: (N, text_dim) float semantic tokens.
            vocabulary: its key, "" for the one in use; or its embeddings, (K, text_dim) float32.
            with_background: append the logits of the background names.
            dense_embeddings: (N, text_dim) float, CLIP's own of the same regions, for the ensemble; None for the
                module's logits alone.
            names: those of a vocabulary that is given by its embeddings, for the ensemble.

        Returns:
            (N, K) float32, K + background names with these.
        """
        if isinstance(vocabulary, str):
            names, vocabulary = self.classifier.get(vocabulary)
        texts = (
            [vocabulary, self.classifier.get(BACKGROUND)[1]] if with_background and self.background else [vocabulary]
        )
        logits = self._compare(embeddings, texts)
        if dense_embeddings is None:
            return logits
        assert self.ensemble is not None
        clip_logits = self._compare(dense_embeddings, texts)
        # a region with an empty mask has no features of CLIP's
        clip_logits = torch.where(dense_embeddings.any(dim=1, keepdim=True), clip_logits, logits)
        return self.ensemble.combine(logits, clip_logits, names, sum(map(len, texts[1:])))

    def _compare(self, embeddings: torch.Tensor, texts: Sequence[torch.Tensor]) -> torch.Tensor:
        vision = self.vision_language
        return torch.cat(
            [self.classifier(embeddings, vision.logit_scale, text, vision.logit_bias) for text in texts], dim=1
        )
