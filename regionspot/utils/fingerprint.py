"""What tells whether files and directories are as they were."""

import hashlib
from pathlib import Path

from regionspot.utils.files import sha256_of_file


def fingerprint_of(path: str | Path) -> str:
    """Return a SHA-256: of a file's bytes, or of the names, sizes and times of modification below a directory.

    Raises:
        FileNotFoundError: neither is there.
    """
    path = Path(path)
    if not path.is_dir():
        return sha256_of_file(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        state = file.stat()
        line = f"{file.relative_to(path).as_posix()}\0{state.st_size} {state.st_mtime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def file_state(path: str | Path) -> list[int]:
    """Return a file's size and its times of modification and of change, nanoseconds; [] if there is no such file."""
    try:
        state = Path(path).stat()
    except OSError:
        return []
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns]  # the last one tells of new permissions
