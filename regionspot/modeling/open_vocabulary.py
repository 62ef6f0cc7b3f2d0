"""The open-vocabulary side of a recognizer: class names in use, and scores of regions against them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from regionspot.modeling.classifier import TextClassifier
from regionspot.modeling.entry_embeddings import embed_vocabulary
from regionspot.modeling.geometric_ensemble import GeometricEnsemble
from regionspot.modeling.vision_language import VisionLanguageModel
from regionspot.vocabulary import VocabularySource, load_vocabulary

BACKGROUND = "background of MODEL.REGIONSPOT.UNKNOWN"  # key of its names in the classifier


class OpenVocabulary(nn.Module):
    """What ``RegionRecognizer`` knows of names.

    Attributes:
        vision_language: the frozen vision-language model.
        classifier: holds the vocabularies and their embeddings.
        background: names of what is no object.
        ensemble: how CLIP's own scores join the module's, or None.
    """

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
        names: Sequence[str] = (),
    ) -> list[torch.Tensor]:
        """Return the logits of B images' regions, each as from ``score``; ``vocabularies`` are as for ``classify``."""
        vocabularies = vocabularies or [""] * len(embeddings)
        keys = {id(x) if isinstance(x, torch.Tensor) else x for x in vocabularies}
        if len(embeddings) == len(vocabularies) and len(keys) == 1:  # all images together
            logits = self.score(torch.cat(embeddings), vocabularies[0], with_background, names)
            return list(logits.split([len(x) for x in embeddings]))
        return [self.score(x, v, with_background, names) for x, v in zip(embeddings, vocabularies, strict=True)]

    def score(
        self,
        embeddings: torch.Tensor,
        vocabulary: str | torch.Tensor = "",
        with_background: bool = False,
        names: Sequence[str] = (),
    ) -> torch.Tensor:
        """Return the (N, K) logits of ``region_embeddings`` or semantic tokens against a vocabulary.

        ``names`` are those of a vocabulary that is given by its embeddings; other arguments are ``classify``'s.
        """
        vision = self.vision_language
        keys = [vocabulary, BACKGROUND] if with_background and self.background else [vocabulary]
        logits, *clip_logits = (
            torch.cat([self.classifier(x, vision.logit_scale, key, vision.logit_bias) for key in keys], dim=1)
            for x in embeddings.split(vision.text_dim, dim=1)
        )
        if self.ensemble is None or not clip_logits:
            return logits
        names = self.classifier.get_names(vocabulary) if isinstance(vocabulary, str) else names
        return self.ensemble.combine(logits, clip_logits[0], names)

    def normalize(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return one (N, text_dim) float32 embedding of length 1 for each of an image's ``region_embeddings``."""
        parts = embeddings.split(self.vision_language.text_dim, dim=1)
        blended = self.ensemble.blend(*parts) if self.ensemble is not None and len(parts) > 1 else parts[0]
        return F.normalize(blended.float(), dim=1)
