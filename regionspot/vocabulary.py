"""Vocabularies: lists of class names from anywhere, and the prompts that CLIP reads for them."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from regionspot.templates import IMAGENET_TEMPLATES
from regionspot.utils.files import expand_user, read_json

logger = logging.getLogger(__name__)

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "all": ("{}.", *IMAGENET_TEMPLATES),
    "one": ("a photo of a {}.",),
    "none": ("{}",),
}


class Vocabulary(list[str]):
    """Class names of which each is read by CLIP as its synonyms, whose embeddings are averaged.

    Attributes:
        phrases: for each name what CLIP reads in its place: the name itself only where it is among them.
    """

    phrases: list[tuple[str, ...]]

    def __init__(self, synonyms: Mapping[str, str | Sequence[str]]) -> None:
        super().__init__(synonyms)
        self.phrases = [(given,) if isinstance(given, str) else tuple(given) for given in synonyms.values()]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list) and super().__eq__(other) and self.phrases == get_phrases(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]


VocabularySource = str | Sequence[str] | Mapping[str, str | Sequence[str]]


def get_phrases(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return for each class name what CLIP reads: its synonyms in a ``Vocabulary``, else the name."""
    return names.phrases if isinstance(names, Vocabulary) else [(name,) for name in names]


def load_vocabulary(source: VocabularySource) -> list[str]:
    """Return class names from wherever they are.

    Args:
        source: a sequence of names; a mapping of names to their synonyms; "a,b,c"; "dataset:coco_2017_val" for those
            of a registered data set; or "@path" (the @ may be left out before a path that ends in .txt or .json): a
            text file with one name a line, a JSON list of names, a JSON object of names and lists of synonyms, or a
            JSON file with COCO's or LVIS's ``categories``.

    Returns:
        The names; with synonyms a ``Vocabulary``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no names, an empty name, a JSON file of another form, or anything else.
    """
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
    if source.startswith("@") or source.endswith((".txt", ".json")):
        path = expand_user(source.removeprefix("@"))
        if not path.is_file():
            raise FileNotFoundError(f"vocabulary {str(path)!r}: no such file. Expected one name a line (.txt), or JSON")
        content = _read_names(path)
        return check_names(content, str(path)) if isinstance(content, list) else check_synonyms(content, str(path))
    return check_names([name.strip() for name in source.split(",") if name.strip()], "vocabulary")


def _read_names(path: Path) -> list[Any] | dict[str, Any]:
    if path.suffix != ".json":
        try:
            text = path.read_text(encoding="utf-8-sig")
        except ValueError as error:
            raise ValueError(f"vocabulary {path}: not readable as UTF-8 text ({error})") from error
        return [line.strip() for line in text.splitlines() if line.strip()]
    content = read_json(path, "vocabulary")
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
    """Return the class names of a registered data set, none where it has or is none.

    A data set whose names come with its annotations reads them, which raises what reading files raises.
    """
    if not name:
        return []
    metadata = MetadataCatalog.get(name)
    if not metadata.get("thing_classes") and name in DatasetCatalog:
        DatasetCatalog.get(name)
    return list(metadata.get("thing_classes") or [])


def check_names(names: Sequence[Any], what: str) -> list[str]:
    """Return ``names`` as a list of strings, or raise a ValueError that says which name is none."""
    if isinstance(names, Vocabulary):
        return names
    if not isinstance(names, Iterable):
        raise ValueError(f"{what}: expected class names, got {names!r:.80}")
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError(f"{what}: no class names given; expected at least one")
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{what}: name number {index} is {name!r}; expected a non-empty string")
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})[:5] if len(names) < 2000 else []
        logger.warning(
            "%s: %d names occur more than once %s; they share their scores", what, len(names) - len(set(names)), twice
        )
    return names


def check_synonyms(synonyms: Mapping[str, Any], what: str) -> Vocabulary:
    """Return names and their synonyms, or raise a ValueError that says of which name there is no list of strings."""
    check_names(list(synonyms), what)
    for name, given in synonyms.items():
        if not isinstance(given, (str, list, tuple)):
            raise ValueError(f"{what}: expected the synonyms of {name!r} as a list of strings, got {given!r}")
        check_names(given, f"{what}: synonyms of {name!r}")
    return Vocabulary(synonyms)


def clean_name(name: str, style: str = "dataset") -> str:
    """Return the name as it is put into the prompts.

    Args:
        name: a class name of a data set.
        style: "dataset" cuts "-other", "-merged" and "-stuff" only, as the published numbers need it; "readable"
            also turns underscores into spaces and drops brackets.
    """
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
