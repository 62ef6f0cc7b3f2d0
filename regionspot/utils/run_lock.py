"""One run at a time per directory."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detectron2.utils import comm
from filelock import FileLock, Timeout


@contextmanager
def run_lock(directory: str | Path) -> Iterator[None]:
    """Reserve a directory for this run inside the block; a ``ValueError`` in all processes if another run holds it.

    The run that holds the directory may reserve it again.
    """
    directory = Path(directory)
    # A lock of the operating system, held by the main process: it ends with the process, also after SIGKILL.
    lock = FileLock(directory / ".run.lock", is_singleton=True)
    error = _acquire(lock, directory) if comm.is_main_process() else ""
    error = comm.all_gather(error)[0]  # the other processes must not wait for one that has failed
    if error:
        raise ValueError(error)
    try:
        yield
    finally:
        if comm.is_main_process():
            lock.release()


def _acquire(lock: FileLock, directory: Path) -> str:
    """Acquire the lock and record its holder; return the error message, "" for none."""
    directory.mkdir(parents=True, exist_ok=True)
    holder = directory / ".run.txt"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text() if holder.is_file() else "an unknown process"
        return (
            f"{directory}: another run is at work there ({who}); wait for its end, or give this one another OUTPUT_DIR"
        )
    holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    return ""
