"""Fetching, TorchScript archives, fingerprints."""

import functools
import hashlib
import http.server
import pickle
import threading
import warnings
import zipfile

import pytest
import torch

from regionspot.checkpoint.torchscript import is_torchscript_archive, read_torchscript_state_dict
from regionspot.checkpoint.weights import (
    KNOWN_WEIGHTS,
    fetch,
    fingerprint,
    load_checkpoint_file,
    resolve_weights,
)

from ..helpers import tiny_model

CONTENT = bytes(range(256)) * 20000


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves CONTENT with ranges; ``cut_after`` closes the first connections early."""

    cuts: list[int] = []
    requests: list[str] = []
    resumes = True

    def do_GET(self):
        asked = self.headers.get("Range") if self.resumes else None
        start = int((asked or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        type(self).requests.append(self.headers.get("Range") or "")
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start : start + self.cuts.pop(0) if self.cuts else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Server.cuts, Server.requests = [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as instance:
        threading.Thread(target=instance.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{instance.server_address[1]}/weights.pth"
        instance.shutdown()


def test_a_fetch_that_was_cut_goes_on_where_it_stopped(server, tmp_path):
    Server.cuts = [3_000_000]
    path, sha256 = tmp_path / "weights.pth", hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(FileNotFoundError, match=f"put it at {path}"):
        fetch(server, path, sha256)
    assert not path.exists()
    assert fetch(server, path, sha256).read_bytes() == CONTENT
    assert Server.requests == ["", "bytes=3000000-"]
    fetch(server, path, sha256)
    assert len(Server.requests) == 2  # the third time nothing was asked for


def test_wrong_digest_is_refused_and_the_file_removed(server, tmp_path):
    with pytest.raises(ValueError, match="expected sha256 00"):
        fetch(server, tmp_path / "weights.pth", "00" * 32)
    assert not (tmp_path / "weights.pth").exists() and not (tmp_path / "weights.pth.part").exists()


def test_a_server_that_does_not_resume_is_read_from_the_start(server, tmp_path, monkeypatch):
    path, sha256 = tmp_path / "weights.pth", hashlib.sha256(CONTENT).hexdigest()
    (tmp_path / "weights.pth.part").write_bytes(b"something else")
    monkeypatch.setattr(Server, "resumes", False)
    assert fetch(server, path, sha256).read_bytes() == CONTENT


def test_url_is_fetched_into_the_cache(server, cache_directory):
    assert resolve_weights(server).read_bytes() == CONTENT
    assert resolve_weights(server).is_relative_to(cache_directory)


def test_without_network_the_error_says_which_file_to_put_where(monkeypatch):
    def no_network(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    known = KNOWN_WEIGHTS["vit_b"]
    with pytest.raises(FileNotFoundError, match=f"(?s){known.url}.*unreachable.*{known.path}"):
        resolve_weights("vit_b")


def test_known_weights_put_there_by_hand_are_used():
    known = KNOWN_WEIGHTS["ViT-B/16"]
    known.path.parent.mkdir(parents=True)
    torch.save({"a": torch.ones(1)}, known.path)
    assert load_checkpoint_file(resolve_weights("ViT-B/16")) == {"a": torch.ones(1)}


def test_torchscript_archive_gives_its_state_dict_without_being_run(tmp_path, monkeypatch):
    clip_model = tiny_model(names=None).recognizer.vision_language.clip_model
    tokens = torch.zeros(1, 77, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what tracing cannot follow does not matter here
        traced = torch.jit.trace(clip_model, (torch.zeros(1, 3, 32, 32), tokens), check_trace=False)
    torch.jit.save(traced, tmp_path / "clip.pt")
    torch.jit.save(
        torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))).half(),
        tmp_path / "half.pt",
    )
    monkeypatch.setattr(torch.jit, "load", lambda *_: pytest.fail("the archive was run"))
    for name in ("clip.pt", "half.pt"):
        assert is_torchscript_archive(tmp_path / name)
    state = load_checkpoint_file(tmp_path / "clip.pt")
    expected = clip_model.state_dict()
    assert set(state) == set(expected)
    half = read_torchscript_state_dict(tmp_path / "half.pt")
    assert half["0.weight"].dtype == torch.float16 and half["1.num_batches_tracked"].dtype == torch.int64


def test_torchscript_archive_with_foreign_code_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", pickle.dumps(functools.partial(print, "evil")))
    with pytest.raises(ValueError, match="functools.partial' is neither an array"):
        load_checkpoint_file(tmp_path / "x.pt")


def test_fingerprint_knows_values_names_and_shapes_but_not_the_format():
    state = {"a": torch.arange(6.0), "b": torch.ones(())}
    same = {"b": torch.ones((), dtype=torch.float16), "a": torch.arange(6.0, dtype=torch.float64)}
    assert fingerprint(state) == fingerprint(same)
    others = [
        {**state, "a": torch.arange(6.0).view(2, 3)},
        {**state, "b": torch.zeros(())},
        {"a": state["a"], "c": state["b"]},
    ]
    assert len({fingerprint(s) for s in (state, *others)}) == 4
