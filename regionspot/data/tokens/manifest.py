"""The manifest of a store of shards: what they hold, and what the features were extracted from."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regionspot.utils.files import read_json

FORMAT = "regionspot-tokens-2"
MANIFEST = "manifest.json"
ORIGIN = "origin.json"  # the beginning of the manifest, until the store is finished

# Version 1 had prose as keys and values. It is still read: extracting Objects365 again would take GPU-days.
_OLD_FORMAT = "regionspot-tokens-1"
_OLD_KEYS = {"images of a shard": "shard_images", "number of shards": "num_shards", "imported from": "imported_from"}

_ENTRY_TYPES = {"file": str, "sha256": str, "bytes": int, "images": int, "boxes": int, "seen": int}
_MANIFEST_TYPES = {"images": int, "boxes": int, "shards": list}


@dataclass(frozen=True)
class StoreKind:
    """What distinguishes stores of one kind from those of others.

    Attributes:
        name: in messages.
        format: value of ``format`` in a manifest.
        command: that writes them.
        types: keys of a manifest, beside those of all kinds, and their types.
        keys: keys whose values may be of any type.
    """

    name: str
    format: str
    command: str
    types: dict[str, type] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()

    @property
    def remedy(self) -> str:
        """What to do about a damaged shard."""
        return f"delete this shard and run {self.command} again, which writes it again"


TOKENS = StoreKind(
    "token store",
    FORMAT,
    "tools/extract_tokens.py",
    {"stages": list},
    frozenset({"clip", "flip", "sam", "annotations"}),
)


def read_manifest(directory: Path, kind: StoreKind = TOKENS) -> dict[str, Any]:
    """Return the manifest of a finished store.

    Raises:
        FileNotFoundError: no store there.
        ValueError: not finished, damaged, or of an unknown format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        if (directory / ORIGIN).is_file():
            raise ValueError(f"{kind.name} {directory} is not finished; run {kind.command} again, it resumes")
        raise FileNotFoundError(f"{kind.name} {directory}: no {MANIFEST} there; make it with {kind.command}")
    manifest = read_origin(path, kind)
    if manifest.get("format") != kind.format:
        raise ValueError(f"{kind.name}: {path} is of format {manifest.get('format')!r}, expected {kind.format!r}")
    is_complete = (
        _has_types(manifest, _MANIFEST_TYPES | kind.types)
        and kind.keys <= manifest.keys()
        and all(isinstance(stage, str) for stage in manifest.get("stages", ()))
        and all(is_entry(entry) for entry in manifest["shards"])
    )
    if not is_complete:
        raise ValueError(f"{kind.name}: {path} is damaged: it lacks keys of a manifest; run {kind.command} again")
    return manifest


def read_origin(path: Path, kind: StoreKind = TOKENS) -> dict[str, Any]:
    """Read a manifest, or the beginning of one, and translate version 1 to the current keys."""
    content = read_object(path, kind)
    if content.get("format") != _OLD_FORMAT:
        return content
    size = re.search(r"longest side (\d+)", str(content.pop("prompt_frame", "")))
    content.pop("image_transform", None)  # was the same text for every size
    content = {_OLD_KEYS.get(key, key): value for key, value in content.items()}
    return {**content, "format": FORMAT, "image_size": int(size[1]) if size else None}


def read_object(path: Path, kind: StoreKind = TOKENS) -> dict[str, Any]:
    content = read_json(path, f"{kind.name}:")
    if not isinstance(content, dict):
        raise ValueError(f"{kind.name}: {path} is damaged: expected an object, got {type(content).__name__}")
    return content


def is_entry(entry: Any) -> bool:
    """Return whether ``entry`` is a valid entry of a shard in a manifest."""
    if not isinstance(entry, dict) or not _has_types(entry, _ENTRY_TYPES):
        return False
    left_out = entry.get("left_out", [])
    return (
        re.fullmatch(r"shard-\d+\.safetensors", entry["file"]) is not None  # in this directory, not "../"
        and isinstance(left_out, list)
        and all(type(image_id) is int for image_id in left_out)
    )


def _has_types(content: dict[str, Any], types: dict[str, type]) -> bool:
    return all(type(content.get(key)) is expected for key, expected in types.items())


def check_origin(directory: Path, origin: dict[str, Any], expected: dict[str, Any], kind: StoreKind = TOKENS) -> None:
    """Refuse a store with a manifest, or its beginning, of another origin than ``expected``; the error names both."""
    for key, value in expected.items():
        if not is_same(origin.get(key), value):
            raise ValueError(
                f"{kind.name} {directory} is of another {key}: expected {describe(value)}, got "
                f"{describe(origin.get(key))}; delete it and run {kind.command} again, or write into another directory"
            )


def is_same(value: Any, expected: Any) -> bool:
    """Return whether an entry of a manifest is the expected one."""
    if not isinstance(value, dict) or not isinstance(expected, dict):
        return value == expected
    # Fingerprints decide: the source is the name of a file, which may have been moved, and the variant that of a size.
    # Older manifests do not name the localizer.
    ignored = {"source", "variant"} | ({"localizer"} - (value.keys() & expected.keys()))
    one, other = ({key: x for key, x in entry.items() if key not in ignored} for entry in (value, expected))
    return one == other


def describe(value: Any) -> str:
    """Return an entry of a manifest in words, for messages."""
    if not isinstance(value, dict):
        return str(value)
    others = "".join(f", {key} {item}" for key, item in value.items() if key not in ("source", "fingerprint"))
    return f"{value.get('source') or 'weights without a name'} ({str(value.get('fingerprint'))[:12]}{others})"
