"""The memory of this process (Linux)."""

from pathlib import Path


def process_memory(field: str) -> int:
    """Return bytes: "VmRSS" in use now, "VmHWM" the most since ``reset_peak``, or since the start."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


def reset_peak() -> int:
    """Begin to measure the peak; return the bytes in use."""
    Path("/proc/self/clear_refs").write_text("5")
    return process_memory("VmRSS")
