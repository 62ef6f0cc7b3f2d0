"""Pickles, read without running anything that is in them; among them those of NumPy arrays.

Neither Python's unpickler nor NumPy's own restoring of arrays is trusted with the file. The opcodes are interpreted
here, those for plain values only; the few names that are admitted (NumPy's arrays, Detectron2's ``BoxMode``) become
inert tokens, and what the file "calls" them with is checked and turned into arrays by the functions below. So no
function or class, ours or another's, is ever within the reach of an opcode.
"""

import mmap
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

_PLAIN_NAMES = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT "
    "BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES "
    "BINBYTES8 LIST EMPTY_LIST TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT APPEND APPENDS GET BINGET LONG_BINGET "
    "PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL"
)
_PLAIN_OPCODES = [getattr(pickle, name)[0] for name in _PLAIN_NAMES.split()]
_ADMITTED = {
    **{
        (f"numpy.{core}.{module}", name): name
        for core in ("core", "_core")  # before NumPy 2 and since
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    },
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",  # how Python 3 writes bytes in protocol 2
    ("__builtin__", "bytes"): "bytes",  # and no bytes
    ("collections", "OrderedDict"): "OrderedDict",
    ("detectron2.structures.boxes", "BoxMode"): "BoxMode",
    ("builtins", "getattr"): "getattr",  # how some Pythons write the member of an enum; of BoxMode only
    ("__builtin__", "getattr"): "getattr",
}


@dataclass(frozen=True)
class Name:
    """Stands for what the file refers to by name."""

    name: str


@dataclass
class _Dtype:
    text: str


@dataclass
class ArrayHolder:
    """An array in the making, and what it became."""

    value: Any = None  # np.ndarray of numbers or strings, or a list: what an array of objects holds


class _Refusing(dict):
    def __missing__(self, opcode: int) -> Any:
        raise pickle.UnpicklingError(f"opcode {bytes([opcode])!r} makes more than arrays and plain containers")


class InertUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """The interpreter of the Python library in Python, less what makes objects; its memo is a dict (no huge tables).

    Attributes:
        admitted: what a file may refer to by (module, name), and what it is called here.
        makers: what may be called, by that name, and the function that answers in its place.
    """

    admitted: Mapping[tuple[str, str], str]
    makers: Mapping[str, Callable[..., Any]]
    dispatch = _Refusing({code: pickle._Unpickler.dispatch[code] for code in _PLAIN_OPCODES})  # type: ignore[attr-defined]

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]

    def find_class(self, module: str, name: str) -> Name:
        if (module, name) in self.admitted:
            return Name(self.admitted[module, name])
        raise pickle.UnpicklingError(f"{describe(f'{module}.{name}')} is neither an array nor a plain container")

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name) or function.name not in self.makers or type(arguments) is not tuple:
            raise pickle.UnpicklingError(f"a call of {describe(function)} is not admitted")
        self.stack.append(self.makers[function.name](*arguments))

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

    dispatch.update(
        {
            pickle.REDUCE[0]: load_reduce,
            pickle.SETITEMS[0]: load_setitems,
            pickle.SETITEM[0]: load_setitem,
            pickle.DICT[0]: load_dict,
            pickle.BYTEARRAY8[0]: load_bytearray8,
        }
    )

    @classmethod
    def admit(cls, opcodes: dict[bytes, Callable[..., None]]) -> None:
        """Let a subclass interpret further opcodes."""
        cls.dispatch = _Refusing({**cls.dispatch, **{code[0]: method for code, method in opcodes.items()}})


class _ArrayUnpickler(InertUnpickler):
    admitted = _ADMITTED

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, ArrayHolder) and target.value is None and type(state) is tuple and len(state) in (4, 5):
            shape, dtype, is_fortran, data = state[-4:]
            target.value = _make_array(data, dtype, shape, "F" if is_fortran else "C")
        elif isinstance(target, _Dtype) and _is_plain_dtype_state(state):
            target.text = _checked_dtype(f"{state[1]}{target.text.lstrip('<>=|')}")
        else:
            raise pickle.UnpicklingError(f"setting the state of {describe(target)} is not admitted")


_ArrayUnpickler.admit({pickle.BUILD: _ArrayUnpickler.load_build})


def describe(value: Any) -> str:
    """Return a few words for a message; never the whole of a container, which a file can make endless."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:80] + "...")
    if isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 1 << 64):
        return repr(value)
    return value.name if isinstance(value, Name) else type(value).__name__.lstrip("_").lower()


def _is_plain_dtype_state(state: Any) -> bool:
    """Tell whether it is (version, byte order, no subtype, no names, no fields, ...)."""
    return type(state) is tuple and len(state) >= 5 and type(state[1]) is str and state[2:5] == (None,) * 3


def _checked_dtype(text: Any) -> str:
    if type(text) is str and re.fullmatch(r"[<>=|]?(?:b1|[iu][1248]|f[248]|U\d{1,4}|O8?)", text):
        return text
    raise pickle.UnpicklingError(f"arrays of dtype {describe(text)} are not admitted; expected numbers")


def _make_array(data: Any, dtype: Any, shape: Any, order: Any) -> Any:
    """Return the array of these bytes, or for a 1-D array of objects the list of them."""
    if not isinstance(dtype, _Dtype) or type(shape) is not tuple or any(type(n) is not int or n < 0 for n in shape):
        raise pickle.UnpicklingError("an array without a proper dtype and shape")
    if "O" in dtype.text:
        if type(data) is not list or shape != (len(data),):
            raise pickle.UnpicklingError("arrays of objects are admitted in one dimension, as lists of arrays")
        return data
    if type(data) is str:
        data = data.encode("latin1")  # bytes of Python 2
    needed = prod(shape) * np.dtype(dtype.text).itemsize
    if type(data) is not bytes or len(data) != needed:
        got = f"{len(data)}" if type(data) is bytes else type(data).__name__
        raise pickle.UnpicklingError(
            f"an array of shape {shape!s:.60} and {dtype.text} needs {needed} bytes, got {got}"
        )
    return np.frombuffer(data, dtype.text).reshape(shape, order="F" if order == "F" else "C")


def _make_empty(subtype: Any, shape: Any, code: Any) -> ArrayHolder:
    if subtype != Name("ndarray"):
        raise pickle.UnpicklingError(f"an array of the kind {describe(subtype)} is not admitted")
    return ArrayHolder()


def _make_scalar(dtype: Any, data: Any) -> Any:
    if isinstance(dtype, _Dtype) and "O" in dtype.text:
        raise pickle.UnpicklingError("scalars of dtype object are not admitted")
    return _make_array(data, dtype, (), "C").item()


def _make_encoded(text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise pickle.UnpicklingError("_codecs.encode is admitted for latin1 only")
    return text.encode("latin1")


def _make_box_mode(value: Any) -> int:
    if type(value) is not int:
        raise pickle.UnpicklingError(f"a BoxMode of {describe(value)} is not admitted")
    return int(BoxMode(value))


def _make_member(owner: Any, name: Any) -> int:
    if owner != Name("BoxMode") or type(name) is not str or name not in BoxMode.__members__:
        raise pickle.UnpicklingError(f"builtins.getattr of {describe(owner)} is not admitted")
    return int(BoxMode[name])


_MAKERS: dict[str, Callable[..., Any]] = {
    "_reconstruct": _make_empty,
    "_frombuffer": lambda data, dtype, shape, order: ArrayHolder(_make_array(data, dtype, shape, order)),
    "scalar": _make_scalar,
    "dtype": lambda text, *flags: _Dtype(_checked_dtype(text)),
    "encode": _make_encoded,
    "bytes": lambda: b"",
    "OrderedDict": lambda: {},
    "BoxMode": _make_box_mode,
    "getattr": _make_member,
}
_ArrayUnpickler.makers = _MAKERS


def load_arrays(path: Path) -> Any:
    """Return what a pickle of arrays and plain containers holds; arrays are ``ArrayHolder``s (see ``array_of``).

    Raises:
        ValueError: not a pickle, damaged, or it holds or asks for anything else.
    """
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # reads no more than is there, whatever is asked
    try:
        value = _ArrayUnpickler(content, encoding="latin1").load()
        check_size(value, len(content))
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged program leads the interpreter to
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else f"damaged: {error!r:.100}"
        raise ValueError(
            f"{path}: a pickle that is refused: {reason}; expected NumPy arrays, numbers and strings in lists and dicts"
        ) from error
    return value


def array_of(value: Any) -> Any:
    """Return the array or list that an ``ArrayHolder`` holds; anything else as it is."""
    return value.value if isinstance(value, ArrayHolder) else value


def check_size(content: Any, file_bytes: int) -> None:
    """Refuse what a file of this size has no room for: arrays mentioned again and again, tensors of repeated values.

    Args:
        content: arrays, tensors and plain values in dicts, lists and tuples.
        file_bytes: size of the file that it was read from.

    Raises:
        pickle.UnpicklingError: more than 16 times the file, beyond 64 MiB; or a container holds itself.
    """
    needed = _expanded_bytes(content, {})
    if needed > (1 << 26) + 16 * file_bytes:
        raise pickle.UnpicklingError(f"{file_bytes} bytes that stand for {needed:.3g}")


def _expanded_bytes(value: Any, known: dict[int, float]) -> float:
    """Return the bytes of a value where each mention of an array counts; ``known`` are those of the containers seen."""
    value = array_of(value)
    items: Iterable[Any] = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list, tuple)):
        return getattr(value, "nbytes", len(value) if isinstance(value, (str, bytes)) else 8)
    if id(value) not in known:
        known[id(value)] = float("inf")  # until it is known: of one that holds itself
        known[id(value)] = sum(_expanded_bytes(item, known) for item in items)
    return known[id(value)]
