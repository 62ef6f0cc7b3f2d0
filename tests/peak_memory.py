"""The most bytes that tensors hold at a time, on any device; on "meta" a model of real size costs nothing."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the storages that operations make inside the block, as long as they live.

    Attributes:
        peak: bytes.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._known = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._count((args, kwargs), False)
        output = func(*args, **(kwargs or {}))
        self._count(output, True)
        self.peak = max(self.peak, self.live)
        return output

    def _count(self, tensors, is_new):
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known[storage._cdata] = storage
                    size = storage.nbytes() if is_new else 0
                    self.live += size
                    weakref.finalize(storage, self._remove, size)

    def _remove(self, size):
        self.live -= size
