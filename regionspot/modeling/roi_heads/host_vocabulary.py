"""The names that a host detector knows, matched with the names to recognize."""

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

from regionspot.utils.files import read_json
from regionspot.vocabulary import load_vocabulary

logger = logging.getLogger(__name__)

ALIASES = "MODEL.REGIONSPOT.HEAD.HOST_ALIASES"


@dataclass(frozen=True)
class HostVocabulary:
    """The classes for which the host's own detections are used.

    Attributes:
        names: class names, in the host's order.
        aliases: from names of the host to names to recognize, or to None, see ``match_names``.
        merge_nms_thresh: the threshold of ``merge_detections`` with RegionSpot's detections.
    """

    names: Sequence[str]
    aliases: Mapping[str, str | None] = field(default_factory=dict)
    merge_nms_thresh: float = 1.0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "HostVocabulary":
        node = cfg.MODEL.REGIONSPOT.HEAD
        names = load_vocabulary(node.HOST_VOCABULARY)
        aliases = read_aliases(node.HOST_ALIASES, names) if node.HOST_ALIASES else {}
        return cls(names, aliases, node.MERGE_NMS_THRESH)


def read_aliases(path: str | Path, host_names: Sequence[str]) -> dict[str, str | None]:
    """Read a JSON object from the host's names to names to recognize, or to null for none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such an object, or a name that the host does not have.
    """
    aliases = read_json(path, ALIASES)
    if not isinstance(aliases, dict) or not all(x is None or isinstance(x, str) for x in aliases.values()):
        raise ValueError(f"{ALIASES} {path}: expected a JSON object from the host's names to names, or to null")
    if unknown := sorted(aliases.keys() - set(host_names)):
        raise ValueError(f"{ALIASES} {path}: the host has no class named {', '.join(map(repr, unknown[:5]))}")
    return aliases


def match_names(
    host_names: Sequence[str], names: Sequence[str], aliases: Mapping[str, str | None] | None = None
) -> tuple[int, ...]:
    """Return the index in ``names`` of each of a host's classes, -1 for none; the matches are logged once.

    An alias (see ``read_aliases``) decides. Otherwise the match is, in this order, the same spelling; the only name
    that differs just in case, underscores, hyphens, spaces and brackets; the only name of an LVIS category with the
    host's name as a synonym; the only name that differs just in a final s. An ambiguous name matches none.
    """
    # Called for every batch, with the names of a data set: cached, and thereby logged once.
    return _match(tuple(host_names), tuple(names), tuple((aliases or {}).items()))


@lru_cache(maxsize=16)
def _match(
    host_names: tuple[str, ...], names: tuple[str, ...], aliases: tuple[tuple[str, str | None], ...]
) -> tuple[int, ...]:
    alias_of = dict(aliases)
    # a vocabulary may repeat a name: its first index is the class
    first = {name: i for i, name in reversed(list(enumerate(names)))}
    plain, singular = _index(names, _plain), _index(names, _singular)
    matches, ways = [], defaultdict(list)
    for host_name in host_names:
        candidates = {
            "spelling": {first[host_name]} if host_name in first else set(),
            "normalization": plain[_plain(host_name)],
            "LVIS's synonyms": {i for known in _lvis_synonyms()[_plain(host_name)] for i in plain[known]},
            "plural": singular[_singular(host_name)],
        }
        if host_name in alias_of:
            alias = alias_of[host_name]
            candidates = {"alias": {first[alias]} if alias in first else set()}
        way, indices = next(((way, indices) for way, indices in candidates.items() if indices), ("", set()))
        matches.append(min(indices) if len(indices) == 1 else -1)
        pair = f"{host_name} -> {' or '.join(names[i] for i in sorted(indices))}"
        ways[way if len(indices) == 1 else "none"].append(host_name if way in ("", "spelling") else pair)
    _report(ways)
    return tuple(matches)


def _report(ways: Mapping[str, list[str]]) -> None:
    """Log how each of the host's names was matched."""
    known = {way: pairs for way, pairs in ways.items() if way != "none"}
    total, matched = (sum(map(len, x.values())) for x in (ways, known))
    by_way = [
        f"{len(pairs)} by {way}" + ("" if way == "spelling" else f" ({', '.join(pairs)})")
        for way, pairs in sorted(known.items(), key=lambda item: -len(item[1]))
    ]
    logger.info("the host knows %d of its %d names here: %s", matched, total, "; ".join(by_way) or "none")
    if others := ways.get("none"):
        logger.warning("names of the host that match none, or several, of those to recognize: %s", ", ".join(others))


def _index(names: Sequence[str], normalize: Callable[[str], str]) -> defaultdict[str, set[int]]:
    index: defaultdict[str, set[int]] = defaultdict(set)
    for i, name in enumerate(names):
        index[normalize(name)].add(i)
    return index


def _plain(name: str) -> str:
    """Return only the letters and digits of a name, in lower case, without brackets and their content."""
    return re.sub(r"[\W_]+", "", re.sub(r"\(.*?\)", "", name.lower())) or name


def _singular(name: str) -> str:
    return re.sub(r"(?<=[^s]{2})s$", "", _plain(name))


@cache
def _lvis_synonyms() -> defaultdict[str, set[str]]:
    """Return for a normalized synonym the LVIS categories that have it.

    Only in this direction: "woman" is a synonym of LVIS's person, but a person need not be a woman.
    """
    categories: defaultdict[str, set[str]] = defaultdict(set)
    for category in LVIS_CATEGORIES:
        for synonym in category["synonyms"]:
            categories[_plain(synonym)].add(_plain(category["name"]))
    return categories
