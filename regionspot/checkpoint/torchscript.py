"""Read the tensors of a TorchScript archive without running anything that is in it; check what ``torch.save`` wrote.

OpenAI publishes CLIP as TorchScript archives. ``torch.jit.load`` would compile and may run their code, and
``torch.load(weights_only=True)`` refuses them; all we want is the tensors, which lie beside the code.
"""

import io
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from regionspot.utils.unpickling import InertUnpickler, Name, describe

_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32, "Half": torch.float16, "Double": torch.float64, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}  # fmt: skip
_LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
_MODULES_LIMIT = 10_000  # of an archive; a module may hold another again and again, and itself


@dataclass
class _Module:
    """Stands for any module of the archive."""

    attributes: dict[str, Any] = field(default_factory=dict)


def _make_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    numbers = [offset, *size, *stride]
    if not isinstance(storage, torch.Tensor) or any(type(number) is not int for number in numbers):
        raise pickle.UnpicklingError(f"a tensor of {describe(storage)} is not admitted")
    return storage.as_strided(size, stride, offset)  # which keeps to the storage


def _make_list(items: Any) -> list[Any]:
    if type(items) is not list:
        raise pickle.UnpicklingError(f"a list of {describe(items)} is not admitted")
    return items


class _TensorUnpickler(InertUnpickler):
    """Admits tensors, plain containers and attribute holders only."""

    admitted = {
        ("torch._utils", "_rebuild_tensor_v2"): "tensor",
        ("torch._utils", "_rebuild_parameter"): "parameter",
        ("collections", "OrderedDict"): "dict",
        **{("torch.jit._pickle", name): "list" for name in _LISTS},
        **{("torch", name): name for name in _STORAGES},
    }
    makers = {"tensor": _make_tensor, "parameter": lambda tensor, *_: tensor, "dict": lambda: {}, "list": _make_list}

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(_read_member(archive, f"{root}/data.pkl")))
        self.archive, self.root = archive, root
        self.storages: dict[str, torch.Tensor] = {}  # each is read once, whoever shares it

    def find_class(self, module: str, name: str) -> Name:
        return Name("module") if module.startswith("__torch__") else super().find_class(module, name)

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if kind != Name("module") or arguments != ():
            raise pickle.UnpicklingError(f"an object of {describe(kind)} is not admitted")
        self.stack.append(_Module())

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, _Module) or target.attributes or type(state) is not dict:
            raise pickle.UnpicklingError(f"setting the state of {describe(target)} is not admitted")
        target.attributes = state

    def persistent_load(self, saved_id: Any) -> torch.Tensor:
        """Return the storage, (numel,) of its dtype, that a tensor refers to."""
        _, kind, key, _, _ = saved_id
        if not isinstance(kind, Name) or kind.name not in _STORAGES or type(key) is not str:
            raise pickle.UnpicklingError(f"a storage of {describe(kind)} is not admitted")
        if key not in self.storages:
            data = bytearray(_read_member(self.archive, f"{self.root}/data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()
        return self.storages[key].view(_STORAGES[kind.name])


_TensorUnpickler.admit(
    {
        pickle.NEWOBJ: _TensorUnpickler.load_newobj,
        pickle.BUILD: _TensorUnpickler.load_build,
        pickle.BINPERSID: pickle._Unpickler.load_binpersid,  # type: ignore[attr-defined]
    }
)


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    _check_stored([archive.getinfo(name)])
    return archive.read(name)  # and compare its CRC-32


def _check_stored(members: list[zipfile.ZipInfo]) -> None:
    """Refuse members that are compressed, which torch never does with tensors: a little would become a lot."""
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise ValueError(f"{describe(member.filename)} in it is compressed, expected it stored as it is")


def check_archive(path: str | Path) -> None:
    """Compare every byte that ``torch.save`` wrote with the checksums that it wrote beside it (CRC-32).

    Raises:
        ValueError, zipfile.BadZipFile: a member is damaged, or compressed.
    """
    with zipfile.ZipFile(path) as archive:
        _check_stored(archive.infolist())
        if sum(member.file_size for member in archive.infolist()) > Path(path).stat().st_size:
            raise ValueError("its members overlap")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{describe(damaged)} in it is damaged: it differs from its checksum")


def is_torchscript_archive(path: str | Path) -> bool:
    """Tell whether ``path`` is a TorchScript archive (a zip file that holds compiled code)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a TorchScript archive, named as in the ``state_dict`` of its module.

    Raises:
        pickle.UnpicklingError: the archive refers to anything but tensors and plain containers.
    """
    with zipfile.ZipFile(path) as archive:
        roots = [name.split("/")[0] for name in archive.namelist() if name.endswith("/data.pkl")]
        unpickler = _TensorUnpickler(archive, roots[0] if roots else "archive")
        return _collect(unpickler.load())


def _collect(root: Any) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    todo, number = [("", root)], 0
    while todo:
        prefix, module = todo.pop()
        number += 1
        if not isinstance(module, _Module) or number > _MODULES_LIMIT:
            raise pickle.UnpicklingError(f"expected modules that hold tensors, got {describe(module)}")
        for name, value in module.attributes.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, _Module):
                todo.append((f"{prefix}{name}.", value))
    return tensors
