"""Vocabularies: lists of class names from anywhere, and the prompts that CLIP reads for them."""

import logging
import re
from collections.abc import Iterable, Sequence
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


def load_vocabulary(source: str | Sequence[str]) -> list[str]:
    """Return class names from wherever they are.

    Args:
        source: a sequence of names; "a,b,c"; "dataset:coco_2017_val" for those of a registered data set; or "@path"
            (the @ may be left out before a path that ends in .txt or .json): a text file with one name a line, a JSON
            list of names, or a JSON file with COCO's or LVIS's ``categories``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no names, an empty name, or a JSON file of another form.
    """
    if not isinstance(source, str):
        return check_names(source, "vocabulary")
    if source.startswith("dataset:"):
        if not (names := dataset_names(source.removeprefix("dataset:"))):
            raise ValueError(
                f"vocabulary {source!r}: expected a registered data set with class names; those of an annotation file "
                "are '@annotations.json'"
            )
        return check_names(names, f"vocabulary {source!r}")
    if source.startswith("@") or source.endswith((".txt", ".json")):
        path = expand_user(source.removeprefix("@"))
        if not path.is_file():
            raise FileNotFoundError(f"vocabulary {str(path)!r}: no such file. Expected one name a line (.txt), or JSON")
        return check_names(_read_names(path), str(path))
    return check_names([name.strip() for name in source.split(",") if name.strip()], "vocabulary")


def _read_names(path: Path) -> list[Any]:
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
    if not isinstance(content, list):
        raise ValueError(
            f"vocabulary {path}: expected a list of names or COCO's 'categories', got {type(content).__name__}"
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
