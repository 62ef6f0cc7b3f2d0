"""Times the search of a region index, and the naming of all its regions; and how much memory both take."""

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from regionspot.data.tokens.writer import StoreWriter
from regionspot.index import IndexClassifier, RegionIndex, search_index
from regionspot.index.store import INDEX
from tools.benchmarks.memory import process_memory, reset_peak

SHARD = 50_000  # regions
ORIGIN = {
    "inputs": {"source": ""},
    "scoring": {"score_function": "softmax", "score_rule": "product", "unknown_threshold": 0.0, "background": []},
    "logit_scale": 4.6052,
    **dict.fromkeys(("trained", "text"), {}),
    **dict.fromkeys(("sam", "clip", "proposals")),
}


def write_random_index(directory: Path, num_regions: int, dim: int) -> RegionIndex:
    """Write an index of random embeddings; each shard has one image."""
    generator = torch.Generator().manual_seed(0)
    writer = StoreWriter(directory, {**ORIGIN, "dim": dim}, -(-num_regions // SHARD), INDEX)
    for shard in range(writer.num_shards):
        count = min(SHARD, num_regions - shard * SHARD)
        name = torch.tensor(list(f"{shard}.jpg".encode()), dtype=torch.uint8)
        content = {
            "image_ids": torch.tensor([shard]),
            "sizes": torch.tensor([[480, 640]], dtype=torch.int32),
            "image_files": torch.zeros(1, 3, dtype=torch.int64),
            "names": name,
            "name_ends": torch.tensor([0, len(name)]),
            "offsets": torch.tensor([0, count]),
            "boxes": torch.tensor([0.0, 0, 64, 64]).repeat(count, 1),
            "embeddings": normalize(torch.randn(count, dim, generator=generator), dim=1).half(),
            "proposal_scores": torch.full((count,), -1.0),
            "predicted_ious": torch.full((count,), 0.9),
            "keys": torch.full((count,), -1),
        }
        writer.write(shard, content, 1)
    writer.finish()
    return RegionIndex(directory)


def classify(index: RegionIndex, names: torch.Tensor) -> None:
    for _ in IndexClassifier(index, names).classify():
        pass


def measure(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Return the shortest time of a call, and by how many gigabytes memory grew, mapped files included."""
    before, seconds = reset_peak(), []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "gigabytes": (process_memory("VmHWM") - before) / 2**30}


def main(args: Namespace) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(1)
    queries = normalize(torch.randn(100, args.dim, generator=generator), dim=1)
    names = normalize(torch.randn(args.names, args.dim, generator=generator), dim=1)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        index = write_random_index(Path(directory) / "index", args.regions, args.dim)
        size = sum(path.stat().st_size for path in index.directory.iterdir()) / 2**30
        print(f"{args.regions:,} regions of {args.dim} numbers, {size:.2f} GiB, {torch.get_num_threads()} threads")
        rows = {
            "open": measure(lambda: RegionIndex(index.directory), args.repeats),
            "search, 1 query": measure(lambda: search_index(index, queries[:1]), args.repeats),
            "search, 100 queries": measure(lambda: search_index(index, queries), args.repeats),
            f"classify, {args.names:,} names": measure(lambda: classify(index, names), args.repeats),
        }
    for name, row in rows.items():
        print(f"{name:24} {row['seconds']:8.2f} s   {row['gigabytes']:6.2f} GiB more memory")
    return rows
