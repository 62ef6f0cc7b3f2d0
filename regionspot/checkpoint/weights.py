"""Files of weights: known names, fetching, safe reading, fingerprints."""

import hashlib
import http.client
import logging
import re
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file
from tqdm import tqdm

from regionspot.checkpoint.torchscript import check_archive, is_torchscript_archive, read_torchscript_state_dict
from regionspot.utils.files import cache_dir, expand_user, sha256_of_file
from regionspot.utils.unpickling import check_size

logger = logging.getLogger(__name__)

_SAM_ROOT = "https://dl.fbaipublicfiles.com/segment_anything"
_CLIP_ROOT = "https://openaipublic.azureedge.net/clip/models"


@dataclass(frozen=True)
class KnownWeights:
    """An official file of frozen weights."""

    url: str
    sha256: str

    @property
    def path(self) -> Path:
        return cache_dir() / "weights" / self.url.rsplit("/", 1)[1]


def _clip(sha256: str, file_name: str) -> KnownWeights:
    return KnownWeights(f"{_CLIP_ROOT}/{sha256}/{file_name}", sha256)


KNOWN_WEIGHTS = {
    "vit_b": KnownWeights(
        f"{_SAM_ROOT}/sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"
    ),
    "vit_l": KnownWeights(
        f"{_SAM_ROOT}/sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"
    ),
    "vit_h": KnownWeights(
        f"{_SAM_ROOT}/sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"
    ),
    "ViT-B/32": _clip("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": _clip("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": _clip("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": _clip("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
}


def resolve_weights(source: str) -> Path:
    """Return the local file of ``source``, fetching it first where that is needed.

    Args:
        source: a known name (a key of ``KNOWN_WEIGHTS``), a path, or an http(s) URL.

    Raises:
        FileNotFoundError: no such file, or no network; the message says which file to put where.
        ValueError: the fetched file's SHA-256 is not the official one.
    """
    if source in KNOWN_WEIGHTS:
        known = KNOWN_WEIGHTS[source]
        return fetch(known.url, known.path, known.sha256)
    if source.startswith(("http://", "https://")):
        name = f"{hashlib.sha256(source.encode()).hexdigest()[:8]}-{source.split('?')[0].rsplit('/', 1)[1]}"
        return fetch(source, cache_dir() / "weights" / name)
    path = expand_user(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"weights {source!r}: no such file. Expected a path, a URL, or one of {', '.join(KNOWN_WEIGHTS)}"
        )
    return path


def fetch(url: str, path: Path, sha256: str = "") -> Path:
    """Fetch ``url`` to ``path`` unless it is there; a transfer that was cut goes on where it stopped.

    Args:
        url: address of the file.
        path: where the file shall lie; it appears there whole or not at all.
        sha256: expected digest, or "" where none is known.

    Raises:
        FileNotFoundError: the address does not answer.
        ValueError: the digest differs.
    """
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.is_file():
            return path
        partial = path.with_name(path.name + ".part")
        if not sha256:  # nothing would tell whether an old part belongs to what the address gives now
            partial.unlink(missing_ok=True)
        try:
            _transfer(url, partial)
        except (http.client.HTTPException, OSError) as error:
            raise FileNotFoundError(
                f"could not fetch {url} ({error}). Run again to go on where it stopped, "
                f"or fetch it elsewhere and put it at {path}"
            ) from error
        found = sha256_of_file(partial)
        if sha256 and found != sha256:
            partial.unlink()
            raise ValueError(
                f"{url}: expected sha256 {sha256}, got {found}; the file was removed. "
                "Fetch it again, or give the path of a copy that you trust"
            )
        partial.replace(path)
    return path


def _transfer(url: str, partial: Path) -> None:
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the partial file is already whole
            return
        raise
    with response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0  # the server does not resume
        length = int(response.headers.get("Content-Length") or 0)
        bar = tqdm(total=start + length or None, initial=start, unit="B", unit_scale=True, desc=partial.stem)
        with partial.open("ab" if start else "wb") as file, bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
        if length and partial.stat().st_size < start + length:
            raise OSError(f"connection closed after {partial.stat().st_size} of {start + length} bytes")


def load_checkpoint_file(path: str | Path) -> dict[str, Any]:
    """Read a file of weights, running no code that it may hold.

    Args:
        path: ``.safetensors``, a TorchScript archive (OpenAI's CLIP), or anything ``torch.save`` wrote that holds
            tensors and plain containers only.

    Returns:
        What the file holds; for the first two kinds a flat dict of tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged (of ``torch.save``'s archives each byte is compared with its checksum), or
            holds more than tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights {str(path)!r}: no such file")
    try:
        content = _read_weights(path)
        check_size(content, path.stat().st_size)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # whatever a damaged file leads its reader to
        raise ValueError(
            f"{path} cannot be read as weights ({_reason(error)}). Expected tensors and plain containers, saved by "
            "torch.save, safetensors or TorchScript; is the file whole?"
        ) from None  # torch's own words advise to run what is in the file
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of weights, got {type(content).__name__}")
    return content


def _read_weights(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return _expand_token_rows(load_file(path))
    if is_torchscript_archive(path):
        return read_torchscript_state_dict(path)
    if zipfile.is_zipfile(path):  # not so before PyTorch 1.6, when there were no checksums
        check_archive(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    """Return an error's first line; of torch's advice what it found in the file."""
    text = str(error).strip()
    found = re.search(r"WeightsUnpickler error: (.*)", text) or re.match(r"(?!Weights only load failed)(.+)", text)
    return found[1] if found else type(error).__name__


def _expand_token_rows(content: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fill in the token embedding of a CLIP of which only the rows in use were stored; the others become 0.

    Such a file has ``token_embedding.rows`` (R, width) and ``token_embedding.tokens`` (R,), the rows' token ids, the
    last of which is the vocabulary's last (end of text).
    """
    if "token_embedding.rows" in content:
        rows, tokens = content.pop("token_embedding.rows"), content.pop("token_embedding.tokens")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < 1 << 20:
            raise ValueError("token_embedding.tokens: expected the ids of CLIP's tokens")
        content["token_embedding.weight"] = rows.new_zeros(int(tokens.max()) + 1, rows.shape[1])
        content["token_embedding.weight"][tokens] = rows
    return content


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """Return a SHA-256 over names, shapes and float32 values: the same for the same weights in any file format."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
