"""Time, memory and floating-point operations of a call, and what the machine could do."""

import ctypes
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tools.benchmarks.memory import process_memory, reset_peak

GIGA = 2**30
REPEATED = 5.0  # seconds after which no call is repeated
COUNTED = 6.0  # seconds: the operations of longer calls are not counted, which takes another run


@dataclass(frozen=True)
class Measurement:
    """What one call takes.

    Attributes:
        seconds: of the call; on a CPU the shortest of some, on a GPU the median.
        added: bytes by which memory grows at the most.
        total: bytes in use at the most: of the process, or on a GPU of its tensors.
        flops: floating-point operations, 0 if they were not counted.
    """

    seconds: float
    added: int
    total: int
    flops: int = 0


class Meter:
    """Measures calls on a device."""

    def __init__(self, device: torch.device, repeats: int = 0, is_compiled: bool = False) -> None:
        """
        Args:
            device: where the calls compute.
            repeats: timed runs at the most; by default 3 on a CPU and 10 on a GPU.
            is_compiled: the first run compiles, and must not be timed.
        """
        self.device, self.is_compiled = device, is_compiled
        self.is_cuda = device.type == "cuda"
        self.repeats = repeats or (10 if self.is_cuda else 3)

    def measure(self, function: Callable[[], object], is_counted: bool = False) -> Measurement:
        """Run ``function`` for some seconds; with ``is_counted`` count its operations, too, in a run of its own."""
        if self.is_cuda or self.is_compiled:  # elsewhere the shortest run is none that warms up
            function()
        before, times = self.reset_peak(), [self.time(function)]
        while len(times) < self.repeats and sum(times) < REPEATED:
            times.append(self.time(function))
        seconds = statistics.median(times) if self.is_cuda else min(times)
        total = self.peak()
        flops = count_flops(function) if is_counted and seconds < COUNTED else 0
        return Measurement(seconds, max(total - before, 0), total, flops)

    def time(self, function: Callable[[], object]) -> float:
        """Return the seconds of one call, until the device has done its work."""
        if not self.is_cuda:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        with torch.cuda.device(self.device):
            start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start_event.record()
            function()
            end_event.record()
            end_event.synchronize()
        return start_event.elapsed_time(end_event) / 1000

    def reset_peak(self) -> int:
        """Begin to measure the peak; return the bytes in use."""
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        _release_free_memory()
        return reset_peak()

    def peak(self) -> int:
        """Return the most bytes that were in use since ``reset_peak``."""
        return torch.cuda.max_memory_allocated(self.device) if self.is_cuda else process_memory("VmHWM")


def _release_free_memory() -> None:
    """Give the system back what was freed: pages that an earlier call left would hide what the next one takes."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc
        library.malloc_trim(0)


def count_flops(function: Callable[[], object]) -> int:
    """Return the floating-point operations of matrix products and convolutions; nothing is compiled meanwhile."""
    # the counter does not see into compiled code, and does not know attention on a CPU
    formulas: dict[Any, Any] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.compiler.set_stance("force_eager"), counter:
        function()
    return counter.get_total_flops()


def _attention_flops(query: Any, key: Any, value: Any, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: object, **__: object) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def measure_peak_flops(meter: Meter, dtype: torch.dtype) -> float:
    """Return the most floating-point operations a second of matrix products, of ever larger ones."""
    side, seconds, best = 256, 0.0, 0.0
    while side < 8192 and seconds < 0.01:
        side *= 2
        one, other = (torch.randn(side, side, device=meter.device).to(dtype) for _ in range(2))
        meter.time(lambda: one @ other)  # noqa: B023 - it is called at once
        seconds = min(meter.time(lambda: one @ other) for _ in range(5))  # noqa: B023
        best = max(best, 2 * side**3 / seconds)
    return best


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what figures depend on beside the code."""
    machine: dict[str, Any] = {"device": device.type, "torch": torch.__version__}
    if device.type == "cuda":
        gigabytes = torch.cuda.get_device_properties(device).total_memory / GIGA
        return machine | {"name": f"{torch.cuda.get_device_name(device)}, {gigabytes:.0f} GB"}
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.is_file() else ""
    name = re.search(r"model name\s*: (.+)", text)
    machine["name"] = name[1].strip() if name else platform.processor() or platform.machine()
    machine |= {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return machine | {"bf16": bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", text))}
