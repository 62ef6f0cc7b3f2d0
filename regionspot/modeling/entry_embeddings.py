"""Embeddings of vocabulary entries: names, prompts, example regions and negatives become one vector a class."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from regionspot.modeling.identity import fingerprints
from regionspot.modeling.vision_language.text_encoder import TextEncoder
from regionspot.structures import Prompts, check_boxes
from regionspot.utils.images import to_rgb_array
from regionspot.vocabulary import Vocabulary
from regionspot.vocabulary_entries import Concept, EmbeddedVocabulary, Entry, EntryVocabulary, Example

# Chosen on the validation split of the miniature world, see docs/find.md.
NEGATIVE_SHARE = 0.25  # of the negatives' direction that is subtracted
GRID = 4  # boxes a side that stand for regions of any class, in each image with examples


def embed_vocabulary(recognizer: Any, names: list[str], references: torch.Tensor | None = None) -> list[str]:
    """Return a vocabulary that the text encoder can embed: entries with examples are embedded now.

    Args:
        recognizer: the ``RegionRecognizer``, with its weights.
        names: of ``load_vocabulary``. Names and synonyms are returned as they are.
        references: see ``EntryEncoder``.

    Raises:
        FileNotFoundError, ValueError: an example's image or box is invalid, or other weights embedded the vocabulary.
    """
    if isinstance(names, EmbeddedVocabulary):
        names.check(fingerprints(recognizer, with_regions=True))
        return names
    if not isinstance(names, EntryVocabulary):
        return names
    embeddings = EntryEncoder(recognizer, names.entries, references)().cpu()
    has_regions = any(entry.has_regions for entry in names.entries)
    return EmbeddedVocabulary(list(names), embeddings, fingerprints(recognizer, has_regions))


class EntryEncoder:
    """Embeds entries.

    Texts and regions are in different parts of the space (Liang et al., "Mind the Gap", NeurIPS 2022): a region is far
    more similar to any region than to its own name, so that as classes, examples would win everywhere. Of a text or an
    example counts only what distinguishes it from the mean of its kind, and the class is scaled and moved until its
    similarities with reference regions have the mean and about the standard deviation that those of names have.
    """

    def __init__(self, recognizer: Any, entries: Sequence[Entry], references: torch.Tensor | None = None) -> None:
        """
        Args:
            recognizer: the ``RegionRecognizer``.
            entries: K classes.
            references: (R, D) normalized embeddings of regions of any class; by default those of a grid of boxes in the
                images of the examples.
        """
        self.recognizer, self.entries = recognizer, entries
        text = recognizer.classifier.text_encoder
        self._templates = text
        self._bare = TextEncoder(text.vision_language, "none", text.name_style, text.batch_size)  # prompts are whole
        self._texts = text(Vocabulary({str(i): _phrases(entry) for i, entry in enumerate(entries)})).cpu()  # (K, D)
        self._regions: dict[Example, torch.Tensor] = {}
        grids = self._embed_examples()
        self._references = torch.cat(grids) if references is None and grids else references

    def __call__(self) -> torch.Tensor:
        """Return the (K, D) float32 embeddings: normalized for texts, calibrated for examples."""
        return torch.stack([self._embed(entry) for entry in self.entries])

    def _embed(self, entry: Entry) -> torch.Tensor:
        embedding = self._concept(entry.concept, entry.weight, entry.has_regions)
        if entry.negatives:
            negatives = [self._concept(negative, 0.5, entry.has_regions) for negative in entry.negatives]
            offset = 0.0 if entry.has_regions else self._texts.mean(dim=0)
            # Rocchio's relevance feedback
            embedding = embedding - NEGATIVE_SHARE * (torch.stack(negatives).mean(dim=0) - offset)
        return self._calibrate(embedding) if entry.has_regions else F.normalize(embedding, dim=0)

    def _concept(self, concept: Concept, weight: float, is_relative: bool) -> torch.Tensor:
        """Return the (D,) embedding of a concept, relative to the means of texts and regions if it is to be mixed.

        ``weight`` is the share of its examples.
        """
        texts = []
        if concept.synonyms:
            texts.append(self._templates(Vocabulary({"": concept.synonyms})).cpu()[0])
        if concept.prompts:
            texts.append(self._bare(Vocabulary({"": concept.prompts})).cpu()[0])
        text = F.normalize(torch.stack(texts).mean(dim=0), dim=0) if texts else None
        if not is_relative:
            assert text is not None
            return text
        parts = [] if text is None else [(1 - weight, text - self._texts.mean(dim=0))]
        if concept.examples:
            mean = torch.stack([self._regions[example] for example in concept.examples]).mean(dim=0)
            assert self._references is not None
            parts.append((weight if parts else 1.0, mean - self._references.mean(dim=0)))
        mixed = sum((share * self._standardize(part) for share, part in parts), torch.zeros(self._texts.shape[1]))
        return self._standardize(mixed)

    def _standardize(self, direction: torch.Tensor) -> torch.Tensor:
        """Scale a (D,) direction until its similarities with the references have a standard deviation of 1."""
        assert self._references is not None
        return direction / (self._references @ direction).std().clamp(min=1e-6)

    def _calibrate(self, direction: torch.Tensor) -> torch.Tensor:
        """Return the (D,) class of a direction whose similarities with the references are as those of names."""
        assert self._references is not None
        of_names = self._references @ self._texts.t()  # (R, K)
        scaled = of_names.std(dim=0).mean() * self._standardize(direction)
        center = self._references.mean(dim=0)
        shift = of_names.mean() - (self._references @ scaled).mean()
        return scaled + shift * center / center.square().sum()

    def _embed_examples(self) -> list[torch.Tensor]:
        """Embed all examples, image by image; return the embeddings of the grids of their images."""
        concepts = [x for entry in self.entries for x in (entry.concept, *entry.negatives)]
        examples = list(dict.fromkeys(example for concept in concepts for example in concept.examples))
        grids = []
        for image in dict.fromkeys(example.image for example in examples):
            own = [example for example in examples if example.image == image]
            embeddings, grid = self._embed_image(own)
            self._regions.update(zip(own, embeddings))
            grids.append(grid)
        return grids

    @torch.no_grad()
    def _embed_image(self, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (n, D) embeddings of an image's examples, each by itself, and (GRID**2, D) of its grid."""
        recognizer = self.recognizer
        image = to_rgb_array(examples[0].image, recognizer.deep_range)
        height, width = image.shape[:2]
        boxes = torch.tensor([example.box or (0.0, 0.0, width, height) for example in examples])
        check_boxes(boxes, (height, width), f"examples in {examples[0].image}")
        features = recognizer.encode_images([torch.from_numpy(np.array(image)).permute(2, 0, 1)])
        grid = _grid(height, width)
        [located] = recognizer.locate(features, [Prompts(boxes=torch.cat([boxes, grid]))])
        tokens = located.tokens
        # regions of an image attend to each other: an example must not depend on which others there are
        groups = [*tokens[: len(boxes)].split(1), tokens[len(boxes) :]]
        maps = features.feature_map
        maps = None if maps is None else maps.expand(len(groups), -1, -1)
        semantic = recognizer.knowledge_integration(groups, maps)
        normalized = [F.normalize(x.float(), dim=1).cpu() for x in semantic]
        return torch.cat(normalized[:-1]), normalized[-1]


def _phrases(entry: Entry) -> tuple[str, ...]:
    return entry.concept.synonyms or (entry.name,)


def _grid(height: int, width: int) -> torch.Tensor:
    """Return (GRID**2, 4) XYXY boxes that cover an image."""
    xs, ys = torch.linspace(0, width, GRID + 1), torch.linspace(0, height, GRID + 1)
    return torch.stack([torch.stack([xs[i], ys[j], xs[i + 1], ys[j + 1]]) for j in range(GRID) for i in range(GRID)])
