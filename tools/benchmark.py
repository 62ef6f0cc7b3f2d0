#!/usr/bin/env python
"""Measure what each part costs, beside the plain way to do the same in the same run.

Examples:
    tools/benchmark.py model --config-file configs/RegionSpot-BB.yaml
    tools/benchmark.py text --config-file configs/RegionSpot-BB.yaml --names 20
    tools/benchmark.py data --config-file configs/RegionSpot-BB.yaml --workers 0 1 2
    tools/benchmark.py memory --config-file configs/RegionSpot-BB.yaml SOLVER.IMS_PER_BATCH 4
    tools/benchmark.py eval --images 2000 --detections 300 --task bbox segm
    tools/benchmark.py eval --protocol fixed --images 19809   (all detections of LVIS val: memory and disk)
    tools/benchmark.py eval --protocol coco --images 29821 --categories 13204 --alone   (the size of V3Det val)
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    model = commands.add_parser("model", help="every part on one image")
    model.add_argument("--boxes", type=int, default=100, help="boxes in the image")
    text = commands.add_parser("text", help="text embeddings of a vocabulary")
    text.add_argument("--names", type=int, default=20, help="class names")
    data = commands.add_parser("data", help="the loader alone, on drawn pictures of 640 x 480 with 10 boxes")
    data.add_argument("--images", type=int, default=1000, help="in the drawn data set")
    data.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of loading processes")
    memory = commands.add_parser("memory", help="memory of training from a large annotation file")
    memory.add_argument("--boxes", type=int, default=1_000_000, help="in the annotation file, 10 an image")
    memory.add_argument("--workers", type=int, default=4, help="loading processes")
    memory.add_argument("--iterations", type=int, default=10, help="training steps")
    evaluation = commands.add_parser("eval", help="evaluation of generated detections, against lvis or pycocotools")
    evaluation.add_argument("--protocol", choices=["lvis", "coco", "fixed"], default="lvis", help="by whose rules")
    evaluation.add_argument("--images", type=int, default=2000, help="in the generated data set")
    evaluation.add_argument("--categories", type=int, default=1203, help="in the generated data set")
    evaluation.add_argument("--detections", type=int, default=300, help="an image, or boxes of one with fixed")
    evaluation.add_argument("--task", nargs="+", choices=["bbox", "segm"], default=["bbox"], help="whose IoU counts")
    evaluation.add_argument("--alone", action="store_true", help="without the reference, and once")
    for command in (model, text, data, memory):
        command.add_argument("--config-file", required=True, metavar="FILE")
        command.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides")
    for command in (model, text):
        command.add_argument("--repeats", type=int, default=3, help="runs, of which the shortest counts")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    from startup import answer_first

    answer_first(parse_arguments)

import clip
import torch
from benchmark_data import benchmark_data, benchmark_memory
from benchmark_eval import HEADERS, benchmark_eval, benchmark_masks
from benchmark_fixed import benchmark_fixed
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn

from regionspot.config import load_config
from regionspot.modeling import RegionRecognizer
from regionspot.structures import Prompts
from regionspot.utils.command_line import run_command


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Return the shortest of ``repeats`` runs, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def build(cfg: CfgNode) -> RegionRecognizer:
    """Build the model with random weights: they cost as much as trained ones."""
    torch.manual_seed(0)
    return build_model(cfg).eval().recognizer


def random_boxes(number: int, side: int) -> torch.Tensor:
    corners = torch.rand(number, 2, 2) * side * 0.9
    return torch.cat([corners.min(dim=1).values, corners.max(dim=1).values + side * 0.05], dim=1)


@torch.no_grad()
def benchmark_model(recognizer: RegionRecognizer, boxes: int, repeats: int) -> list[tuple[str, str, str, str]]:
    """Time every part on one 640 x 480 image, against SAM's own decoder where ours differs."""
    image = torch.randint(256, (3, 480, 640), dtype=torch.uint8)
    prompts = [Prompts(boxes=random_boxes(boxes, 480))]
    recognizer.classifier.text_encoder.templates = ("{}",)  # how the embeddings came about does not matter here
    recognizer.set_vocabulary([str(i) for i in range(1203)])
    features = recognizer.encode_images([image])
    [located] = recognizer.locate(features, prompts)
    sam = recognizer.localizer.sam
    sparse, dense = sam.prompt_encoder(None, prompts[0].boxes.to(features.embeddings.device), None)  # type: ignore[union-attr]
    pe = sam.prompt_encoder.get_dense_pe()

    def times(function: Callable[[], object]) -> float:
        return seconds(function, repeats)

    plain = times(lambda: sam.mask_decoder(features.embeddings, pe, sparse, dense, False))
    tokens = times(lambda: recognizer.locate(features, prompts))
    masks = times(lambda: recognizer.locate(features, prompts, with_masks=True))
    vision, integration = recognizer.vision_language, recognizer.knowledge_integration
    encode_sam = times(lambda: recognizer.localizer.encode_images([image]))
    encode_clip = times(lambda: vision.encode_images([image]))
    classify = times(lambda: recognizer.classify([located.tokens], features.feature_map))
    rows: list[tuple[str, nn.Module, float, float | None]] = [
        ("SAM image encoder", sam.image_encoder, encode_sam, None),
        ("CLIP image encoder", vision.clip_model.visual, encode_clip, None),
        (f"{boxes} boxes: tokens", sam.mask_decoder, tokens, plain),
        (f"{boxes} boxes: tokens and masks", sam.mask_decoder, masks, plain),
        ("knowledge integration, 1203 classes", integration, classify, None),
    ]
    return [
        (
            name,
            f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M",
            f"{spent:.3f} s",
            f"{against / spent:.2f}" if against else "",
        )
        for name, module, spent, against in rows
    ]


@torch.no_grad()
def benchmark_text(recognizer: RegionRecognizer, number: int, repeats: int) -> list[tuple[str, str, str, str]]:
    """Time text embeddings of a vocabulary against one class at a time with the full context."""
    names = [f"wooden thing {index}" for index in range(number)]
    encoder, clip_model = recognizer.classifier.text_encoder, recognizer.vision_language.clip_model
    device = clip_model.text_projection.device

    def plain() -> None:
        for name in names:
            clip_model.encode_text(
                clip.tokenize([template.format(name) for template in encoder.templates]).to(device)
            ).mean(dim=0)

    ours, against = seconds(lambda: encoder.encode(names), repeats), seconds(plain, repeats)
    encoder(names)
    cached = seconds(lambda: encoder(names), repeats)
    return [
        (f"text embeddings of {number} names", "", f"{ours:.3f} s", f"{against / ours:.2f}"),
        ("the same from the cache", "", f"{cached:.3f} s", f"{against / cached:.2f}"),
    ]


def report_data(args: argparse.Namespace, cfg: CfgNode) -> None:
    with tempfile.TemporaryDirectory() as directory:
        if args.what == "memory":
            rows = benchmark_memory(cfg, Path(directory), args.boxes, args.workers, args.iterations)
            print(tabulate(rows, headers=["memory of all processes together", ""], disable_numparse=True))
            return
        steps, loaders = benchmark_data(cfg, Path(directory), args.images, args.workers)
    headers = ["step, in one process", "images/s", "times as fast as the plain way"]
    print(tabulate(steps, headers=headers, disable_numparse=True), end="\n\n")
    headers = ["loader alone, images/s", *(f"{number} workers" for number in args.workers)]
    print(tabulate(loaders, headers=headers, disable_numparse=True))


def report_eval(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        if args.protocol == "fixed":
            headers, rows = benchmark_fixed(Path(directory), args.images, args.detections, args.categories)
            print(tabulate(rows, headers=headers, disable_numparse=True))
            return
        rows = benchmark_eval(Path(directory), args)
    print(tabulate(rows, headers=HEADERS[: len(rows[0])], disable_numparse=True))
    if not args.alone:
        print("the metrics agree to 1e-9")
        headers = ["masks of an image", "ours", "memory", "one a detection", *HEADERS[4:]]
        print("\n" + tabulate([benchmark_masks()], headers=headers, disable_numparse=True))
    print("time of the CPU; memory at the peak, what was added to the imports (and with them)")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.what == "eval":
        report_eval(args)
        return
    cfg = load_config(args.config_file, args.opts)
    if args.what in ("data", "memory"):
        report_data(args, cfg)
        return
    recognizer = build(cfg)
    if args.what == "model":
        rows = benchmark_model(recognizer, args.boxes, args.repeats)
    else:
        rows = benchmark_text(recognizer, args.names, args.repeats)
    device = recognizer.vision_language.pixel_mean.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"a CPU, {torch.get_num_threads()} threads"
    headers = ["part", "parameters", "time", "times as fast as the plain way"]
    print(tabulate(rows, headers=headers, disable_numparse=True))
    print(f"on {where}")


if __name__ == "__main__":
    run_command(main)
