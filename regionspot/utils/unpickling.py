"""Reads untrusted pickles without running them: proposals, detectors' weights, and TorchScript archives.

The interpreter defends against:

* Running code. A name in the file is looked up in a closed list and becomes an inert token; "calling" a token runs one
  of the small functions below, which check their arguments. No opcode ever reaches a function or class.
* Changing the program. BUILD, SETITEM and SETITEMS set the state of any object, so they are refused for all but plain
  dicts and the placeholders of this file. Opcodes that are not listed are refused.
* Memory bombs. The bytes of all arrays and tensors must be in the file, lengths and indexes in the file allocate
  nothing in advance, and ``check_size`` refuses small files that stand for large contents.
* Deep recursion. The interpreter has no recursion; that of ``check_size`` ends as an error like any other damage.
"""

import mmap
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from detectron2.structures import BoxMode

_OPCODES = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT "
    "BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES "
    "BINBYTES8 LIST EMPTY_LIST TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT APPEND APPENDS GET BINGET LONG_BINGET "
    "PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD SETITEM SETITEMS DICT BYTEARRAY8 BINPERSID"
)
# Python's unpickler in Python: the one in C has no table of opcodes.
_PYTHON_UNPICKLER: Any = pickle._Unpickler  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Token:
    """A name in the file; ``call`` is run when the file calls it."""

    name: str
    call: Callable[..., Any] | None = None


@dataclass
class _DtypeHolder:
    text: str


@dataclass
class ArrayHolder:
    """An array that the file creates empty and fills later."""

    value: Any = None  # an array of numbers or strings, a list for an array of objects, or None before it is filled


@dataclass
class ModuleHolder:
    """A module of a TorchScript archive."""

    attributes: dict[str, Any] | None = None


class _Opcodes(dict):
    def __missing__(self, opcode: int) -> Any:
        raise pickle.UnpicklingError(f"opcode {bytes([opcode])!r} makes more than arrays and plain containers")


class _Interpreter(_PYTHON_UNPICKLER):
    """Python's own unpickler, with replacements for the opcodes that make objects.

    Its memo is a dict, so that large indexes take no memory (in C it is an array).
    """

    def __init__(self, file: Any, names: dict[tuple[str, str], _Token]) -> None:
        super().__init__(file, encoding="latin1")  # maps the bytes of Python 2's strings to characters one to one
        self.names = names

    def find_class(self, module: str, name: str) -> _Token:
        if (module, name) not in self.names:
            raise pickle.UnpicklingError(f"{describe(f'{module}.{name}')} is neither an array nor a plain container")
        return self.names[module, name]

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Token) or function.call is None or type(arguments) is not tuple:
            raise pickle.UnpicklingError(f"a call of {describe(function)} is not allowed")
        self.stack.append(function.call(*arguments))

    def load_newobj(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        if kind != _MODULE or arguments != ():
            raise pickle.UnpicklingError(f"an object of {describe(kind)} is not allowed")
        self.stack.append(ModuleHolder())

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        # A state may be set once, so that nothing changes after it was checked.
        if isinstance(target, ArrayHolder) and target.value is None and type(state) is tuple and len(state) in (4, 5):
            shape, dtype, is_fortran, data = state[-4:]
            target.value = _make_array(data, dtype, shape, "F" if is_fortran else "C")
        elif isinstance(target, _DtypeHolder) and _is_plain_dtype_state(state):
            target.text = _checked_dtype(f"{state[1]}{target.text.lstrip('<>=|')}")
        elif isinstance(target, ModuleHolder) and target.attributes is None and type(state) is dict:
            target.attributes = state
        else:
            raise pickle.UnpicklingError(f"setting the state of {describe(target)} is not allowed")

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set(items)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or any(type(key) not in (str, int) for key in items[::2]):
            raise pickle.UnpicklingError("expected dicts whose keys are strings or integers")
        target.update(zip(items[::2], items[1::2]))

    def load_bytearray8(self) -> None:
        self.stack.append(self.read(int.from_bytes(self.read(8), "little")))  # no more than the file has


_CODES = [getattr(pickle, name)[0] for name in _OPCODES.split()]
_Interpreter.dispatch = _Opcodes(
    {code: getattr(_Interpreter, _PYTHON_UNPICKLER.dispatch[code].__name__) for code in _CODES}
)


class _ArchiveInterpreter(_Interpreter):
    """Also reads modules, and tensors' storages, which are beside the pickle in an archive."""

    def __init__(self, file: Any, read_storage: Callable[[str], bytes]) -> None:
        super().__init__(file, _TENSOR_NAMES)
        self.read_storage = read_storage
        self.storages: dict[str, torch.Tensor] = {}  # each is read once; several tensors may share one

    def find_class(self, module: str, name: str) -> _Token:
        return _MODULE if module.startswith("__torch__") else super().find_class(module, name)

    def persistent_load(self, saved_id: Any) -> torch.Tensor:
        """Return the storage of a tensor, (numel,) of its dtype."""
        # ("storage", type, key, device, numel)
        _, kind, key, _, _ = saved_id
        if not isinstance(kind, _Token) or kind.name not in _STORAGES or type(key) is not str:
            raise pickle.UnpicklingError(f"a storage of {describe(kind)} is not allowed")
        if key not in self.storages:
            data = bytearray(self.read_storage(key))
            self.storages[key] = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0).byte()
        return self.storages[key].view(_STORAGES[kind.name])


def describe(value: Any) -> str:
    """Return a short description for a message; never a whole container, which a file can make endless."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:80] + "...")
    if isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 1 << 64):
        return repr(value)
    return value.name if isinstance(value, _Token) else type(value).__name__.strip("_").removesuffix("Holder").lower()


def _is_plain_dtype_state(state: Any) -> bool:
    # (version, byte order, subtype, names, fields, ...)
    return type(state) is tuple and len(state) >= 5 and type(state[1]) is str and state[2:5] == (None,) * 3


def _checked_dtype(text: Any) -> str:
    if type(text) is str and re.fullmatch(r"[<>=|]?(?:b1|[iu][1248]|f[248]|U\d{1,4}|O8?)", text):
        return text
    raise pickle.UnpicklingError(f"arrays of dtype {describe(text)} are not allowed; expected numbers")


def _make_array(data: Any, dtype: Any, shape: Any, order: Any) -> Any:
    """Return an array of bytes ``data``; for a 1-D array of objects their list."""
    if (
        not isinstance(dtype, _DtypeHolder)
        or type(shape) is not tuple
        or any(type(n) is not int or n < 0 for n in shape)
    ):
        raise pickle.UnpicklingError("an array without a proper dtype and shape")
    if "O" in dtype.text:
        if type(data) is not list or shape != (len(data),):
            raise pickle.UnpicklingError("arrays of objects are allowed in one dimension, as lists of arrays")
        return data
    if type(data) is str:
        data = data.encode("latin1")  # bytes of Python 2
    num_bytes = prod(shape) * np.dtype(dtype.text).itemsize
    if type(data) is not bytes or len(data) != num_bytes:
        got = f"{len(data)}" if type(data) is bytes else type(data).__name__
        raise pickle.UnpicklingError(
            f"an array of shape {shape!s:.60} and {dtype.text} needs {num_bytes} bytes, got {got}"
        )
    return np.frombuffer(data, dtype.text).reshape(shape, order="F" if order == "F" else "C")


def _make_empty_array(subtype: Any, shape: Any, code: Any) -> ArrayHolder:
    if subtype != _NDARRAY:
        raise pickle.UnpicklingError(f"an array of the kind {describe(subtype)} is not allowed")
    return ArrayHolder()


def _make_scalar(dtype: Any, data: Any) -> Any:
    if isinstance(dtype, _DtypeHolder) and "O" in dtype.text:
        raise pickle.UnpicklingError("scalars of dtype object are not allowed")
    return _make_array(data, dtype, (), "C").item()


def _make_bytes(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError("_codecs.encode is allowed for latin1 only")
    return text.encode("latin1")


def _make_box_mode(value: Any) -> int:
    if type(value) is not int:
        raise pickle.UnpicklingError(f"a BoxMode of {describe(value)} is not allowed")
    return int(BoxMode(value))


def _get_box_mode(owner: Any, name: Any) -> int:
    if owner != _BOX_MODE or type(name) is not str or name not in BoxMode.__members__:
        raise pickle.UnpicklingError(f"builtins.getattr of {describe(owner)} is not allowed")
    return int(BoxMode[name])


def _make_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    if not isinstance(storage, torch.Tensor) or any(type(number) is not int for number in (offset, *size, *stride)):
        raise pickle.UnpicklingError(f"a tensor of {describe(storage)} is not allowed")
    return storage.as_strided(size, stride, offset)  # which refuses to leave the storage


def _make_list(items: Any) -> list[Any]:
    if type(items) is not list:
        raise pickle.UnpicklingError(f"a list of {describe(items)} is not allowed")
    return items


# Token lists: what NumPy of any version, on any Python, writes for arrays and scalars, and torch for tensors.
_MODULE, _NDARRAY, _BOX_MODE = _Token("module"), _Token("ndarray"), _Token("BoxMode", _make_box_mode)
_ORDERED_DICT = {("collections", "OrderedDict"): _Token("OrderedDict", lambda: {})}
_ARRAY_NAMES = _ORDERED_DICT | {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Token("dtype", lambda text, *flags: _DtypeHolder(_checked_dtype(text))),
    # Python 3 writes bytes in protocol 2 as encode(text, "latin1"), and empty bytes as bytes().
    ("_codecs", "encode"): _Token("encode", _make_bytes),
    ("__builtin__", "bytes"): _Token("bytes", lambda: b""),
    # Pythons differ in how they write the member of an enum: BoxMode(0), or getattr(BoxMode, "XYXY_ABS").
    ("detectron2.structures.boxes", "BoxMode"): _BOX_MODE,
    ("builtins", "getattr"): _Token("getattr", _get_box_mode),
    ("__builtin__", "getattr"): _Token("getattr", _get_box_mode),
}
for _core in ("numpy.core", "numpy._core"):  # before NumPy 2 and since
    _ARRAY_NAMES[f"{_core}.multiarray", "_reconstruct"] = _Token("_reconstruct", _make_empty_array)
    _ARRAY_NAMES[f"{_core}.multiarray", "scalar"] = _Token("scalar", _make_scalar)
    _ARRAY_NAMES[f"{_core}.numeric", "_frombuffer"] = _Token("_frombuffer", _make_array)

_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32, "Half": torch.float16, "Double": torch.float64, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}  # fmt: skip
_LISTS = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
_TENSOR_NAMES = _ORDERED_DICT | {
    ("torch._utils", "_rebuild_tensor_v2"): _Token("tensor", _make_tensor),
    ("torch._utils", "_rebuild_parameter"): _Token("parameter", lambda tensor, *_: tensor),
    **{("torch.jit._pickle", name): _Token("list", _make_list) for name in _LISTS},
    **{("torch", name): _Token(name) for name in _STORAGES},
}


def load_arrays(path: Path) -> Any:
    """Return the content of a pickle of arrays and plain containers; arrays are ``ArrayHolder``s (see ``array_of``).

    Raises:
        ValueError: not a pickle, damaged, or it holds anything else.
    """
    with path.open("rb") as file:
        try:
            # a map, since reading n bytes of one allocates no more than the file has, whatever n is
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            value = _Interpreter(content, _ARRAY_NAMES).load()
            check_size(value, len(content))
        except MemoryError:
            raise
        except Exception as error:  # a damaged pickle may raise any type
            reason = str(error) if isinstance(error, pickle.UnpicklingError) else f"damaged: {error!r:.100}"
            raise ValueError(
                f"{path}: a pickle that is refused: {reason}; expected NumPy arrays, numbers and strings in lists and "
                "dicts"
            ) from error
    return value


def load_archive(program: BinaryIO, read_storage: Callable[[str], bytes]) -> Any:
    """Return the content of a TorchScript archive's pickle: tensors and plain containers in ``ModuleHolder``s.

    ``read_storage`` returns the bytes of a storage by its name.

    Raises:
        pickle.UnpicklingError: it refers to anything else. A damaged pickle may raise other errors.
    """
    return _ArchiveInterpreter(program, read_storage).load()


def array_of(value: Any) -> Any:
    """Return the array or list that an ``ArrayHolder`` holds; anything else as it is."""
    return value.value if isinstance(value, ArrayHolder) else value


def check_size(content: Any, file_bytes: int) -> None:
    """Refuse a content that is far larger than its file; what is shared counts each time.

    Raises:
        pickle.UnpicklingError: more than 64 MiB and 16 times the file; or a container holds itself.
    """
    num_bytes = _expanded_bytes(content, {})
    # Tensors tie weights and short pickles have some overhead, so that a factor of 16 is harmless; bombs have 10^6.
    if num_bytes > (1 << 26) + 16 * file_bytes:
        raise pickle.UnpicklingError(f"{file_bytes} bytes that stand for {num_bytes:.3g}")


def _expanded_bytes(value: Any, known: dict[int, float]) -> float:
    """Return the bytes of a value with its items; ``known`` has those of containers that were seen before, by id."""
    value = array_of(value)
    if not isinstance(value, (dict, list, tuple)):
        return getattr(value, "nbytes", len(value) if isinstance(value, (str, bytes)) else 8)
    if id(value) not in known:
        known[id(value)] = float("inf")  # found again below if the container holds itself
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = sum(_expanded_bytes(item, known) for item in items)
    return known[id(value)]
