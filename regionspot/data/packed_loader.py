"""A loader whose workers hand a batch over in a few tensors."""

import atexit
import io
import multiprocessing
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


@atexit.register
def _kill_workers() -> None:
    """Kill what is left of loaders: workers that ignore SIGTERM would let ``multiprocessing`` wait forever at exit."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class PackedLoader(DataLoader):
    """PyTorch's loader of batches that are lists of samples, as with ``collate_fn=list``.

    A worker hands each tensor over by a file descriptor and a memory mapping of its own. Those of 512 images are 2,048:
    more than a process may have open by default (``ulimit -n``), and a second's work. Here the tensors of a batch lie
    in one buffer for each dtype; those of the samples, at any depth, are views of them.
    """

    def __init__(self, dataset: Dataset, *, num_workers: int = 0, **options: Any) -> None:
        """The arguments are ``DataLoader``'s, without ``collate_fn``."""
        options["collate_fn"] = PackedSamples if num_workers else list
        super().__init__(dataset, num_workers=num_workers, **options)

    def __iter__(self) -> Iterator[list[Any]]:  # type: ignore[override]
        for batch in super().__iter__():
            yield batch.unpack() if isinstance(batch, PackedSamples) else batch


class PackedSamples:
    """Samples of a batch as they are handed over: their structure, and their CPU tensors in buffers."""

    def __init__(self, samples: list[Any]) -> None:
        structure = io.BytesIO()
        packer = _Packer(structure, protocol=pickle.HIGHEST_PROTOCOL)
        packer.dump(samples)
        self.structure = structure.getvalue()
        self.buffers = {dtype: torch.cat(parts) for dtype, parts in packer.parts.items()}

    def pin_memory(self) -> "PackedSamples":
        """Move the buffers to page-locked memory; PyTorch calls it with ``pin_memory=True``."""
        self.buffers = {dtype: buffer.pin_memory() for dtype, buffer in self.buffers.items()}
        return self

    def unpack(self) -> list[Any]:
        """Return the samples."""
        return _Unpacker(io.BytesIO(self.structure), self.buffers).load()


class _Packer(pickle.Pickler):
    """Leaves tensors out of what it pickles: ``parts`` has them, flat, in the order of their places."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts: dict[torch.dtype, list[torch.Tensor]] = {}
        self._sizes: dict[torch.dtype, int] = {}

    def persistent_id(self, value: Any) -> tuple[torch.dtype, int, tuple[int, ...]] | None:
        if type(value) is not torch.Tensor or value.device.type != "cpu" or value.layout is not torch.strided:
            return None
        start = self._sizes.get(value.dtype, 0)
        self._sizes[value.dtype] = start + value.numel()
        self.parts.setdefault(value.dtype, []).append(value.detach().reshape(-1))
        return value.dtype, start, tuple(value.shape)


class _Unpacker(pickle.Unpickler):
    """Reads what a worker of this program has pickled, never a file."""

    def __init__(self, file: io.BytesIO, buffers: dict[torch.dtype, torch.Tensor]) -> None:
        super().__init__(file)
        self._buffers = buffers

    def persistent_load(self, place: tuple[torch.dtype, int, tuple[int, ...]]) -> torch.Tensor:
        dtype, start, shape = place
        size = torch.Size(shape).numel()
        return self._buffers[dtype][start : start + size].view(shape)
