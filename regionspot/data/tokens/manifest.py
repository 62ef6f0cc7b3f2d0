"""The manifest of a token store: what its shards hold, and what the features were extracted from."""

import re
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
_MANIFEST_TYPES = {"images": int, "boxes": int, "stages": list, "shards": list}


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a finished store.

    Raises:
        FileNotFoundError: no store there.
        ValueError: not finished, damaged, or of an unknown format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        if (directory / ORIGIN).is_file():
            raise ValueError(f"token store {directory} is not finished; run tools/extract_tokens.py again, it resumes")
        raise FileNotFoundError(f"token store {directory}: no {MANIFEST} there; make it with tools/extract_tokens.py")
    manifest = read_origin(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"token store: {path} is of format {manifest.get('format')!r}, expected {FORMAT!r}")
    is_complete = (
        _has_types(manifest, _MANIFEST_TYPES)
        and {"clip", "flip", "sam", "annotations"} <= manifest.keys()
        and all(isinstance(stage, str) for stage in manifest["stages"])
        and all(is_entry(entry) for entry in manifest["shards"])
    )
    if not is_complete:
        raise ValueError(f"token store: {path} is damaged: it lacks keys of a manifest; extract the tokens again")
    return manifest


def read_origin(path: Path) -> dict[str, Any]:
    """Read a manifest, or the beginning of one, and translate version 1 to the current keys."""
    content = read_object(path)
    if content.get("format") != _OLD_FORMAT:
        return content
    size = re.search(r"longest side (\d+)", str(content.pop("prompt_frame", "")))
    content.pop("image_transform", None)  # was the same text for every size
    content = {_OLD_KEYS.get(key, key): value for key, value in content.items()}
    return {**content, "format": FORMAT, "image_size": int(size[1]) if size else None}


def read_object(path: Path) -> dict[str, Any]:
    content = read_json(path, "token store:")
    if not isinstance(content, dict):
        raise ValueError(f"token store: {path} is damaged: expected an object, got {type(content).__name__}")
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


def check_origin(directory: Path, origin: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse a store with a manifest, or its beginning, of another origin than ``expected``; the error names both."""
    for key, value in expected.items():
        if _without_source(origin.get(key)) != _without_source(value):
            raise ValueError(
                f"token store {directory} is of another {key}: expected {_describe(value)}, got "
                f"{_describe(origin.get(key))}; delete it and run tools/extract_tokens.py again, or extract into "
                "another directory"
            )


def _without_source(value: Any) -> Any:
    # Fingerprints decide: the source is the name of a file, which may have been moved.
    return {key: item for key, item in value.items() if key != "source"} if isinstance(value, dict) else value


def _describe(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    others = "".join(f", {key} {item}" for key, item in value.items() if key not in ("source", "fingerprint"))
    return f"{value.get('source') or 'weights without a name'} ({str(value.get('fingerprint'))[:12]}{others})"
