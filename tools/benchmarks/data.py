"""Drawn images to train from, and the loader alone."""

import itertools
import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from tabulate import tabulate
from torch.utils.data import DataLoader
from tqdm import tqdm

from regionspot.config import load_config
from regionspot.data import build_train_loader, register_json_dataset
from regionspot.data.dataset_mapper import annotated_regions
from regionspot.data.tokens import StoreWriter, TokenStore, pack_images
from regionspot.data.training_set import describe_annotations
from regionspot.utils.images import decode_image

DATASET = "benchmark_train"
SIZE = (480, 640)


def write_dataset(directory: Path, images: int, boxes: int, distinct: int = 64) -> None:
    """Write and register a data set like COCO: JPEGs of 640 x 480, of which ``distinct`` are used in turn."""
    rng, (height, width) = np.random.default_rng(0), SIZE
    (directory / "images").mkdir(parents=True, exist_ok=True)
    for index in range(min(distinct, images)):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(directory / "images" / f"{index}.jpg", quality=90)
    with (directory / "annotations.json").open("w") as file:
        records = [
            {"id": i, "file_name": f"{i % distinct}.jpg", "height": height, "width": width} for i in range(images)
        ]
        categories = [{"id": i, "name": f"thing {i}"} for i in range(365)]
        file.write(f'{{"images": {json.dumps(records)}, "categories": {json.dumps(categories)}, "annotations": [')
        for index in tqdm(range(images * boxes), desc="drawing annotations", unit="box", unit_scale=True):
            x, y, w, h = (float(v) for v in (rng.uniform((0, 0, 8, 8), (500, 360, 140, 120))).round(2))
            outline = [x, y, x + w, y, x + w, y + h, x + w / 2, y + h, x, y + h / 2]
            entry = {"id": index, "image_id": index // boxes, "category_id": int(rng.integers(365)), "iscrowd": 0}
            entry |= {"bbox": [x, y, w, h], "area": w * h, "segmentation": [outline]}
            file.write(("," if index else "") + json.dumps(entry))
        file.write("]}")
    if DATASET in DatasetCatalog:
        DatasetCatalog.remove(DATASET)
        MetadataCatalog.remove(DATASET)
    register_json_dataset(DATASET, directory / "annotations.json", directory / "images", "coco")


def write_store(directory: Path, dim: int, shard_images: int = 512, maps: tuple[int, int] | None = None) -> None:
    """Write a store of random tokens for the data set, and of feature maps of a size (L, width) if one is given."""
    records = DatasetCatalog.get(DATASET)
    number = -(-len(records) // shard_images)
    origin: dict[str, Any] = {
        "dataset": DATASET,
        "annotations": describe_annotations(DATASET),
        "sam": {},
        "flip": False,
    }
    writer = StoreWriter(directory, {**origin, "clip": {} if maps else None, "stages": ["transformer"]}, number)
    for shard in tqdm(range(number), desc="writing tokens", unit="shard"):
        images = []
        for index in range(shard * shard_images, min((shard + 1) * shard_images, len(records))):
            regions = annotated_regions(records[index])
            entry = {"image_id": records[index]["image_id"], "boxes": regions.gt_boxes.tensor}
            entry |= {"labels": regions.gt_classes, "tokens.transformer": torch.randn(len(regions), dim)}
            images.append(entry | ({"feature_maps": torch.randn(*maps)} if maps else {}))
        writer.write(shard, pack_images(images), len(images))
    writer.finish()


def per_second(calls: Iterator[Any], number: int, seconds: float = 3.0) -> float:
    """Return how many of the calls are made a second, in ``number`` calls or some seconds, after one batch of them."""
    next(calls)
    start, done = time.perf_counter(), 0
    for _ in itertools.islice(calls, number):
        done += 1
        if time.perf_counter() - start > seconds:
            break
    return done / (time.perf_counter() - start)


def steps(directory: Path, reduced: int) -> list[tuple[str, float, float | None]]:
    """Return what each step of the mapper does a second in one process, and the plain way to do the same."""
    records = DatasetCatalog.get(DATASET)
    store = TokenStore(directory / "tokens")
    (directory / "pth").mkdir(exist_ok=True)
    regions = [annotated_regions(records[i]).gt_boxes.tensor for i in range(len(records))]
    for index, boxes in enumerate(regions):
        torch.save(
            {"mask_tokens": store.get(index, boxes)["tokens"].half()[:, None]}, directory / "pth" / f"{index}.pth"
        )
    order = itertools.cycle(np.random.default_rng(1).permutation(len(records)).tolist())

    def decode(size: int) -> Iterator[Any]:
        return (decode_image(records[i]["file_name"], "RGB", size) for i in order)

    whole = per_second(decode(0), 2000)
    loads = (torch.load(directory / "pth" / f"{i}.pth", weights_only=True) for i in order)
    return [
        ("record with its boxes", per_second((annotated_regions(records[i]) for i in order), 20000), None),
        ("image", whole, None),
        (f"image reduced to {reduced} px or more", per_second(decode(reduced), 2000), whole),
        ("stored tokens", per_second((store.get(i, regions[i]) for i in order), 20000), per_second(loads, 20000)),
    ]


def benchmark_data(cfg: CfgNode, directory: Path, images: int, workers: list[int]) -> tuple[list[tuple], list[tuple]]:
    """Return rows of the mapper's steps, and of the loader's images a second for numbers of workers."""
    write_dataset(directory, images, boxes=10)
    reduced = 224
    write_store(directory / "tokens", dim=256)
    write_store(directory / "maps", dim=256, maps=(197, 768))
    measured = steps(directory, reduced)
    rows = [(name, f"{rate:.0f}", f"{rate / plain:.2f}" if plain else "") for name, rate, plain in measured]
    tokens = ["DATASETS.TOKEN_STORES_TRAIN", (str(directory / "tokens"),)]
    ways: dict[str, list[Any]] = {
        "SAM in the loop: whole images": [],
        "stored tokens": tokens,
        "stored tokens, reduced JPEGs": [*tokens, "INPUT.REDUCED_JPEG", reduced],
        "stored tokens and feature maps": ["DATASETS.TOKEN_STORES_TRAIN", (str(directory / "maps"),)],
    }
    loaders = []
    for name, overrides in ways.items():
        rates: list[float] = []
        plain_rates: list[float] = []
        for number in workers:
            single = cfg.clone()
            single.merge_from_list([*overrides, "DATALOADER.NUM_WORKERS", number, "DATASETS.TRAIN", (DATASET,)])
            loader = build_train_loader(single)
            plain = DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, num_workers=number, collate_fn=list)
            for batches, measured_rates in ((iter(loader), rates), (iter(plain), plain_rates)):
                measured_rates.append(per_second(batches, 10**6, seconds=4) * single.SOLVER.IMS_PER_BATCH)
            del batches, loader, plain
        loaders.append((name, *(f"{rate:.0f}" for rate in rates)))
        loaders.append(("  each tensor handed over by itself", *(f"{rate:.0f}" for rate in plain_rates)))
    return rows, loaders


def main(args: Namespace) -> None:
    cfg = load_config(args.config_file, args.opts)
    with tempfile.TemporaryDirectory() as directory:
        steps, loaders = benchmark_data(cfg, Path(directory), args.images, args.workers)
    headers = ["step, in one process", "images/s", "times as fast as the plain way"]
    print(tabulate(steps, headers=headers, disable_numparse=True), end="\n\n")
    headers = ["loader alone, images/s", *(f"{count} workers" for count in args.workers)]
    print(tabulate(loaders, headers=headers, disable_numparse=True))
