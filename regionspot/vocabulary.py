"""Vocabularies: class names from any source, and the prompt templates that CLIP encodes them in."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from regionspot.utils.files import expand_user, read_json
from regionspot.vocabulary_entries import EmbeddedVocabulary, EntryVocabulary, load_embedded, parse_entries

logger = logging.getLogger(__name__)

# The 80 ImageNet prompt templates of OpenAI's CLIP (Radford et al. 2021, section 3.1.4).
IMAGENET_TEMPLATES = (
    "a photo of a {}.",
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "all": ("{}.", *IMAGENET_TEMPLATES),
    "one": ("a photo of a {}.",),
    "none": ("{}",),
}


class Vocabulary(list[str]):
    """Class names with synonyms: CLIP encodes the synonyms of a name, and their embeddings are averaged.

    Attributes:
        phrases: the synonyms of each name, which include the name itself only if they list it.
    """

    phrases: list[tuple[str, ...]]

    def __init__(self, synonyms: Mapping[str, str | Sequence[str]]) -> None:
        super().__init__(synonyms)
        self.phrases = [(phrases,) if isinstance(phrases, str) else tuple(phrases) for phrases in synonyms.values()]

    # A list of the same names without synonyms has other embeddings.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, list) and super().__eq__(other) and self.phrases == get_phrases(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]


VocabularySource = str | Sequence[str] | Mapping[str, str | Sequence[str]]


def get_phrases(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the phrases that CLIP encodes for each class name: its synonyms in a ``Vocabulary``, else the name."""
    return names.phrases if isinstance(names, Vocabulary) else [(name,) for name in names]


def load_vocabulary(source: VocabularySource, with_examples: bool = False) -> list[str]:
    """Return class names from any source.

    Args:
        source: a sequence of names; a mapping from names to their synonyms; "a,b,c"; "dataset:coco_2017_val" for the
            names of a registered data set; or "@path" (the @ is optional if the path ends in .txt or .json): a text
            file with one name per line, a JSON list of names, a JSON object from names to lists of synonyms, or a
            JSON file with COCO's or LVIS's ``categories``. In JSON an entry may also be an object with prompts,
            example regions and negatives; ".safetensors" is a vocabulary that was embedded already.
        with_examples: whether the caller can embed such objects, and use embeddings, as recognizers can.

    Returns:
        The names; with synonyms a ``Vocabulary``, with other entries an ``EntryVocabulary`` or ``EmbeddedVocabulary``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no names, an empty name, a JSON file of another format, or any other source; or a vocabulary with
            examples where only names are used, as in training.
    """
    names = _load_any(source)
    if isinstance(names, (EntryVocabulary, EmbeddedVocabulary)) and not with_examples:
        shown = source if isinstance(source, str) else "vocabulary"
        raise ValueError(
            f"{shown}: its entries are more than names, but training and evaluation use names alone; such a vocabulary "
            "is for predict, search, classify-index and set_vocabulary"
        )
    return names


def _load_any(source: VocabularySource) -> list[str]:
    if isinstance(source, (EntryVocabulary, EmbeddedVocabulary)):
        return source
    if not isinstance(source, str) and isinstance(source, (Mapping, Sequence)):
        entries = parse_entries(source, "vocabulary", Path())
        if entries is not None:
            return entries
    if isinstance(source, Mapping):
        return check_synonyms(source, "vocabulary")
    if not isinstance(source, str):
        return check_names(source, "vocabulary")
    if source.startswith("dataset:"):
        name = source.removeprefix("dataset:")
        if not (names := dataset_names(name) if name else []):
            raise ValueError(
                f"vocabulary {source!r}: expected a registered data set with class names; those of an annotation file "
                "are '@annotations.json'"
            )
        return check_names(names, f"vocabulary {source!r}")
    # No class is named "a.json": without the @ a path is meant, too.
    if source.startswith("@") or source.endswith((".txt", ".json", ".safetensors")):
        path = expand_user(source.removeprefix("@"))
        if not path.is_file():
            raise FileNotFoundError(f"vocabulary {str(path)!r}: no such file. Expected one name a line (.txt), or JSON")
        if path.suffix == ".safetensors":
            return load_embedded(path)
        content = _read_names(path)
        if path.suffix == ".json" and (entries := parse_entries(content, str(path), path.parent)) is not None:
            check_names(list(entries), str(path))
            return entries
        return check_names(content, str(path)) if isinstance(content, list) else check_synonyms(content, str(path))
    return check_names([name.strip() for name in source.split(",") if name.strip()], "vocabulary")


def _read_names(path: Path) -> list[Any] | dict[str, Any]:
    if path.suffix != ".json":
        try:
            text = path.read_text(encoding="utf-8-sig")  # Windows editors add a byte order mark
        except ValueError as error:
            raise ValueError(f"vocabulary {path}: not readable as UTF-8 text ({error})") from error
        return [line.strip() for line in text.splitlines() if line.strip()]
    content = read_json(path, "vocabulary")
    # COCO's and LVIS's files: in the order of the ids, as the classes of their data sets.
    if isinstance(content, dict) and isinstance(content.get("categories"), list):
        try:
            return [category["name"] for category in sorted(content["categories"], key=lambda category: category["id"])]
        except (KeyError, TypeError) as error:
            raise ValueError(f"vocabulary {path}: every category needs an id and a name") from error
    if not isinstance(content, (list, dict)):
        raise ValueError(
            f"vocabulary {path}: expected a list of names, an object of names and lists of synonyms, or COCO's "
            f"'categories'; got {type(content).__name__}"
        )
    return content


def dataset_names(name: str) -> list[str]:
    """Return the class names of a registered data set; [] if it is not registered or has no names.

    Names that are only in the annotation file are read, with its errors.
    """
    if not name:
        return []
    metadata = MetadataCatalog.get(name)  # creates an empty entry for an unknown name
    if not metadata.get("thing_classes") and name in DatasetCatalog:
        DatasetCatalog.get(name)
    return list(metadata.get("thing_classes") or [])


def check_names(names: Sequence[Any], what: str) -> list[str]:
    """Return ``names`` as a list of strings, or raise a ValueError that names the first invalid one."""
    if isinstance(names, Vocabulary):
        return names
    if not isinstance(names, Iterable):
        raise ValueError(f"{what}: expected class names, got {names!r:.80}")
    # a string is a sequence of strings, too: its characters
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError(f"{what}: no class names; expected at least one")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{what}: name number {index} is {name!r}; expected a non-empty string")
    # A warning only: official data sets have repeated names.
    if len(set(names)) < len(names):
        repeated = [name for name, count in Counter(names).items() if count > 1]
        logger.warning(
            "%s: %d names occur more than once %s; they share their scores",
            what,
            len(names) - len(set(names)),
            sorted(repeated)[:5],
        )
    return names


def check_synonyms(synonyms: Mapping[str, Any], what: str) -> Vocabulary:
    """Return names with synonyms, or raise a ValueError for the first whose synonyms are not strings."""
    check_names(list(synonyms), what)
    for name, phrases in synonyms.items():
        if not isinstance(phrases, (str, list, tuple)):
            raise ValueError(f"{what}: expected the synonyms of {name!r} as a list of strings, got {phrases!r}")
        check_names(phrases, f"{what}: synonyms of {name!r}")
    return Vocabulary(synonyms)


def clean_name(name: str, style: str = "dataset") -> str:
    """Return a class name as it is inserted into the prompts.

    Args:
        name: a class name of a data set.
        style: "dataset" removes "-other", "-merged" and "-stuff" only, as for the published numbers; "readable" also
            replaces underscores by spaces and removes brackets.
    """
    # Suffixes of COCO's panoptic and stuff classes: "tree-merged", "wall-other".
    for suffix in ("-other", "-merged", "-stuff"):
        name = name.replace(suffix, "")
    if style == "readable":
        name = re.sub(r"\s+", " ", re.sub(r"[_()\[\]]", " ", name)).strip()
    elif style != "dataset":
        raise ValueError(f"CLIP.NAME_STYLE: expected 'dataset' or 'readable', got {style!r}")
    return name


def get_templates(name: str) -> tuple[str, ...]:
    """Return the prompt templates of a set: "all" (81), "one" or "none"."""
    if name not in TEMPLATE_SETS:
        raise ValueError(f"CLIP.TEMPLATES: expected one of {', '.join(TEMPLATE_SETS)}, got {name!r}")
    return TEMPLATE_SETS[name]
