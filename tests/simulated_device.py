"""A simulated accelerator, for machines without one.

Its tensors compute on the CPU, say that they are on another device, and refuse to meet CPU tensors, as those of CUDA
do. Inside ``simulated_device()`` the device "meta" stands for it, of all devices the one that PyTorch's autograd serves
without a driver: ``MODEL.DEVICE meta`` builds, trains and runs a model there, by the code that would do so on a GPU.

What CUDA allows is allowed: copies across, indexing by CPU tensors, CPU scalars (0 dimensions) in elementwise
operations. What it refuses is refused: all other mixing (``MixedDevicesError``), and NumPy's view of a device tensor
(TypeError).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map_only

DEVICE = torch.device("meta")
aten = torch.ops.aten
ACROSS = {aten.copy_.default, aten._to_copy.default}
# name of the operation -> its arguments that CUDA takes from the CPU, whatever their number of dimensions
INDEXING = {
    f"aten::{name}": {"indices"}
    for name in ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
}
WITHOUT_SCALARS = {"aten::cat", "aten::stack"}  # not elementwise: a CPU scalar is refused, too


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
    """Lets ``torch.tensor(..., device=...)`` give values: of a "meta" tensor PyTorch drops them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and is_simulated(kwargs.get("device")):
            kwargs.pop("device")
            return function(*args, **kwargs).to(DEVICE)
        return function(*args, **kwargs)


def is_simulated(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def run(operation, args: tuple, kwargs: dict):
    """Run an operation on the inner tensors; its results are on the device asked for, or else on its arguments'."""
    if operation is aten._fused_sdp_choice.default:
        return 0  # the plain mathematics of attention
    simulated = any(isinstance(x, SimulatedTensor) for x in tree_iter((args, kwargs)))
    if simulated and operation not in ACROSS:
        check_devices(operation, args, kwargs)
    inner_args, inner_kwargs = tree_map_only(SimulatedTensor, lambda x: x.inner, (args, kwargs))
    device = kwargs.get("device")
    if device is not None:
        inner_kwargs["device"] = "cpu"
        inner_kwargs.pop("pin_memory", None)
    result = operation(*inner_args, **inner_kwargs)
    there = simulated if device is None else is_simulated(device)
    if operation is aten.copy_.default:
        return args[0]
    if there:
        result = tree_map_only(torch.Tensor, SimulatedTensor, result)
    return return_and_correct_aliasing(operation, args, kwargs, result) if simulated and there else result


def check_devices(operation, args: tuple, kwargs: dict) -> None:
    """Refuse CPU tensors beside simulated ones where CUDA does."""
    schema = operation._schema
    given = {argument.name: value for argument, value in zip(schema.arguments, args)} | kwargs
    from_cpu = INDEXING.get(schema.name, set())
    if from_cpu and isinstance(given["self"], SimulatedTensor):
        given = {name: value for name, value in given.items() if name not in from_cpu}
    written = {x.name for x in schema.arguments if x.alias_info is not None and x.alias_info.is_write}
    for name, value in given.items():
        for tensor in tree_iter(value):
            if not isinstance(tensor, torch.Tensor) or isinstance(tensor, SimulatedTensor):
                continue
            if tensor.dim() or name in written or schema.name in WITHOUT_SCALARS:
                raise MixedDevicesError(
                    f"{schema.name}: {name!r} is a CPU tensor of shape {tuple(tensor.shape)} among simulated ones"
                )


class _Autocast(torch.autocast):
    """Autocast of the simulated device, which has float32 only."""

    def __init__(self, device_type: str, *args, **kwargs) -> None:
        super().__init__("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)


@contextmanager
def simulated_device() -> Iterator[torch.device]:
    """Let "meta" be the simulated accelerator inside the block."""
    with mock.patch.object(torch, "autocast", _Autocast), _Literals(), _Operations():
        yield DEVICE
