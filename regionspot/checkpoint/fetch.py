"""Finds files of weights: paths, URLs, and official weights by name, also open_clip's; fetches absent ones.

``torch.hub.download_url_to_file`` and iopath restart an interrupted transfer of gigabytes from the beginning, and
neither notices that a connection was closed early; so this module has a transfer of its own.
"""

import hashlib
import http.client
import importlib.util
import re
import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from tqdm import tqdm

from regionspot.utils.files import cache_dir, expand_user, sha256_of_file

_SAM_ROOT = "https://dl.fbaipublicfiles.com/segment_anything"
_SAM2_ROOT = "https://dl.fbaipublicfiles.com/segment_anything_2"
_CLIP_ROOT = "https://openaipublic.azureedge.net/clip/models"
_HUB_ROOT = "https://huggingface.co"


@dataclass(frozen=True)
class KnownWeights:
    """An official file of frozen weights.

    ``sha256`` is "" where its publisher gives none that is known here; it is then compared with the server's, if that
    sends one.
    """

    url: str
    sha256: str = ""  # or its first digits; "" if it is not known
    megabytes: int = 0  # about, to be said before it is fetched; 0 if it is not known

    @property
    def path(self) -> Path:
        if self.url.startswith(_HUB_ROOT):  # files of all repositories have the same names
            repository, name = self.url.removeprefix(f"{_HUB_ROOT}/").split("/resolve/main/")
            return cache_dir() / "hub" / repository / name
        return cache_dir() / "weights" / self.url.rsplit("/", 1)[1]


def _sam(file_name: str, megabytes: int, sha256: str) -> KnownWeights:
    return KnownWeights(f"{_SAM_ROOT}/{file_name}", sha256, megabytes)


def _sam2(release: str, name: str, megabytes: int) -> KnownWeights:
    return KnownWeights(f"{_SAM2_ROOT}/{release}/{name}.pt", "", megabytes)


def hub_file(repository: str, name: str = "model.safetensors", megabytes: int = 0) -> KnownWeights:
    """Return a file of a repository ("owner/name") of the Hugging Face hub."""
    return KnownWeights(f"{_HUB_ROOT}/{repository}/resolve/main/{name}", "", megabytes)


def _clip(file_name: str, megabytes: int, sha256: str) -> KnownWeights:
    return KnownWeights(f"{_CLIP_ROOT}/{sha256}/{file_name}", sha256, megabytes)


KNOWN_WEIGHTS = {
    "vit_b": _sam("sam_vit_b_01ec64.pth", 375, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    "vit_l": _sam("sam_vit_l_0b3195.pth", 1250, "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_h": _sam("sam_vit_h_4b8939.pth", 2565, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
    "sam2_hiera_tiny": _sam2("072824", "sam2_hiera_tiny", 156),
    "sam2_hiera_small": _sam2("072824", "sam2_hiera_small", 184),
    "sam2_hiera_base_plus": _sam2("072824", "sam2_hiera_base_plus", 324),
    "sam2_hiera_large": _sam2("072824", "sam2_hiera_large", 898),
    "sam2.1_hiera_tiny": _sam2("092824", "sam2.1_hiera_tiny", 156),
    "sam2.1_hiera_small": _sam2("092824", "sam2.1_hiera_small", 184),
    "sam2.1_hiera_base_plus": _sam2("092824", "sam2.1_hiera_base_plus", 324),
    "sam2.1_hiera_large": _sam2("092824", "sam2.1_hiera_large", 898),
    "sam_hq_vit_b": hub_file("syscv-community/sam-hq-vit-base", megabytes=379),
    "sam_hq_vit_l": hub_file("syscv-community/sam-hq-vit-large", megabytes=1255),
    "sam_hq_vit_h": hub_file("syscv-community/sam-hq-vit-huge", megabytes=2570),
    "edgetam": hub_file("yonigozlan/EdgeTAM-hf", megabytes=56),
    "sam3_tracker": hub_file(
        "facebook/sam3", megabytes=3440
    ),  # gated: fetch it by hand after accepting the license there
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
    """Return the local file of known weights, a path, or an http(s) URL; raises as ``fetch``."""
    if known := find_known_weights(source):
        return _fetch_first(known)
    if source.startswith(("http://", "https://")):
        # files of the same name at different addresses must not replace each other
        name = f"{hashlib.sha256(source.encode()).hexdigest()[:8]}-{source.split('?')[0].rsplit('/', 1)[1]}"
        return fetch(source, cache_dir() / "weights" / name)
    path = expand_user(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"weights {source!r}: no such file. Expected a path, a URL, one of {', '.join(KNOWN_WEIGHTS)}, or for "
            "open_clip's models <model>/<tag> of open_clip.list_pretrained()"
        )
    return path


def find_known_weights(source: str) -> list[KnownWeights]:
    """Return the files that a known name may mean, the preferred first; none for other sources.

    Names are the keys of ``KNOWN_WEIGHTS``, and ``<model>/<tag>`` of ``open_clip.list_pretrained()`` unless there is
    such a file.
    """
    if source in KNOWN_WEIGHTS:
        return [KNOWN_WEIGHTS[source]]
    model, _, tag = source.partition("/")
    is_other = not model or not tag or "/" in tag or expand_user(source).is_file()
    if is_other or importlib.util.find_spec("open_clip") is None:
        return []
    import open_clip  # here: it is optional, and takes seconds

    settings = open_clip.get_pretrained_cfg(model, tag)
    return _open_clip_files(settings["url"], settings["hf_hub"]) if settings else []


def _open_clip_files(url: str, hub: str) -> list[KnownWeights]:
    """Return the files of an entry of open_clip's table: an address, and "owner/repository/" or with a file name."""
    # what the names of files say about their digests, as open_clip reads them
    if url.startswith(_CLIP_ROOT):
        return [KnownWeights(url, url.split("/")[-2])]
    if "/mlfoundations/" in url:
        digits = re.search(r"-([0-9a-f]{8,})\.\w+$", url)
        return [KnownWeights(url, digits[1] if digits else "")]
    if not hub:
        return [KnownWeights(url)]
    repository, name = hub.rsplit("/", 1)
    names = [name] if name else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    return [hub_file(repository, name) for name in names]


def fetch_hub_file(repository: str, name: str) -> Path:
    """Return the local file of one of the Hugging Face hub; raises as ``fetch``."""
    return _fetch_first([hub_file(repository, name)])


def _fetch_first(known: list[KnownWeights]) -> Path:
    """Return the first file that is there already, or else the first whose address has one; raises as ``fetch``."""
    for weights in known:
        if weights.path.is_file():
            return weights.path
    for weights in known[:-1]:
        try:
            return fetch(weights.url, weights.path, weights.sha256)
        except FileNotFoundError as error:
            if getattr(error.__cause__, "code", None) != http.HTTPStatus.NOT_FOUND:
                raise
    return fetch(known[-1].url, known[-1].path, known[-1].sha256)


def fetch(url: str, path: Path, sha256: str = "") -> Path:
    """Fetch ``url`` to ``path`` unless it exists, resuming an interrupted transfer; return ``path``.

    The file appears complete or not at all. ``sha256`` is its expected digest or the beginning of it, or "" if none is
    known: then that of the server, if it sends one, as the Hugging Face hub does.

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
            expected = _transfer(url, partial)
        except (http.client.HTTPException, OSError) as error:
            raise FileNotFoundError(
                f"could not fetch {url} ({error}). Run again to resume where it stopped, "
                f"or fetch it elsewhere and put it at {path}"
            ) from error
        sha256, digest = sha256 or expected, sha256_of_file(partial)
        if not digest.startswith(sha256):
            partial.unlink()
            raise ValueError(
                f"{url}: expected sha256 {sha256}, got {digest}; the file was removed. "
                "Fetch it again, or give the path of a copy that you trust"
            )
        partial.replace(path)
    return path


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps the digest that the hub sends with the redirection to where the file is."""

    def __init__(self) -> None:
        self.digest = ""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        self.digest = self.digest or _read_digest(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _read_digest(headers: http.client.HTTPMessage) -> str:
    """Return the SHA-256 of the file, if the headers of a response have one."""
    # not ETag: that of some servers is as long, but of something else
    value = str(headers.get("X-Linked-Etag") or "").strip('"').lower()
    return value if re.fullmatch("[0-9a-f]{64}", value) else ""


def _transfer(url: str, partial: Path) -> str:
    """Fetch what ``partial`` lacks; return the file's SHA-256 as the server says, "" if it does not."""
    start = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.build_opener(redirects := _Redirects()).open(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the partial file is complete
            return ""
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
    return redirects.digest or _read_digest(response.headers)
