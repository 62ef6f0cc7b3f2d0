"""How much memory a run takes."""

import resource
import sys

import torch


def peak_memory(device: torch.device) -> float:
    """Return the peak memory in GB (1e9 bytes) so far: of tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
