"""Builds region indexes, or verifies one."""

import logging
from argparse import Namespace
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils.logger import setup_logger

from regionspot import RegionSpotPredictor
from regionspot.config import load_config
from regionspot.data.build import check_registered
from regionspot.data.datasets import register_from_spec
from regionspot.engine import fork_workers
from regionspot.index import ImageSet, RegionIndex, build_index, dataset_images, file_images
from regionspot.utils.command_line import printable


def find_images(args: Namespace) -> ImageSet:
    """Return the images of --input, with the boxes of --regions."""
    finds_boxes, [first, *others] = args.regions in ("sam", "detector"), args.input
    if not others and (first in DatasetCatalog or register_from_spec(first)):
        check_registered([first], "--input")
        if args.regions not in ("", "gt") and not finds_boxes:
            raise ValueError(f"--regions {args.regions}: expected sam, detector or gt for a data set")
        return dataset_images(first, with_boxes=not finds_boxes)
    if args.regions == "gt":
        raise ValueError("--regions gt: expected a data set as --input, such as my.json:my_images")
    return file_images(args.input, "" if finds_boxes else args.regions)


def choose_source(cfg: CfgNode, regions: str) -> None:
    """Let SAM, or the config's detector, find the boxes."""
    node = cfg.MODEL.REGIONSPOT.PROPOSALS
    if regions in ("sam", "detector"):
        node.SOURCE = {"sam": "sam_automatic", "detector": "detector"}[regions]
    elif node.SOURCE == "auto":
        node.SOURCE = "sam_automatic"


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
    if not images.has_boxes:
        choose_source(cfg, args.regions)
    index = build_index(RegionSpotPredictor(cfg), cfg, images, args.output, args.shard_images)
    if index is None:
        print(f"{printable(args.output)}: other processes still work on it")
        return 0
    left_out = index.left_out()
    print(f"{printable(args.output)}: {len(index):,} regions of {index.num_images:,} images, {len(left_out)} left out")
    for reason in left_out:
        print(f"  left out: {printable(reason)}")
    return 0
