"""``regionspot app``: it serves on this machine alone, and ends at a signal."""

import importlib.util
import os
import socket
import tempfile
import time
import urllib.request
from importlib.util import find_spec

import pytest

from regionspot_cli.commands import COMMANDS
from regionspot_cli.see_commands import parse_bytes

from ..helpers import ROOT, TINY
from ..processes import Program

if find_spec("gradio") is None:  # its import takes seconds
    pytest.skip("no Gradio: pip install 'regionspot[app]'", allow_module_level=True)
SCRIPT = ROOT / "regionspot_cli" / "__main__.py"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(autouse=True, scope="module")
def imported():
    """Import Gradio once, and not again in each program, which is forked from here."""
    import gradio  # noqa: F401


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A page's program and address, which is killed if a test fails."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    port = free_port()
    program = Program(tmp_path, SCRIPT, "app", "--config-file", TINY, "--port", port, "--vocabulary", "zebra,cup")
    try:
        deadline = time.monotonic() + 120
        while "the page is at" not in program.output() and program.process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.1)
        yield program, port
    finally:
        program.process.kill()


def test_page_is_served_until_a_signal(server, tmp_path):
    program, port = server
    assert f"the page is at http://127.0.0.1:{port}" in program.output()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/config") as response:
        config = response.read().decode()
    assert "zebra\\ncup" in config and "No weights for" in config  # all of this model is random
    with socket.socket() as other, pytest.raises(OSError):  # not at this machine's other addresses
        other.connect(("127.0.0.2", port))
    assert list(tmp_path.glob("regionspot-*"))
    os.kill(program.process.pid, 15)
    assert program.wait(30) == 0, program.output()
    assert not list(tmp_path.glob("regionspot-*"))  # the uploads


def test_port_in_use_is_one_line(tmp_path):
    with socket.socket() as used:
        used.bind(("127.0.0.1", 0))
        used.listen()
        port = used.getsockname()[1]
        program = Program(tmp_path, SCRIPT, "app", "--config-file", TINY, "--port", port)
        assert program.wait(120) == 1
    assert program.output().splitlines()[-1] == (
        f"error: nothing can listen on 127.0.0.1:{port}: another program may use the port; give another --port"
    )
    assert "Traceback" not in program.output()


def test_check_only_builds_the_page(tmp_path):
    program = Program(tmp_path, SCRIPT, "app", "--check", "--config-file", TINY)
    assert program.wait(120) == 0 and "the page is complete" in program.output()


def test_without_gradio(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("regionspot_cli.app.find_spec", lambda name: None if name == "gradio" else find(name))
    with pytest.raises(ValueError, match=r"^the app needs Gradio: pip install 'regionspot\[app\]'$"):
        COMMANDS["app"].call("--config-file", TINY)


@pytest.mark.parametrize(("text", "size"), [("20mb", 20_000_000), ("500KB", 500_000), ("1gb", 10**9)])
def test_upload_limit(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["20", "0mb", "-1mb", "mb", "2tb"])
def test_invalid_upload_limit(text, capsys):
    with pytest.raises(SystemExit):
        COMMANDS["app"].parse_arguments(["--config-file", "x", f"--max-upload={text}"])
    assert "expected a size such as 500kb or 20mb" in capsys.readouterr().err
