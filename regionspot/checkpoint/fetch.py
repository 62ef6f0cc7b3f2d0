"""Finds files of weights: paths, URLs, and the official weights of SAM and CLIP by name; fetches absent ones.

``torch.hub.download_url_to_file`` and iopath restart an interrupted transfer of gigabytes from the beginning, and
neither notices that a connection was closed early; so this module has a transfer of its own.
"""

import hashlib
import http.client
import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from regionspot.utils.files import cache_dir, expand_user, sha256_of_file

_SAM_ROOT = "https://dl.fbaipublicfiles.com/segment_anything"
_CLIP_ROOT = "https://openaipublic.azureedge.net/clip/models"


@dataclass(frozen=True)
class KnownWeights:
    """An official file of frozen weights."""

    url: str
    sha256: str
    megabytes: int  # about, to be said before it is fetched

    @property
    def path(self) -> Path:
        return cache_dir() / "weights" / self.url.rsplit("/", 1)[1]


def _sam(file_name: str, megabytes: int, sha256: str) -> KnownWeights:
    return KnownWeights(f"{_SAM_ROOT}/{file_name}", sha256, megabytes)


def _clip(file_name: str, megabytes: int, sha256: str) -> KnownWeights:
    return KnownWeights(f"{_CLIP_ROOT}/{sha256}/{file_name}", sha256, megabytes)


KNOWN_WEIGHTS = {
    "vit_b": _sam("sam_vit_b_01ec64.pth", 375, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    "vit_l": _sam("sam_vit_l_0b3195.pth", 1250, "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_h": _sam("sam_vit_h_4b8939.pth", 2565, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
    # its authors publish no digest
    "mobile_sam": KnownWeights("https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt", "", 40),
    "ViT-B/32": _clip("ViT-B-32.pt", 354, "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": _clip("ViT-B-16.pt", 351, "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": _clip("ViT-L-14.pt", 933, "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": _clip(
        "ViT-L-14-336px.pt", 934, "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"
    ),
}


def resolve_weights(source: str) -> Path:
    """Return the local file of a key of ``KNOWN_WEIGHTS``, a path, or an http(s) URL; raises as ``fetch``."""
    if source in KNOWN_WEIGHTS:
        known = KNOWN_WEIGHTS[source]
        return fetch(known.url, known.path, known.sha256)
    if source.startswith(("http://", "https://")):
        # files of the same name at different addresses must not replace each other
        name = f"{hashlib.sha256(source.encode()).hexdigest()[:8]}-{source.split('?')[0].rsplit('/', 1)[1]}"
        return fetch(source, cache_dir() / "weights" / name)
    path = expand_user(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"weights {source!r}: no such file. Expected a path, a URL, or one of {', '.join(KNOWN_WEIGHTS)}"
        )
    return path


def fetch(url: str, path: Path, sha256: str = "") -> Path:
    """Fetch ``url`` to ``path`` unless it exists, resuming an interrupted transfer; return ``path``.

    The file appears complete or not at all. ``sha256`` is its expected digest, or "" if none is known.

    Raises:
        FileNotFoundError: no such file, or the address does not answer; the message says which file to put where.
        ValueError: the digest differs.
    """
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # All processes of a run ask for the same file: one fetches it, the others wait.
    with FileLock(f"{path}.lock"):
        if path.is_file():  # another process fetched it meanwhile
            return path
        partial = path.with_name(path.name + ".part")
        # Without a digest nobody would notice that the file at the address was replaced between two parts.
        if not sha256:
            partial.unlink(missing_ok=True)
        try:
            _transfer(url, partial)
        except (http.client.HTTPException, OSError) as error:
            raise FileNotFoundError(
                f"could not fetch {url} ({error}). Run again to resume where it stopped, "
                f"or fetch it elsewhere and put it at {path}"
            ) from error
        digest = sha256_of_file(partial)
        if sha256 and digest != sha256:
            partial.unlink()
            raise ValueError(
                f"{url}: expected sha256 {sha256}, got {digest}; the file was removed. "
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
        if error.code == 416:  # the partial file is complete
            return
        raise
    with response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0  # the server does not resume
        length = int(response.headers.get("Content-Length") or 0)
        total = start + length if length else None
        with (
            tqdm.wrapattr(response, "read", total=total, initial=start, desc=partial.stem) as body,
            partial.open("ab" if start else "wb") as file,
        ):
            shutil.copyfileobj(body, file, 1 << 20)
    # http.client raises no error when the connection is closed early.
    if total and partial.stat().st_size < total:
        raise OSError(f"connection closed after {partial.stat().st_size} of {total} bytes")
