"""What tells whether files and directories are as they were."""

import hashlib
import os
from pathlib import Path

from regionspot.utils.files import sha256_of_file

_LABELS = (".json", ".jsonl", ".names", ".txt", ".xml", ".yaml", ".yml")


def fingerprint_of(path: str | Path) -> str:
    """Return a SHA-256: of a file's bytes, or of names, sizes and times of modification of the labels in a directory.

    Labels are files of text, in all directories below: images beside them do not matter.

    Raises:
        FileNotFoundError: neither is there.
    """
    if not Path(path).is_dir():
        return sha256_of_file(path)
    digest = hashlib.sha256()
    for directory, names, files in os.walk(path):
        names.sort()  # the order of the walk
        for name in sorted(name for name in files if name.lower().endswith(_LABELS)):
            file = Path(directory, name)
            if state := file_state(file):  # none of a file that was removed just now
                line = f"{file.relative_to(path).as_posix()}\0{state[0]} {state[1]}\n"
                digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def file_state(path: str | Path) -> list[int]:
    """Return a file's size and its times of modification and of change, nanoseconds; [] if there is no such file."""
    try:
        state = Path(path).stat()
    except OSError:
        return []
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns]  # the last one tells of new permissions


def describe_file(path: str | Path) -> list[int]:
    """Return a file's size, its time of modification in nanoseconds, and 63 bits of the SHA-256 of its bytes."""
    # 63 bits: token stores hold these numbers as int64
    state = Path(path).stat()
    return [state.st_size, state.st_mtime_ns, int(sha256_of_file(path)[:16], 16) >> 1]


def is_same_file(path: str | Path, described: list[int]) -> bool:
    """Return whether ``describe_file`` saw these bytes; they are read only if the time of modification differs."""
    try:
        state = Path(path).stat()
    except FileNotFoundError:
        return False
    if state.st_size != described[0]:
        return False
    return state.st_mtime_ns == described[1] or describe_file(path)[2] == described[2]
