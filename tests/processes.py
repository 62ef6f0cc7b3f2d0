"""Programs as a user runs them, but forked from the tests, which saves the imports, the slowest step of all."""

import logging
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from detectron2.utils.logger import setup_logger

from .helpers import load_program

OWN = ("detectron2", "regionspot", "regionspot_cli", "miniworld", "tools", "tests")


class Program:
    """A Python program in a process of its own; its output goes to a file."""

    def __init__(self, directory: Path, script: Path, *arguments: object, imports_again: bool = False) -> None:
        """
        Args:
            directory: where it runs.
            script: the program.
            arguments: of its command line.
            imports_again: whether it imports Detectron2 and the project itself, as in a new interpreter.
        """
        self.directory, self.argv = directory, [str(part) for part in (script, *arguments)]
        self.imports_again = imports_again
        self.log = directory / f".said-{time.monotonic_ns()}"
        self.process = multiprocessing.get_context("fork").Process(target=self._become)
        self.process.start()

    def output(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    def wait(self, seconds: float = 300) -> int:
        """Return its exit status; it is killed if it takes longer than ``seconds``."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def _become(self) -> None:
        with self.log.open("w") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115, PTH123
        os.chdir(self.directory)
        sys.argv = self.argv
        for sibling in Path(self.argv[0]).parent.glob("*_training.py"):  # imported by the programs of a project
            sys.modules[sibling.stem] = load_program(sibling)
        for name in (None, *logging.root.manager.loggerDict):  # the tests' handlers write elsewhere
            logging.getLogger(name).handlers.clear()
        setup_logger.cache_clear()
        forked = partial(torch.multiprocessing.start_processes, start_method="fork")
        torch.multiprocessing.start_processes = forked  # type: ignore[assignment]
        if self.imports_again:
            for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
                del sys.modules[name]
        runpy.run_path(self.argv[0], run_name="__main__")


def run_program(directory: Path, script: Path, *arguments: object, imports_again: bool = False) -> str:
    """Run a Python program in ``directory`` and return its output; it must succeed."""
    program = Program(directory, script, *arguments, imports_again=imports_again)
    status = program.wait()
    assert status == 0, program.output()[-5000:]
    return program.output()


def call_in_two_processes(function: Callable[..., object], *arguments: object) -> None:
    """Call a function in two forked processes at once, and wait for both; how they end is the test's to check."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=function, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
