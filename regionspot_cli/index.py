"""Builds region indexes, or verifies one."""

import logging
from argparse import Namespace
from pathlib import Path

from detectron2.utils.logger import setup_logger

from regionspot import RegionSpotPredictor
from regionspot.config import load_config
from regionspot.data.build import check_registered
from regionspot.engine import fork_workers
from regionspot.index import ImageSet, RegionIndex, build_index, dataset_images, file_images
from regionspot.utils.command_line import printable


def find_images(args: Namespace) -> ImageSet:
    if not args.dataset:
        return file_images(args.images)
    check_registered([args.dataset], "--dataset")
    return dataset_images(args.dataset, with_boxes=not args.find_boxes)


def verify(directory: Path) -> int:
    """Print the problems of an index; return their number."""
    index = RegionIndex(directory)
    problems = list(index.find_damage())
    text = f"{directory}: {len(index):,} regions of {index.num_images:,} images, all as written"
    print("\n".join(map(printable, problems)) or printable(text))
    return len(problems)


def main(args: Namespace) -> int:
    if args.verify:
        return int(verify(args.verify) > 0)
    setup_logger(name="regionspot").setLevel(logging.WARNING)
    fork_workers()
    images = find_images(args)
    cfg = load_config(args.config_file, args.opts)
    if not images.has_boxes and cfg.MODEL.REGIONSPOT.PROPOSALS.SOURCE == "auto":
        cfg.MODEL.REGIONSPOT.PROPOSALS.SOURCE = "sam_automatic"
    index = build_index(RegionSpotPredictor(cfg), cfg, images, args.output, args.shard_images)
    if index is None:
        print(f"{printable(args.output)}: other processes still work on it")
        return 0
    left_out = index.left_out()
    print(f"{printable(args.output)}: {len(index):,} regions of {index.num_images:,} images, {len(left_out)} left out")
    for reason in left_out:
        print(f"  left out: {printable(reason)}")
    return 0
