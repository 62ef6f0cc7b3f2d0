"""The server of docs/serve.md answers its client."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import torch
from PIL import Image

from regionspot.config import load_config

from .helpers import ROOT, TINY, draw_scene, frozen_overrides, released_state, write_user_files


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait_for(url, process, log, seconds=240):
    from urllib.error import URLError
    from urllib.request import urlopen

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def test_server_answers_its_client(tmp_path):
    model = write_user_files(tmp_path)
    torch.save({"model": released_state(model)}, tmp_path / "regionspot_bb.pth")
    Image.fromarray(draw_scene(0, (480, 640))[0]).save(tmp_path / "cup.jpg")
    (tmp_path / "configs").mkdir()
    config = load_config(TINY, frozen_overrides(tmp_path)).dump()
    (tmp_path / "configs" / "RegionSpot-BB.yaml").write_text(config)
    port = str(free_port())
    text = (ROOT / "docs" / "serve.md").read_text().replace("8000", port)
    server, client = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in server.splitlines() if line.strip()]) <= 30
    (tmp_path / "server.py").write_text(server)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    log = tmp_path / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "server.py"],
            cwd=tmp_path,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        here, scope = os.getcwd(), {}  # noqa: PTH109
        os.chdir(tmp_path)
        try:
            exec(client, scope)
        finally:
            os.chdir(here)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers, too
        process.wait()
    result = scope["result"]
    assert result["error"] is None and len(result["class_names"]) == len(result["masks"]) == 2
    assert set(result["class_names"]) <= {"cup", "saucer", "spoon"}
    assert (result["height"], result["width"]) == (480, 640)
