"""How every command ends: a user's mistake or an interruption in one line, a bug with its traceback."""

import logging
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

STOPPING = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to stop; the text, if any, lists what was saved."""

    def __init__(self, text: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(*([text] if text else []))
        self.number = number


class ProcessError(Exception):
    """A user's mistake in one of several processes, as one line."""


def install_handlers(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Handle ``STOPPING`` by ``handler``; return the previous handlers."""
    # Python allows signal handlers in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {signum: signal.signal(signum, handler) for signum in STOPPING}


def restore_handlers(previous: dict[int, Any]) -> None:
    """Undo ``install_handlers``."""
    for signum, handler in previous.items():
        signal.signal(signum, handler)
    previous.clear()


def printable(text: object) -> str:
    """Return ``text`` in one line, with control characters escaped."""
    # Names from files could otherwise send commands to the terminal.
    line = " ".join(str(text).split("\n"))
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode("ascii") for x in line)


def user_error(error: BaseException | None) -> str | None:
    """Return the line that reports an error which the user can fix, None for a bug.

    The user can fix ``ValueError``, ``OSError``, a loss that is not a number, a ``KeyError`` with a sentence (one from
    a dict has only a key), an ``ImportError`` that says what to install, and too little memory.
    """
    # str() of a KeyError has quotes around its text
    words = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    # PyTorch's loader raises errors of its workers with their traceback in the text.
    if words.startswith("Caught ") and "Original Traceback" in words:
        words = words.strip().rpartition("\n")[2].partition(": ")[2]
    text = printable(words)
    if isinstance(error, ProcessRaisedException):
        before, _, line = str(error).rpartition(f"{ProcessError.__qualname__}: ")
        return printable(line.strip()) if before else None
    if isinstance(error, ProcessExitedException):
        return f"{text}; was there too little memory?"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return f"too little memory: {text or 'for what was asked'}"
    is_sentence = isinstance(error, KeyError) and " " in text
    is_absent = isinstance(error, ImportError) and "pip install" in text
    is_error = isinstance(error, (ValueError, OSError, FloatingPointError, ProcessError))
    is_mistake = is_sentence or is_absent or is_error
    return (text or type(error).__name__) if is_mistake else None


def _one_line(error: BaseException | None) -> str | None:
    return None if "REGIONSPOT_TRACEBACK" in os.environ else user_error(error)


def _is_bug_or_message(record: logging.LogRecord) -> bool:
    """Filter Detectron2's log: drop the tracebacks of errors that are reported in one line."""
    return not record.exc_info or _one_line(record.exc_info[1]) is None


def run_process(main: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``main`` in one of several processes; a user's mistake is passed to the parent as one line."""
    try:
        return main(*arguments)
    except Exception as error:
        if (line := _one_line(error)) is None:
            raise
        raise ProcessError(line) from None


def run_command(main: Callable[..., Any], *arguments: Any, kept: str = "", options: Sequence[str] = ()) -> NoReturn:
    """Call ``main`` and exit: 0 or the number it returns, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM.

    With ``REGIONSPOT_TRACEBACK`` in the environment all errors are reported with their traceback.

    Args:
        main: the command.
        arguments: those of ``main``.
        kept: what an interruption leaves, such as "finished shards are kept", unless the interruption has a text.
        options: options that the command needs to resume, such as "--resume".
    """
    number: int = signal.SIGINT

    def stop(received: int, _: Any) -> None:
        nonlocal number
        number = signal.Signals(received)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    # Restores what Command.run changed for the imports; shells ignore SIGINT for background jobs, which stays.
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_bug_or_message)
    try:
        result = main(*arguments)
    except KeyboardInterrupt as interrupt:
        # `kill` reaches this process alone, Ctrl-C its children, too.
        for child in multiprocessing.active_children():
            child.terminate()
        # Options are inserted before the first one: after `regionspot train`, and before KEY VALUE at the end.
        words = next((i for i, word in enumerate(sys.argv) if word.startswith("-")), len(sys.argv))
        again = [*sys.argv[:words], *(option for option in options if option not in sys.argv), *sys.argv[words:]]
        saved = printable(interrupt) or kept
        number = interrupt.number if isinstance(interrupt, Interrupted) else number
        text = f"{saved}; to resume" if saved else "nothing was kept; to start again"
        _end(f"interrupted: {text}: {shlex.join(again)}", 128 + number)
    except Exception as error:
        if (line := _one_line(error)) is None:
            traceback.print_exc()
            sys.exit(1)
        _end(f"error: {line}", 1)
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.exit(result if isinstance(result, int) else 0)


def _end(line: str, code: int) -> NoReturn:
    with suppress(OSError):  # a closed pipe
        sys.stdout.flush()
    sys.stderr.write(f"{printable(line)}\n")
    sys.exit(code)
