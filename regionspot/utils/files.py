"""Files that are never half-written, their fingerprints, and the cache directory."""

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Return the directory of fetched weights and text embeddings: ``$REGIONSPOT_CACHE`` or ``~/.cache/regionspot``."""
    return expand_user(os.environ.get("REGIONSPOT_CACHE", "~/.cache/regionspot"))


def expand_user(path: str | Path) -> Path:
    """Return ``path`` with a leading ~ replaced by the home directory."""
    # Path.expanduser raises for the ~ of an unknown user; a file may really have such a name.
    return Path(os.path.expanduser(path))  # noqa: PTH111


@contextmanager
def atomic_path(path: str | Path, sync: bool = False) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` to write to; it replaces ``path`` when the block succeeds.

    With ``sync`` the file has reached the disk by then, and survives a loss of power.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its target, since only within one file system is renaming atomic.
    temporary = path.with_name(temporary_name(path.name))
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask says; safetensors lets nobody but the owner read its files
        yield temporary
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode)
        if sync:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(name: str) -> str:
    """Return a new name for a file or directory beside the one called ``name``: ".<name>.<32 digits>.tmp"."""
    ending = f".{uuid.uuid4().hex}.tmp"
    # file systems take 255 bytes, of which a Japanese character has three
    start = os.fsencode(f".{name}")[: 255 - len(ending)].decode(errors="ignore")
    return f"{start}{ending}"


def read_json(path: str | Path, what: str) -> Any:
    """Return the content of a JSON file; messages begin with ``what`` it is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or nested too deep.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what} {path}: no such file")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} {path}: damaged, or not JSON ({error})") from error


def write_json(path: str | Path, content: Any, indent: int | None = 1) -> None:
    """Write a JSON file, which appears whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent), encoding="utf-8")


def directory_name(dataset_name: str) -> str:
    """Return a directory name for a data set, whose own name may be "path/to/my.json:my_images"."""
    return re.sub(r"[^\w.-]+", "_", dataset_name)


def short_directory_name(dataset_name: str) -> str:
    """Return a short name, "my-photos" for "path/to/my.json:data/photos"; it need not be unique."""
    json_file, separator, images = dataset_name.rpartition(".json:")
    return directory_name(f"{Path(json_file).name}-{Path(images).name}" if separator else dataset_name)


def sha256_of_file(path: str | Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def short_hash(text: str, digits: int = 12) -> str:
    """Return the first digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
