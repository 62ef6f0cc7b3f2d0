"""The time of each part on one image, and of text embeddings, against SAM's decoder and CLIP as they are."""

import time
from argparse import Namespace
from collections.abc import Callable

import clip
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn

from regionspot.config import load_config
from regionspot.modeling import RegionRecognizer
from regionspot.structures import Prompts


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


def random_boxes(num_boxes: int, side: int) -> torch.Tensor:
    corners = torch.rand(num_boxes, 2, 2) * side * 0.9
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
def benchmark_text(recognizer: RegionRecognizer, num_names: int, repeats: int) -> list[tuple[str, str, str, str]]:
    """Time text embeddings of a vocabulary against one class at a time with the full context."""
    names = [f"wooden thing {index}" for index in range(num_names)]
    encoder, clip_model = recognizer.classifier.text_encoder, recognizer.vision_language.clip_model
    device = clip_model.text_projection.device

    def plain() -> None:
        for name in names:
            clip_model.encode_text(
                clip.tokenize([template.format(name) for template in encoder.templates]).to(device)
            ).mean(dim=0)

    elapsed, against = seconds(lambda: encoder.encode(names), repeats), seconds(plain, repeats)
    encoder(names)
    cached = seconds(lambda: encoder(names), repeats)
    return [
        (f"text embeddings of {num_names} names", "", f"{elapsed:.3f} s", f"{against / elapsed:.2f}"),
        ("the same from the cache", "", f"{cached:.3f} s", f"{against / cached:.2f}"),
    ]


def main(args: Namespace) -> None:
    recognizer = build(load_config(args.config_file, args.opts))
    if args.benchmark == "model":
        rows = benchmark_model(recognizer, args.boxes, args.repeats)
    else:
        rows = benchmark_text(recognizer, args.names, args.repeats)
    device = recognizer.vision_language.pixel_mean.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"a CPU, {torch.get_num_threads()} threads"
    headers = ["part", "parameters", "time", "times as fast as the plain way"]
    print(tabulate(rows, headers=headers, disable_numparse=True))
    print(f"on {where}")
