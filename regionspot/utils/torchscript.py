"""Read the tensors of a TorchScript archive without running anything that is in it.

OpenAI publishes CLIP as TorchScript archives. ``torch.jit.load`` would compile and may run their code, and
``torch.load(weights_only=True)`` refuses them; all we want is the tensors, which lie beside the code.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2

_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32, "Half": torch.float16, "Double": torch.float64, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}  # fmt: skip
_FUNCTIONS = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch.jit._pickle", "build_intlist"): list,
    ("torch.jit._pickle", "build_tensorlist"): list,
    ("torch.jit._pickle", "build_doublelist"): list,
    ("torch.jit._pickle", "build_boollist"): list,
}


class _ScriptObject:
    """Stands for any module of the archive; unpickling sets its attributes and nothing else."""


class _TensorUnpickler(pickle.Unpickler):
    """Admits tensors, plain containers and attribute holders only."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _ScriptObject
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        raise pickle.UnpicklingError(f"{module}.{name} is not a tensor or a plain container")

    def persistent_load(self, saved_id: tuple) -> torch.storage.TypedStorage:
        _, dtype, key, _, _ = saved_id
        data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
        storage = torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else torch.UntypedStorage(0)
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


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
        data = next(name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1)
        module = _TensorUnpickler(archive, data.split("/")[0]).load()
    tensors: dict[str, torch.Tensor] = {}
    _collect(module, "", tensors)
    return tensors


def _collect(module: _ScriptObject, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            tensors[prefix + name] = value.detach()
        elif isinstance(value, _ScriptObject):
            _collect(value, f"{prefix}{name}.", tensors)
