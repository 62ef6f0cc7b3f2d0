"""Text embeddings on disk, each phrase by itself: a name more costs one name."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from regionspot.utils.files import atomic_path

logger = logging.getLogger(__name__)

LOCK_TIMEOUTS = (30, 1770)  # seconds to wait for another process before the first warning, and before giving up
MAX_FILES = 8  # more are merged into one


class TextCache:
    """The embeddings of one text encoder in a directory.

    Files are never changed, only added, so that readers need no lock. Each has ``embeddings`` (n, D) float32 and, as
    metadata, the list of their ``phrases`` and the ``sha256`` of the embeddings.
    """

    def __init__(self, directory: Path, dim: int) -> None:
        """
        Args:
            directory: of this encoder alone: its weights, templates and precision.
            dim: length D of an embedding.
        """
        self.directory, self.dim = directory, dim

    def get(self, phrases: list[str], encode: Callable[[list[str]], torch.Tensor]) -> torch.Tensor:
        """Return the (P, D) embeddings of phrases on the CPU; what is missing is encoded and added.

        One of several processes encodes, the others wait. Where the directory cannot be used, all are encoded.
        """
        known, _, _ = self._read()
        if not known.keys() >= set(phrases):
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                with _acquire(FileLock(self.directory / "lock")):
                    known |= self._add_missing(phrases, encode)
            except OSError as error:
                logger.warning("text embeddings are not cached, %s cannot be used (%s)", self.directory, error)
                known |= _encode_missing(known, phrases, encode)
        return torch.stack([known[phrase] for phrase in phrases])

    def _add_missing(self, phrases: list[str], encode: Callable[[list[str]], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Encode and write what no file has; the caller holds the lock. Return all that is known."""
        known, intact, damaged = self._read()  # another process may have encoded them in the meantime
        added = _encode_missing(known, phrases, encode)
        if added:
            for path in damaged:
                path.unlink()
            is_full = len(intact) >= MAX_FILES
            new = self._write({**known, **added} if is_full else added)
            for path in intact if is_full else ():
                if path != new:
                    path.unlink()
        return {**known, **added}

    def _read(self) -> tuple[dict[str, torch.Tensor], list[Path], list[Path]]:
        """Return the embeddings by phrase, and the intact and the damaged files."""
        known: dict[str, torch.Tensor] = {}
        intact, damaged = [], []
        for path in sorted(self.directory.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    embeddings, metadata = file.get_tensor("embeddings"), file.metadata() or {}
                phrases = json.loads(metadata["phrases"])
                _check(embeddings, (len(phrases), self.dim), metadata["sha256"])
            except FileNotFoundError:  # another process has merged it into a new file
                continue
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                logger.warning("cached text embeddings %s are damaged (%s); encoding again", path, error)
                damaged.append(path)
            else:
                known |= zip(phrases, embeddings)
                intact.append(path)
        return known, intact, damaged

    def _write(self, added: dict[str, torch.Tensor]) -> Path:
        phrases, embeddings = json.dumps(list(added)), torch.stack(list(added.values()))
        path = self.directory / f"{hashlib.sha256(phrases.encode()).hexdigest()[:32]}.safetensors"
        with atomic_path(path) as temporary:
            save_file({"embeddings": embeddings}, temporary, {"phrases": phrases, "sha256": _digest(embeddings)})
        return path


def _encode_missing(
    known: dict[str, torch.Tensor], phrases: list[str], encode: Callable[[list[str]], torch.Tensor]
) -> dict[str, torch.Tensor]:
    missing = [phrase for phrase in dict.fromkeys(phrases) if phrase not in known]
    return dict(zip(missing, encode(missing).cpu())) if missing else {}


def _digest(embeddings: torch.Tensor) -> str:
    return hashlib.sha256(embeddings.contiguous().numpy().data).hexdigest()


def _check(embeddings: torch.Tensor, shape: tuple[int, int], sha256: str) -> None:
    """Refuse embeddings from a file that are not what was written."""
    if embeddings.shape != shape or embeddings.dtype != torch.float32:
        raise ValueError(f"expected {shape} float32, got {tuple(embeddings.shape)} {embeddings.dtype}")
    if not ((embeddings.norm(dim=1) - 1).abs() < 1e-3).all():  # NaN fails this, too
        raise ValueError("not of length 1")
    if _digest(embeddings) != sha256:
        raise ValueError("not the SHA-256 that was written with it")


@contextmanager
def _acquire(lock: FileLock) -> Iterator[None]:
    """Hold ``lock``; warn when another process keeps it, and proceed without it when that takes too long."""
    for seconds in LOCK_TIMEOUTS:
        try:
            lock.acquire(timeout=seconds)
            break
        except Timeout:
            logger.warning(
                "another process has held %s for %d s: it encodes names, or it was stopped (then end it)",
                lock.lock_file,
                seconds,
            )
    try:
        yield
    finally:
        lock.release()
