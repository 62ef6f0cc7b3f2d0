"""Time and memory of each part on one image, and of text embeddings, against the plain way in the same run."""

import json
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from tabulate import tabulate

from regionspot.config import load_config
from regionspot.modeling import RegionRecognizer
from regionspot.modeling.masks import RegionMasks
from regionspot.modeling.recognizer import ImageFeatures
from regionspot.structures import Prompts
from tools.benchmarks.memory import process_memory, reset_peak
from tools.benchmarks.plain import PlainRecognizer, encode_names

HEADERS = ("part", "time", "memory", "plain time", "plain memory", "times as fast")
SIZE = (480, 640)  # of the image, pixels


def measure(function: Callable[[], object], repeats: int, device: torch.device) -> tuple[float, float]:
    """Return the shortest time in seconds of ``repeats`` runs, and by how many GB memory grows at most (Linux)."""
    times = []
    before = _reset_peak(device)
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times), (_peak(device) - before) / 2**30


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> int:
    """Reset the peak; return the bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return reset_peak()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_memory("VmHWM")


def random_boxes(num_boxes: int) -> torch.Tensor:
    """Return (N, 4) float XYXY boxes inside the image."""
    corners = torch.rand(num_boxes, 2, 2) * torch.tensor([SIZE[1] * 0.9, SIZE[0] * 0.9])
    return torch.cat([corners.min(dim=1).values, corners.max(dim=1).values + 20], dim=1)


class Table:
    """Rows of measurements, ours beside the plain way."""

    def __init__(self, repeats: int, device: torch.device) -> None:
        self.repeats, self.device = repeats, device
        self.rows: list[dict[str, Any]] = []

    def add(self, part: str, function: Callable[[], object], plain: Callable[[], object] | None = None) -> None:
        """Measure ``function`` and, once, ``plain``."""
        row: dict[str, Any] = {"part": part}
        row["seconds"], row["gigabytes"] = measure(function, self.repeats, self.device)
        if plain is not None:
            row["plain_seconds"], row["plain_gigabytes"] = measure(plain, 1, self.device)
            row["ratio"] = row["plain_seconds"] / row["seconds"]
        self.rows.append(row)
        headers = HEADERS if len(self.rows) == 1 else ()
        print(tabulate([self._cells(row)], headers=headers, tablefmt="plain"), flush=True)

    @staticmethod
    def _cells(row: dict[str, Any]) -> list[str]:
        formats = {"seconds": "{:.3f} s", "gigabytes": "{:.2f} GB", "plain_seconds": "{:.3f} s"}
        formats |= {"plain_gigabytes": "{:.2f} GB", "ratio": "{:.1f}"}
        return [row["part"].ljust(36), *(text.format(row[key]) if key in row else "" for key, text in formats.items())]


@torch.no_grad()
def benchmark_model(recognizer: RegionRecognizer, numbers: list[int], table: Table) -> None:
    """Measure every part on one image, with each number of boxes."""
    localizer, plain = recognizer.localizer, PlainRecognizer(recognizer)
    image = torch.randint(256, (3, *SIZE), dtype=torch.uint8)
    height, width = localizer.input_size(SIZE)
    resized = torch.randint(256, (3, height, width), dtype=torch.uint8)  # what the plain way begins with
    recognizer.classifier.text_encoder.templates = ("{}",)  # how the embeddings came about does not matter here
    recognizer.set_vocabulary([str(i) for i in range(1203)])
    recognizer([image], [Boxes(random_boxes(1))], masks="rle")  # warms up
    table.add("SAM image encoder", lambda: localizer.encode_images([image]), lambda: plain.encode(resized))
    table.add("CLIP image encoder", lambda: recognizer.vision_language.encode_images([image]))
    features = recognizer.encode_images([image])
    for number in numbers:
        _benchmark_boxes(recognizer, plain, (image, resized), features, random_boxes(number), table)


def _benchmark_boxes(
    recognizer: RegionRecognizer,
    plain: PlainRecognizer,
    images: tuple[torch.Tensor, torch.Tensor],
    features: ImageFeatures,
    boxes: torch.Tensor,
    table: Table,
) -> None:
    """Measure what depends on the boxes; ``images`` are the image and the same in SAM's input size."""
    assert features.embeddings is not None
    image, resized = images
    input_size, embedding = (resized.shape[1], resized.shape[2]), features.embeddings
    prompts, scaled = [Prompts(boxes=boxes)], (boxes * (resized.shape[2] / SIZE[1])).to(plain.device)
    [located] = recognizer.locate(features, prompts, with_masks=True)
    assert located.masks is not None
    logits, tokens = located.masks, [located.tokens]
    upsampler = recognizer.localizer.mask_upsampler(SIZE)
    masks = RegionMasks(logits, torch.arange(len(boxes), device=plain.device), upsampler)

    def decode() -> object:
        return plain.decode(embedding, scaled)

    def encode() -> object:
        return plain.rles(logits[:, None], input_size, SIZE)

    name = f"{len(boxes)} boxes"
    table.add(f"{name}: tokens", lambda: recognizer.locate(features, prompts), decode)
    table.add(f"{name}: tokens, masks", lambda: recognizer.locate(features, prompts, with_masks=True), decode)
    table.add(f"{name}: masks to RLE", lambda: masks.to_rles(*SIZE), encode)
    table.add(f"{name}: 1203 classes", lambda: recognizer.classify(tokens, features.feature_map))
    table.add(
        f"{name}: from image to result",
        lambda: recognizer([image], [Boxes(boxes)], masks="rle"),
        lambda: plain.recognize(resized, scaled, SIZE),
    )


@torch.no_grad()
def benchmark_text(recognizer: RegionRecognizer, num_names: int, table: Table) -> None:
    """Measure text embeddings of a vocabulary against one class at a time with the full context."""
    encoder, names = recognizer.classifier.text_encoder, [f"wooden thing {index}" for index in range(num_names)]
    encoder.encode(names[:1])
    table.add(
        f"text embeddings of {num_names} names", lambda: encoder.encode(names), lambda: encode_names(encoder, names)
    )
    encoder(names)
    table.add("the same from the cache", lambda: encoder(names))
    many = [f"{i}" for i in range(1203)]
    encoder.templates = ("{}",)
    encoder(many)
    table.add("1203 names from the cache", lambda: encoder(many))


def main(args: Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    torch.manual_seed(0)
    recognizer = build_model(cfg).eval().recognizer  # random weights cost as much as trained ones
    table = Table(args.repeats, recognizer.vision_language.pixel_mean.device)
    if args.benchmark == "model":
        benchmark_model(recognizer, args.boxes, table)
    else:
        benchmark_text(recognizer, args.names, table)
    on_cuda = table.device.type == "cuda"
    where = torch.cuda.get_device_name(table.device) if on_cuda else f"a CPU, {torch.get_num_threads()} threads"
    memory = "" if on_cuda else f"; the whole process has {process_memory('VmRSS') / 2**30:.2f} GB"
    print(f"on {where}, {cfg.MODEL.REGIONSPOT.PRECISION}{memory}")
    if args.json:
        content = {"device": where, "precision": cfg.MODEL.REGIONSPOT.PRECISION, "rows": table.rows}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")
