"""The manifest of a token store: what its shards hold, and what the features are of."""

import json
import re
from pathlib import Path
from typing import Any

from regionspot.utils.files import atomic_path, read_json

FORMAT = "regionspot-tokens-1"
MANIFEST = "manifest.json"


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the manifest of a finished store."""
    path = directory / MANIFEST
    if not path.is_file():
        if (directory / "origin.json").is_file():
            raise ValueError(f"token store {directory} is not finished; run tools/extract_tokens.py again, it goes on")
        raise FileNotFoundError(f"token store {directory}: no {MANIFEST} there; make it with tools/extract_tokens.py")
    manifest = read_object(path)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"token store: {path} is of format {manifest.get('format')!r}, expected {FORMAT!r}")
    shards = manifest.get("shards")
    stages, counts = manifest.get("stages"), [manifest.get("images"), manifest.get("boxes")]
    whole = {"clip", "flip", "sam", "annotations"} <= set(manifest) and all(type(count) is int for count in counts)
    whole = whole and isinstance(stages, list) and all(isinstance(stage, str) for stage in stages)
    if not whole or not isinstance(shards, list) or not all(is_entry(entry) for entry in shards):
        raise ValueError(f"token store: {path} is damaged: it lacks what a manifest has; extract the tokens again")
    return manifest


def read_object(path: Path) -> dict[str, Any]:
    content = read_json(path, "token store:")
    if not isinstance(content, dict):
        raise ValueError(f"token store: {path} is damaged: expected an object, got {type(content).__name__}")
    return content


def write_object(path: Path, content: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


def is_entry(entry: Any) -> bool:
    kinds = {"file": str, "sha256": str, "bytes": int, "images": int, "boxes": int, "seen": int}
    if not isinstance(entry, dict) or not all(type(entry.get(key)) is kind for key, kind in kinds.items()):
        return False
    left_out = entry.get("left_out", [])
    if not isinstance(left_out, list) or not all(type(image) is int for image in left_out):
        return False
    return re.fullmatch(r"shard-\d+\.safetensors", entry["file"]) is not None  # of this directory, not "../"


def check_origin(directory: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse a store of another origin, for training and for extraction alike.

    Raises:
        ValueError: how ``compare_origins`` has them differ, and what to do.
    """
    difference = compare_origins(found, expected)
    if difference:
        raise ValueError(
            f"token store {directory} {difference}; delete it and run tools/extract_tokens.py again, or extract into "
            "another directory"
        )


def compare_origins(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Return how a store's origin differs from what is expected, "" if it does not.

    Both are as in the manifest: plain values, and dicts with a "fingerprint" (that counts) and a "source" (its name).
    """
    for key, wanted in expected.items():
        there = found.get(key)
        if isinstance(wanted, dict) and isinstance(there, dict):
            rest = {name for name in wanted if name != "source"}
            if all(there.get(name) == wanted[name] for name in rest):
                continue
        elif there == wanted:
            continue
        return f"is of another {key}: expected {_say(wanted)}, got {_say(there)}"
    return ""


def _say(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    others = "".join(f", {key} {item}" for key, item in value.items() if key not in ("source", "fingerprint"))
    return f"{value.get('source') or 'weights without a name'} ({str(value.get('fingerprint'))[:12]}{others})"
