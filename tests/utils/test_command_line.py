"""How commands end: one line for a user's mistake or Ctrl-C, a traceback for a bug; --help at once."""

import importlib.util
import os
import runpy
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from miniworld import __main__ as miniworld
from regionspot.utils.command_line import Interrupted, printable, run_command, run_process, user_error
from regionspot_cli import commands
from regionspot_cli.__main__ import main as regionspot_main
from regionspot_cli.prepare import PREPARE
from tools.benchmarks import __main__ as benchmarks

from ..helpers import ROOT

TABLES = (commands.COMMANDS, PREPARE, miniworld.COMMANDS, benchmarks.COMMANDS)
COMMANDS = [(name, command) for table in TABLES for name, command in table.items()]
SCRIPTS = sorted(path for path in (ROOT / "tools").glob("[a-z]*.py") if path.resolve().name != "moved.py")
SCRIPTS += sorted((ROOT / "projects").glob("*/train_net.py"))
SCRIPTS += sorted((ROOT / "datasets").glob("prepare_*.py"))
PROGRAMS = [path for path in sorted((ROOT / "projects").glob("*/*.py")) if os.access(path, os.X_OK)]
HELP_OF_ALL = f"""
import contextlib, io, runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in ("torch", "detectron2", "regionspot", "clip", "numpy", "pandas"), name
sys.meta_path.insert(0, Refuse())
def ask(*words, run):
    sys.argv, output = [*words, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            run()
    except SystemExit as end:
        assert end.code == 0 and "usage:" in output.getvalue(), words
    else:
        raise AssertionError(words)
for script in {list(map(str, SCRIPTS))!r}:
    ask(script, run=lambda: runpy.run_path(script, run_name="__main__"))
from miniworld import __main__ as miniworld
from regionspot_cli import __main__ as regionspot_cli
from tools.benchmarks import __main__ as benchmarks
for program in (regionspot_cli, miniworld, benchmarks):
    ask("program", run=program.main)
    for command in program.COMMANDS:
        ask("program", command, run=program.main)
"""


class Data:
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise self.error


def end(capsys, error, *options, **keywords):
    """Return exit code and message of a command that ends in ``error``."""

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(main, *options, **keywords)
    return ended.value.code, capsys.readouterr().err


@pytest.fixture(autouse=True)
def handlers():
    """Give the signals back to pytest."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("boxes: expected four numbers"), "boxes: expected four numbers"),
        (KeyError("data set 'x' is not registered"), "data set 'x' is not registered"),
        (FileNotFoundError(2, "No such file", "x.pth"), "[Errno 2] No such file: 'x.pth'"),
        (ValueError("two\nlines\x1b[31m\x07"), r"two lines\x1b[31m\x07"),
        (ValueError(), "ValueError"),
        (FloatingPointError("not a number in iteration 3"), "not a number in iteration 3"),
        (ImportError("videos need av: pip install x"), "videos need av"),
        (MemoryError(), "too little memory: for what was asked"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "too little memory: DefaultCPU"),
        (torch.OutOfMemoryError("CUDA out of memory"), "too little memory: CUDA out of memory"),
    ],
    ids=repr,
)
def test_user_error_is_one_line(capsys, error, line):
    code, message = end(capsys, error)
    assert code == 1 and message.startswith(f"error: {line}") and message.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [TypeError("x"), AssertionError(), ImportError("no x"), KeyError("key"), IndexError(3), RuntimeError("x y")],
)
def test_bug_keeps_traceback(capsys, error, monkeypatch):
    code, message = end(capsys, error)
    assert code == 1 and "Traceback" in message and "in main" in message
    monkeypatch.setenv("REGIONSPOT_TRACEBACK", "1")
    assert "Traceback" in end(capsys, ValueError("a user's"))[1]


def test_returned_numbers_are_exit_codes():
    for result, code in ((3, 3), (None, 0), ({"AP": 1.0}, 0)):
        with pytest.raises(SystemExit) as ended:
            run_command(lambda value: value, result)
        assert ended.value.code == code


def test_interruption_names_results_and_next_step(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools/train_net.py", "--config-file", "a b.yaml"])
    code, message = end(capsys, KeyboardInterrupt(), kept="checkpoints are kept", options=["--resume"])
    command = "tools/train_net.py --resume --config-file 'a b.yaml'"
    assert (code, message) == (130, f"interrupted: checkpoints are kept; to resume: {command}\n")
    assert "model_3.pth is kept; to resume" in end(capsys, KeyboardInterrupt("model_3.pth is kept"), kept="others")[1]
    monkeypatch.setattr(sys, "argv", ["regionspot", "train", "--eval-only"])
    assert end(capsys, KeyboardInterrupt(), options=["--resume"])[1].endswith("regionspot train --resume --eval-only\n")
    monkeypatch.setattr(sys, "argv", ["x.py", "--resume"])
    assert end(capsys, KeyboardInterrupt(), options=["--resume"])[1].endswith("to start again: x.py --resume\n")


def test_interruption_has_exit_code_of_signal(capsys):
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        assert end(capsys, Interrupted("model_3.pth is kept", signum))[0] == code


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command_in_one_line(capsys, signum, code):
    with pytest.raises(SystemExit) as ended:
        run_command(signal.raise_signal, signum)
    message = capsys.readouterr().err
    assert ended.value.code == code and message.startswith("interrupted: nothing was kept") and message.count("\n") == 1


def test_loader_worker_error_is_one_line():
    with pytest.raises(ValueError, match="Original Traceback") as caught:
        next(iter(DataLoader(Data(ValueError("image x.jpg cannot be read: cut")), num_workers=1)))
    assert user_error(caught.value) == "image x.jpg cannot be read: cut"


def fail(rank, kind):
    raise {"user": ValueError("x.pth: no such weights"), "bug": TypeError("a bug")}[kind]


def test_multiprocess_error_is_one_line(capsys):
    """A user's error is one line, a bug keeps its traceback; a second process could be ended before it fails."""
    for kind, message in (("user", "error: x.pth: no such weights"), ("bug", "TypeError: a bug")):
        with pytest.raises(SystemExit) as ended:
            run_command(
                torch.multiprocessing.start_processes, partial(run_process, fail), (kind,), 1, True, False, "fork"
            )
        lines = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 1 and lines[-1] == message and (len(lines) > 1) == (kind == "bug")


def test_control_characters_are_escaped():
    assert printable("cup\x1b]0;title\x07\r\u202e é 猫") == r"cup\x1b]0;title\x07\r\u202e é 猫"


def test_help_needs_no_slow_import():
    command = [sys.executable, "-c", HELP_OF_ALL]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert len(COMMANDS) >= 22 and len(SCRIPTS) >= 10


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[name for name, _ in COMMANDS])
def test_command_ends_by_the_boundary(name, command):
    """Command.run calls this function by run_command."""
    source = Path(importlib.util.find_spec(command.module).origin).read_text()
    assert f"\ndef {command.start}(args: Namespace)" in source and "run_command(" not in source


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_program_ends_by_the_boundary(path):
    last = path.read_text().rpartition('if __name__ == "__main__":')[2]
    assert "    run_command(" in last or "    COMMAND.run()" in last


def test_no_command_lists_them_all(capsys, monkeypatch):
    for words, code in (([], 2), (["trian"], 2), (["--help"], 0)):
        monkeypatch.setattr(sys, "argv", ["regionspot", *words])
        with pytest.raises(SystemExit) as ended:
            regionspot_main()
        printed = capsys.readouterr()
        assert ended.value.code == code and "train" in printed.out + printed.err


def test_failing_command_prints_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", str(tmp_path / "no.yaml")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / "train_net.py"), run_name="__main__")
    message = capsys.readouterr().err
    assert ended.value.code == 1 and message.count("\n") == 1
    assert message.startswith("error: config ") and "no such file" in message
