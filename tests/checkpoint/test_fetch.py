"""Fetching of weights: resuming, digests, the cache, and the error without a network."""

import hashlib
import http.server
import threading

import pytest
import torch

from regionspot.checkpoint import fetch as fetching
from regionspot.checkpoint.fetch import (
    KNOWN_WEIGHTS,
    KnownWeights,
    fetch,
    find_known_weights,
    hub_file,
    resolve_weights,
)
from regionspot.checkpoint.formats import load_checkpoint_file

CONTENT = bytes(range(256)) * 20000


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves CONTENT with ranges; ``cut_after`` closes the first connections early."""

    cuts: list[int] = []
    requests: list[str] = []
    resumes = True
    etags: list[str] = []  # of the redirection from /hub, and of the file

    def do_GET(self):
        if "absent" in self.path:
            self.send_error(404)
            return
        if self.path.startswith("/hub"):
            self.send_response(302)
            self.send_header("Location", "/weights.pth")
            self.send_header("X-Linked-Etag", f'"{self.etags[0]}"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        requested = self.headers.get("Range") if self.resumes else None
        start = int((requested or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        type(self).requests.append(self.headers.get("Range") or "")
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - start))
        if self.etags:
            self.send_header("ETag", f'"{self.etags[1]}"')
        self.end_headers()
        self.wfile.write(CONTENT[start : start + self.cuts.pop(0) if self.cuts else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Server.cuts, Server.requests, Server.etags = [], [], []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as instance:
        threading.Thread(target=instance.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{instance.server_address[1]}/weights.pth"
        instance.shutdown()


def test_fetch_resumes_a_cut_transfer(server, tmp_path):
    Server.cuts = [3_000_000]
    path, sha256 = tmp_path / "weights.pth", hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(FileNotFoundError, match=f"put it at {path}"):
        fetch(server, path, sha256)
    assert not path.exists()
    assert fetch(server, path, sha256).read_bytes() == CONTENT
    assert Server.requests == ["", "bytes=3000000-"]
    fetch(server, path, sha256)
    assert len(Server.requests) == 2  # the third call sent no request


def test_wrong_digest_removes_file(server, tmp_path):
    with pytest.raises(ValueError, match="expected sha256 00"):
        fetch(server, tmp_path / "weights.pth", "00" * 32)
    assert not (tmp_path / "weights.pth").exists() and not (tmp_path / "weights.pth.part").exists()


def test_server_without_ranges_restarts(server, tmp_path, monkeypatch):
    path, sha256 = tmp_path / "weights.pth", hashlib.sha256(CONTENT).hexdigest()
    (tmp_path / "weights.pth.part").write_bytes(b"something else")
    monkeypatch.setattr(Server, "resumes", False)
    assert fetch(server, path, sha256).read_bytes() == CONTENT


def test_hub_digest_is_compared(server, tmp_path):
    """The hub sends the file's digest with its redirection; what follows may have an ETag of another kind."""
    hub, sha256 = server.replace("weights.pth", "hub"), hashlib.sha256(CONTENT).hexdigest()
    for name, digest in (("same", sha256), ("none", "abc")):
        Server.etags = [digest, "00" * 32]
        assert fetch(hub, tmp_path / f"{name}.pth").read_bytes() == CONTENT
    Server.etags = ["00" * 32, sha256]
    with pytest.raises(ValueError, match="expected sha256 00"):
        fetch(hub, tmp_path / "other.pth")
    assert not (tmp_path / "other.pth").exists()
    Server.etags = ["00" * 32] * 2
    assert fetch(hub, tmp_path / "known.pth", sha256).read_bytes() == CONTENT  # a known digest is the one that counts


def test_known_weights_have_files_of_their_own():
    paths = [known.path for known in KNOWN_WEIGHTS.values()]
    assert len(set(paths)) == len(paths)
    assert KNOWN_WEIGHTS["edgetam"].path.parts[-3:] == ("yonigozlan", "EdgeTAM-hf", "model.safetensors")
    assert all(len(known.sha256) in (0, 64) for known in KNOWN_WEIGHTS.values())


def test_url_is_fetched_into_the_cache(server, cache_directory):
    assert resolve_weights(server).read_bytes() == CONTENT
    assert resolve_weights(server).is_relative_to(cache_directory)


def test_no_network_error_names_url_and_path(monkeypatch):
    def no_network(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr("urllib.request.OpenerDirector.open", no_network)
    known = KNOWN_WEIGHTS["vit_b"]
    with pytest.raises(FileNotFoundError, match=f"(?s){known.url}.*unreachable.*{known.path}"):
        resolve_weights("vit_b")


def test_known_weights_placed_by_hand_are_used():
    known = KNOWN_WEIGHTS["ViT-B/16"]
    known.path.parent.mkdir(parents=True)
    torch.save({"a": torch.ones(1)}, known.path)
    assert load_checkpoint_file(resolve_weights("ViT-B/16")) == {"a": torch.ones(1)}


HUB = "https://huggingface.co"


@pytest.mark.parametrize(
    ("name", "urls", "sha256"),
    [
        (
            "ViT-B-16/laion2b_s34b_b88k",
            [
                f"{HUB}/laion/CLIP-ViT-B-16-laion2B-s34B-b88K/resolve/main/open_clip_{name}"
                for name in ("model.safetensors", "pytorch_model.bin")
            ],
            "",
        ),
        ("ViTamin-S/datacomp1b", [f"{HUB}/jienengchen/ViTamin-S/resolve/main/pytorch_model.bin"], ""),
        (
            "ViT-B-32/laion2b_e16",
            [
                "https://github.com/mlfoundations/open_clip/releases/download/v0.2-weights/vit_b_32-laion2b_e16-af8dbd0c.pth"
            ],
            "af8dbd0c",
        ),
        ("ViT-B-16-quickgelu/openai", [KNOWN_WEIGHTS["ViT-B/16"].url], KNOWN_WEIGHTS["ViT-B/16"].sha256),
        (
            "ViT-B-16/laion400m_e32",
            [
                "https://github.com/mlfoundations/open_clip/releases/download/v0.2-weights/vit_b_16-laion400m_e32-55e67d44.pt"
            ],
            "55e67d44",
        ),
        ("ViT-B-16/nothing", [], ""),
        ("weights/clip.pth", [], ""),
    ],
)
def test_names_of_open_clips_weights(name, urls, sha256):
    known = find_known_weights(name)
    assert [weights.url for weights in known] == urls and {x.sha256 for x in known} <= {sha256}


def test_hub_files_have_directories_of_their_own(cache_directory):
    """They are all called the same."""
    one, other = (hub_file(f"timm/{name}", "open_clip_model.safetensors").path for name in ("a", "b"))
    assert one == cache_directory / "hub" / "timm" / "a" / "open_clip_model.safetensors" != other


def test_beginning_of_a_digest_suffices(server, tmp_path):
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert fetch(server, tmp_path / "one", sha256[:8]).read_bytes() == CONTENT
    with pytest.raises(ValueError, match="expected sha256 00000000, got"):
        fetch(server, tmp_path / "other", "00000000")


def test_second_file_of_a_repository_where_the_first_is_absent(server, monkeypatch):
    def serve(*names):
        files = [KnownWeights(server.replace("weights.pth", name)) for name in names]
        monkeypatch.setattr(fetching, "find_known_weights", lambda source: files)
        return files

    _, second = serve("absent.safetensors", "there.bin")
    assert resolve_weights("any") == second.path and second.path.read_bytes() == CONTENT
    first, second = serve("first.safetensors", "second.bin")
    second.path.write_bytes(b"put there by hand")
    assert resolve_weights("any") == second.path
    serve("absent.safetensors", "absent.bin")
    with pytest.raises(FileNotFoundError, match="absent.bin .*404"):
        resolve_weights("any")


def test_file_with_the_name_of_known_weights_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("network"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ViT-B-16").mkdir()
    (tmp_path / "ViT-B-16" / "openai").write_bytes(CONTENT)
    assert resolve_weights("ViT-B-16/openai").read_bytes() == CONTENT
