"""SIGTERM and SIGINT as one exception that says what was kept."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A signal has asked the process to stop. Its text, if any, says what was kept."""

    def __init__(self, text: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(*([text] if text else []))
        self.number = number


def install_handlers(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Let ``handler`` have the signals; return the handlers before, {} in a thread, which cannot have any."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in STOPPING}


def restore_handlers(previous: dict[int, Any]) -> None:
    """Undo ``install_handlers``."""
    for number, handler in previous.items():
        signal.signal(number, handler)
    previous.clear()


@contextmanager
def forwarded_to_children() -> Iterator[None]:
    """Give signals to the processes that are started inside the block, which ends when they have ended.

    Raises:
        Interrupted: a signal came.
    """
    received: list[int] = []

    def forward(number: int, _: Any) -> None:
        received.append(number)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, number)

    previous = install_handlers(forward)
    try:
        yield
    except Exception as error:
        if received:  # the processes' ends by the signal are no errors of their own
            raise Interrupted(number=received[0]) from error
        raise
    finally:
        restore_handlers(previous)
    if received:
        raise Interrupted(number=received[0])
