"""Entries of vocabularies that are more than names: prompts, example regions, negatives; and vocabularies embedded."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from regionspot.utils.files import atomic_path

FORMAT = "regionspot-vocabulary-1"
_KEYS = ("name", "synonyms", "prompts", "examples", "negatives", "weight")


@dataclass(frozen=True)
class Example:
    """A region: an image, and a box (XYXY, original pixels); None for the whole image."""

    image: Path
    box: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Concept:
    """What something is, in words and regions.

    Attributes:
        synonyms: inserted into the model's prompt templates.
        prompts: taken as they are.
        examples: regions of it.
    """

    synonyms: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    examples: tuple[Example, ...] = ()

    @property
    def has_text(self) -> bool:
        return bool(self.synonyms or self.prompts)


@dataclass(frozen=True)
class Entry:
    """A class of a vocabulary.

    Attributes:
        name: what it is called in results.
        concept: what it is.
        negatives: what it is not.
        weight: share of the examples in its embedding, where it has text, too.
    """

    name: str
    concept: Concept
    negatives: tuple[Concept, ...] = ()
    weight: float = 0.5

    @property
    def is_plain(self) -> bool:
        """Whether its embedding is that of its name or synonyms, as in any vocabulary."""
        return not (self.concept.prompts or self.concept.examples or self.negatives)

    @property
    def has_regions(self) -> bool:
        return bool(self.concept.examples or any(negative.examples for negative in self.negatives))


class EntryVocabulary(list[str]):
    """Class names of which some have examples, prompts or negatives; a recognizer embeds them.

    Attributes:
        entries: one for each name.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        super().__init__(entry.name for entry in entries)
        self.entries = list(entries)

    # a list of the same names has other embeddings
    def __eq__(self, other: object) -> bool:
        return isinstance(other, EntryVocabulary) and self.entries == other.entries

    __hash__ = None  # type: ignore[assignment]


class EmbeddedVocabulary(list[str]):
    """Class names with their embeddings.

    Attributes:
        embeddings: (K, D) float32, of any length: regions are compared with them by dot products.
        made_by: fingerprints of the weights that made them.
    """

    def __init__(self, names: Sequence[str], embeddings: torch.Tensor, made_by: Mapping[str, Any]) -> None:
        super().__init__(names)
        self.embeddings, self.made_by = embeddings, dict(made_by)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, EmbeddedVocabulary)
            and list(self) == list(other)
            and torch.equal(self.embeddings, other.embeddings)
        )

    __hash__ = None  # type: ignore[assignment]

    def check(self, made_by: Mapping[str, Any]) -> None:
        """Refuse a vocabulary that other weights made.

        Raises:
            ValueError: with both fingerprints.
        """
        for part, value in self.made_by.items():
            if made_by.get(part) != value:
                raise ValueError(
                    f"the vocabulary was embedded with another {part}: expected {str(made_by.get(part))[:12]}, got "
                    f"{str(value)[:12]}; embed it again with this model: regionspot vocabulary embed"
                )


def parse_entries(content: Sequence[Any] | Mapping[str, Any], what: str, root: Path) -> EntryVocabulary | None:
    """Return the entries of a JSON vocabulary, None if all are names or synonyms.

    Args:
        content: a list of names and objects with a ``name``; or an object from names to synonyms or objects.
        what: the file, for messages.
        root: directory that paths of images are relative to.

    Raises:
        ValueError: an entry of another form.
    """
    is_mapping = isinstance(content, Mapping)
    values = list(content.values()) if isinstance(content, Mapping) else list(content)
    if not any(isinstance(value, Mapping) for value in values):
        return None
    names = list(content) if is_mapping else [x.get("name") if isinstance(x, Mapping) else x for x in values]
    entries = []
    for number, (name, value) in enumerate(zip(names, values)):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{what}: entry number {number} has no name; expected a non-empty string")
        if isinstance(value, Mapping):
            entries.append(_parse_entry(name, value, f"{what}: {name!r}", root))
        else:
            entries.append(Entry(name, Concept(_strings(value, f"{what}: synonyms of {name!r}"))))
    return EntryVocabulary(entries)


def _parse_entry(name: str, content: Mapping[str, Any], what: str, root: Path) -> Entry:
    if unknown := sorted(content.keys() - set(_KEYS)):
        raise ValueError(f"{what}: unknown key {unknown[0]!r}; expected some of {', '.join(_KEYS)}")
    concept = _parse_concept(content, what, root)
    if not concept.has_text and not concept.examples:
        concept = Concept((name,))
    negatives = content.get("negatives", [])
    if not isinstance(negatives, list):
        raise ValueError(f"{what}: negatives: expected a list, got {str(negatives)[:60]}")
    weight = content.get("weight", 0.5)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight <= 1:
        raise ValueError(f"{what}: weight: expected a number in [0, 1], got {weight!r}")
    parsed = tuple(_parse_negative(x, f"{what}: negatives[{i}]", root) for i, x in enumerate(negatives))
    return Entry(name, concept, parsed, float(weight))


def _parse_concept(content: Mapping[str, Any], what: str, root: Path) -> Concept:
    examples = content.get("examples", [])
    if not isinstance(examples, list):
        raise ValueError(f"{what}: examples: expected a list, got {str(examples)[:60]}")
    return Concept(
        _strings(content.get("synonyms", []), f"{what}: synonyms"),
        _strings(content.get("prompts", []), f"{what}: prompts"),
        tuple(_parse_example(x, f"{what}: examples[{i}]", root) for i, x in enumerate(examples)),
    )


def _parse_negative(content: Any, what: str, root: Path) -> Concept:
    if isinstance(content, str):
        return Concept(_strings(content, what))
    if isinstance(content, Mapping) and "image" in content:
        return Concept(examples=(_parse_example(content, what, root),))
    if isinstance(content, Mapping) and content.keys() <= {"synonyms", "prompts", "examples"} and content:
        concept = _parse_concept(content, what, root)
        if concept.has_text or concept.examples:
            return concept
    raise ValueError(
        f"{what}: expected a name, an object with prompts, or an image with a box; got {str(content)[:60]}"
    )


def _parse_example(content: Any, what: str, root: Path) -> Example:
    if not isinstance(content, Mapping) or not content.keys() <= {"image", "box"} or "image" not in content:
        raise ValueError(f"{what}: expected an object with image and box, got {str(content)[:60]}")
    box = content.get("box")
    is_box = isinstance(box, list) and len(box) == 4 and all(type(x) in (int, float) for x in box)
    if not isinstance(content["image"], str) or not (box is None or is_box):
        raise ValueError(f"{what}: expected a path and four numbers x0, y0, x1, y1, got {str(content)[:60]}")
    return Example(root / content["image"], tuple(map(float, box)) if box else None)


def _strings(value: Any, what: str) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(x, str) and x.strip() for x in values):
        raise ValueError(f"{what}: expected a list of non-empty strings, got {str(value)[:60]}")
    return tuple(values)


def save_embedded(path: str | Path, vocabulary: EmbeddedVocabulary) -> None:
    """Write an embedded vocabulary as safetensors, with its names and fingerprints as metadata."""
    metadata = {"format": FORMAT, "names": json.dumps(list(vocabulary)), "made_by": json.dumps(vocabulary.made_by)}
    with atomic_path(path) as temporary:
        save_file({"embeddings": vocabulary.embeddings.cpu().float().contiguous()}, temporary, metadata)


def load_embedded(path: Path) -> EmbeddedVocabulary:
    """Read an embedded vocabulary.

    Raises:
        ValueError: damaged, or another file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata, embeddings = file.metadata() or {}, file.get_tensor("embeddings")
        if metadata.get("format") != FORMAT:
            raise ValueError(f"format {metadata.get('format')!r}")
        names, made_by = json.loads(metadata["names"]), json.loads(metadata["made_by"])
        if not isinstance(made_by, dict) or not isinstance(names, list) or not all(isinstance(x, str) for x in names):
            raise ValueError("its names or fingerprints are damaged")
        if embeddings.dtype != torch.float32 or embeddings.dim() != 2 or not len(names) == len(embeddings) > 0:
            raise ValueError(f"{len(names)} names, but embeddings of shape {tuple(embeddings.shape)}")
        if not embeddings.isfinite().all():
            raise ValueError("embeddings are not finite")
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"vocabulary {path}: expected {FORMAT}, as regionspot vocabulary embed writes ({error})"
        ) from None
    return EmbeddedVocabulary(names, embeddings, made_by)
