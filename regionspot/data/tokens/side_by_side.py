"""Token stores of several localizers in one directory, from which training takes that of its own."""

from pathlib import Path
from typing import Any

from regionspot.data.tokens.manifest import MANIFEST, ORIGIN, describe, is_same, read_origin


def place_store(directory: Path, sam: dict[str, Any], side_by_side: bool) -> Path:
    """Return where a localizer's store is written.

    Args:
        directory: of a data set.
        sam: the localizer, from ``describe_sam``.
        side_by_side: in a directory of its own, named by the localizer and its fingerprint.

    Raises:
        ValueError: the directory is a store itself, or without ``side_by_side`` has some.
    """
    if side_by_side and _origin_path(directory):
        raise ValueError(f"--side-by-side: {directory} is a token store itself; choose another --output")
    if not side_by_side and list_stores(directory):
        raise ValueError(f"{directory} has token stores side by side; add --side-by-side, or choose another --output")
    return directory / f"{sam['localizer']}-{sam['fingerprint'][:8]}" if side_by_side else directory


def list_stores(directory: str | Path) -> list[Path]:
    """Return the stores, finished or not, that a directory holds side by side; none if it is a store itself."""
    directory = Path(directory)
    if _origin_path(directory) or not directory.is_dir():
        return []
    return [path for path in sorted(directory.iterdir()) if path.is_dir() and _origin_path(path)]


def choose_store(directory: str | Path, sam: dict[str, Any]) -> Path:
    """Return the store of a localizer among those of a directory.

    Args:
        directory: of stores, see ``list_stores``.
        sam: the localizer, from ``describe_sam``.

    Raises:
        ValueError: none is of this localizer; the message lists all.
    """
    origins = {path: read_origin(path / _origin_path(path)).get("sam") for path in list_stores(directory)}
    for path, origin in origins.items():
        if is_same(origin, sam):
            return path
    stores = "; ".join(f"{path.name} of {describe(origin)}" for path, origin in origins.items())
    raise ValueError(
        f"{directory} has no token store of {describe(sam)}, only {stores}; extract one with `regionspot extract "
        "--side-by-side`, or train with the localizer of one of these"
    )


def _origin_path(directory: Path) -> str:
    """Return the name of the file that says what a store was made by, "" if the directory is no store."""
    return next((name for name in (MANIFEST, ORIGIN) if (directory / name).is_file()), "")
