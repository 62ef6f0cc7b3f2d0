"""A simulated accelerator, for machines without one.

Its tensors compute on the CPU, say that they are on another device, and refuse to meet CPU tensors, as those of CUDA
do. Inside ``simulated_device()`` the device "meta" stands for it, of all devices the one that PyTorch's autograd serves
without a driver: ``MODEL.DEVICE meta`` builds, trains and runs a model there, by the code that would do so on a GPU.

What CUDA allows is allowed: copies across, indexing by CPU tensors, CPU scalars (0 dimensions) in elementwise
operations. What it refuses is refused: all other mixing (``MixedDevicesError``), and NumPy's view of a device tensor
(TypeError).
"""

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from regionspot.engine import optimizer

DEVICE = torch.device("meta")
aten = torch.ops.aten
ACROSS = {aten.copy_.default, aten._to_copy.default}
# name of the operation -> its arguments that CUDA takes from the CPU, whatever their number of dimensions
INDEXING = {
    f"aten::{name}": {"indices"}
    for name in ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
}
# results whose values or shapes the CPU waits for
WAITING = {f"aten::{name}" for name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")}
WITHOUT_SCALARS = {"aten::cat", "aten::stack"}  # not elementwise: a CPU scalar is refused, too


_waits: list[list[str]] = []  # of each ``counted_waits`` that is open


class MixedDevicesError(RuntimeError):
    """Tensors of two devices met in one operation."""


class SimulatedTensor(torch.Tensor):
    """A tensor of the simulated device; ``inner`` is the CPU tensor that has its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "SimulatedTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        tensor.inner = inner
        return tensor

    is_meta = False  # or ``load_state_dict`` would warn that it does nothing

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})

    def numpy(self, *_, **__):
        raise TypeError("can't convert a tensor of the simulated device to numpy; copy it to the CPU by .cpu() first")

    __array__ = numpy

    def tolist(self):
        note_wait("tolist")
        return self.inner.tolist()

    def __format__(self, specification):
        return format(self.inner, specification)

    def __repr__(self, **_):
        return f"simulated {self.inner!r}"

    def __reduce_ex__(self, protocol):  # what is saved is read on any device
        return self.inner.detach().__reduce_ex__(protocol)


class _Operations(TorchDispatchMode):
    """Catches the operations without a simulated tensor among their arguments: those that make or move one."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Lets ``torch.tensor`` make and read simulated tensors, which it does without an operation to catch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function not in (torch.tensor, torch.as_tensor):
            return function(*args, **kwargs)
        data, *rest = args
        if not isinstance(data, torch.Tensor):
            data = convert(data, SimulatedTensor, SimulatedTensor.tolist)
        there = is_simulated(kwargs.get("device"))
        if there:
            del kwargs["device"]
        result = function(data, *rest, **kwargs)
        return result.to(DEVICE) if there else result


def is_simulated(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def tensors_in(values) -> Iterator[torch.Tensor]:
    """Yield the tensors among an operation's arguments, which may be lists of tensors."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def convert(value, kind: type, function):
    """Apply a function to what is of a kind in an argument or a result."""
    if isinstance(value, kind):
        return function(value)
    return type(value)(convert(x, kind, function) for x in value) if isinstance(value, (list, tuple)) else value


def unwrap(value, kinds: set[bool]):
    """Return an operation's argument for the CPU; add to ``kinds`` whether each tensor in it is simulated."""
    if isinstance(value, torch.Tensor):
        simulated = isinstance(value, SimulatedTensor)
        kinds.add(simulated)
        return value.inner if simulated else value
    return type(value)([unwrap(x, kinds) for x in value]) if isinstance(value, (list, tuple)) else value


def run(operation, args: tuple, kwargs: dict):
    """Run an operation on the inner tensors; its results are on the device asked for, or else on its arguments'."""
    if operation is aten._fused_sdp_choice.default:
        return 0  # the plain mathematics of attention
    kinds: set[bool] = set()
    inner_args = unwrap(args, kinds)
    inner_kwargs = {name: unwrap(value, kinds) for name, value in kwargs.items()}
    if len(kinds) == 2 and operation not in ACROSS:
        check_devices(operation, args, kwargs)
    if makes_cpu_wait(operation, args, kwargs, kinds):
        note_wait(operation._schema.name)
    device = kwargs.get("device")
    if device is not None:
        inner_kwargs["device"] = "cpu"
        inner_kwargs.pop("pin_memory", None)
    result = operation(*inner_args, **inner_kwargs)
    if operation is aten.copy_.default:
        return args[0]
    if True not in kinds if device is None else not is_simulated(device):
        return result
    result = convert(result, torch.Tensor, SimulatedTensor)
    return return_and_correct_aliasing(operation, args, kwargs, result) if True in kinds else result


def check_devices(operation, args: tuple, kwargs: dict) -> None:
    """Refuse CPU tensors beside simulated ones where CUDA does."""
    schema = operation._schema
    values = {argument.name: value for argument, value in zip(schema.arguments, args)} | kwargs
    from_cpu = INDEXING.get(schema.name, set())
    if from_cpu and isinstance(values["self"], SimulatedTensor):
        values = {name: value for name, value in values.items() if name not in from_cpu}
    written = {x.name for x in schema.arguments if x.alias_info is not None and x.alias_info.is_write}
    for name, value in values.items():
        for tensor in tensors_in([value]):
            if isinstance(tensor, SimulatedTensor):
                continue
            if tensor.dim() or name in written or schema.name in WITHOUT_SCALARS:
                raise MixedDevicesError(
                    f"{schema.name}: {name!r} is a CPU tensor of shape {tuple(tensor.shape)} among simulated ones"
                )


def makes_cpu_wait(operation, args: tuple, kwargs: dict, kinds: set[bool]) -> bool:
    """Return whether CUDA would let the program wait until the device has done all its work."""
    name = operation._schema.name
    if operation is aten._to_copy.default:
        there, device = True in kinds, kwargs.get("device")
        return device is not None and is_simulated(device) != there and not kwargs.get("non_blocking")
    if operation is aten.copy_.default:
        return len(kinds) == 2 and not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
    if name in INDEXING:  # a mask is turned into indices
        indices = [x for x in args[1] if isinstance(x, torch.Tensor)]
        return any(isinstance(x, SimulatedTensor) and x.dtype == torch.bool for x in indices) or (
            True in kinds and not all(isinstance(x, SimulatedTensor) for x in indices)
        )
    return True in kinds and (name in WAITING or (name == "aten::repeat_interleave" and not kwargs.get("output_size")))


def note_wait(what: str) -> None:
    """Note what waits, and where in the package."""
    if _waits:
        frames = [frame for frame in traceback.extract_stack() if "/regionspot/" in frame.filename]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
        for waits in _waits:
            waits.append(f"{what} in {place}")


@contextmanager
def counted_waits() -> Iterator[list[str]]:
    """Collect, inside ``simulated_device()``, the operations for whose end the program would wait on CUDA."""
    _waits.append([])
    try:
        yield _waits[-1]
    finally:
        _waits.pop()


class _Autocast(torch.autocast):
    """Autocast of the simulated device, which has float32 only."""

    def __init__(self, device_type: str, *args, **kwargs) -> None:
        super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


@contextmanager
def simulated_device() -> Iterator[torch.device]:
    """Let "meta" be the simulated accelerator inside the block."""
    fused = [*_get_fused_kernels_supported_devices(), DEVICE.type]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "autocast", _Autocast))
        pytorch = import_module("torch.optim.optimizer")  # torch.optim hides it
        stack.enter_context(mock.patch.object(pytorch, "_get_fused_kernels_supported_devices", lambda: fused))
        stack.enter_context(mock.patch.object(optimizer, "FUSED_DEVICES", fused))
        stack.enter_context(_Literals())
        stack.enter_context(_Operations())
        yield DEVICE
