"""Reads files of weights of any format without running code in them; fingerprints of weights."""

import hashlib
import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from regionspot.utils.unpickling import ModuleHolder, check_size, describe, load_archive

# A damaged or malicious archive may have a module that holds another many times, or itself.
_MODULES_LIMIT = 10_000


def load_checkpoint_file(path: str | Path) -> dict[str, Any]:
    """Read a file of weights without running code in it.

    Args:
        path: ``.safetensors``, a TorchScript archive (OpenAI's CLIP), or tensors and plain containers that
            ``torch.save`` wrote.

    Returns:
        The content of the file; for the first two formats a flat dict of tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds more than tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights {str(path)!r}: no such file")
    try:
        content = _read_weights(path)
        check_size(content, path.stat().st_size)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # a damaged file may raise any type in its reader
        raise ValueError(
            f"{path} cannot be read as weights ({_reason(error)}). Expected tensors and plain containers, saved by "
            "torch.save, safetensors or TorchScript; is the file complete?"
        ) from None  # torch's own message advises to run what is in the file
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of weights, got {type(content).__name__}")
    return content


def _read_weights(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return _expand_token_rows(load_file(path))
    if is_torchscript_archive(path):
        return read_torchscript_state_dict(path)
    # Before PyTorch 1.6 files were not zip archives and had no checksums, which torch.load itself ignores.
    if zipfile.is_zipfile(path):
        _check_archive(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _reason(error: Exception) -> str:
    """Return an error's first line, of torch's long messages the one about the file."""
    text = str(error).strip()
    match = re.search(r"WeightsUnpickler error: (.*)", text) or re.match(r"(?!Weights only load failed)(.+)", text)
    return match[1] if match else type(error).__name__


def _expand_token_rows(content: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Complete the token embedding of a text encoder whose file has only the rows in use; the other rows become 0.

    Such a file has ``token_embedding.rows`` (R, width) and ``token_embedding.tokens`` (R,), the rows' token ids, the
    last of which is the vocabulary's last (end of text); open_clip's names begin with ``text.``.
    """
    for key in [key for key in content if key.endswith("token_embedding.rows")]:
        name = key.removesuffix(".rows")
        rows, tokens = content.pop(key), content.pop(f"{name}.tokens")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < 1 << 20:
            raise ValueError(f"{name}.tokens: expected the ids of CLIP's tokens")
        content[f"{name}.weight"] = rows.new_zeros(int(tokens.max()) + 1, rows.shape[1])
        content[f"{name}.weight"][tokens] = rows
    return content


def is_torchscript_archive(path: str | Path) -> bool:
    """Return whether ``path`` is a TorchScript archive (a zip file with compiled code)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a TorchScript archive, named as in the ``state_dict`` of its module."""
    # torch.jit.load would compile and may run the code in the archive, and torch.load(weights_only=True) refuses it;
    # the tensors are stored beside the code.
    with zipfile.ZipFile(path) as archive:
        roots = [name.split("/")[0] for name in archive.namelist() if name.endswith("/data.pkl")]
        root = roots[0] if roots else "archive"

        def read_member(name: str) -> bytes:
            _check_stored([archive.getinfo(f"{root}/{name}")])
            return archive.read(f"{root}/{name}")  # zipfile compares its CRC-32

        content = load_archive(io.BytesIO(read_member("data.pkl")), lambda key: read_member(f"data/{key}"))
    return _collect_tensors(content)


def _collect_tensors(root: Any) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    pending, num_modules = [("", root)], 0
    while pending:
        prefix, module = pending.pop()
        num_modules += 1
        if not isinstance(module, ModuleHolder) or num_modules > _MODULES_LIMIT:
            raise pickle.UnpicklingError(f"expected modules that hold tensors, got {describe(module)}")
        for name, value in (module.attributes or {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, ModuleHolder):
                pending.append((f"{prefix}{name}.", value))
    return tensors


def _check_stored(members: list[zipfile.ZipInfo]) -> None:
    # torch never compresses tensors; in a compressed member a few bytes can stand for gigabytes.
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise ValueError(f"{describe(member.filename)} in it is compressed, expected it stored without compression")


def _check_archive(path: Path) -> None:
    """Compare all bytes that ``torch.save`` wrote with the checksums beside them (CRC-32)."""
    with zipfile.ZipFile(path) as archive:
        _check_stored(archive.infolist())
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise ValueError("its members overlap")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{describe(damaged)} in it is damaged: it differs from its checksum")


def fingerprint(state: dict[str, torch.Tensor], setup: str = "") -> str:
    """Return a SHA-256 over names, shapes and float32 values: the same for the same weights in any file format.

    ``setup`` is what else the outputs of a model with these weights depend on.
    """
    # In float32: OpenAI's CLIP is float16 in its archive and float32 in a model.
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    digest.update(setup.encode())
    return digest.hexdigest()
