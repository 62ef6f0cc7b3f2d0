#!/usr/bin/env python
"""Extract SAM's tokens of every annotated box into token stores, or verify stores.

It may be stopped at any moment and goes on when it is started again. Several machines that share the directory may run
it at once; machines that do not share one take --num-machines and --machine-rank, and their shards are copied
together before it is run once more.

Examples:
    tools/extract_tokens.py --config-file configs/RegionSpot-BB.yaml --datasets objects365_v1_train --output tokens
    tools/extract_tokens.py --config-file configs/RegionSpot-BB.yaml --datasets my.json:my_images --output tokens --flip
    tools/extract_tokens.py --verify tokens/objects365_v1_train
"""

import argparse
import logging
import os
from functools import partial
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="", metavar="FILE", help="of the model whose SAM to run")
    parser.add_argument("--datasets", nargs="+", default=[], metavar="NAME", help="registered names, or my.json:images")
    parser.add_argument("--output", type=Path, metavar="DIR", help="each data set's store is a directory in it")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="of SAM; default: the config's TOKEN_STAGE")
    parser.add_argument("--flip", action="store_true", help="also of the pictures flipped from left to right")
    parser.add_argument("--feature-maps", action="store_true", help="also CLIP's feature maps")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes, each on a GPU of its own if there are any")
    parser.add_argument("--num-machines", type=int, default=1, help="machines that share no directory")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine among them")
    parser.add_argument("--batch-size", type=int, help="images of one step; default: TEST.BATCH_SIZE")
    parser.add_argument("--shard-images", type=int, default=512, help="images of the data set a shard")
    parser.add_argument("--skip-damaged", action="store_true", help="leave out pictures that cannot be read")
    parser.add_argument("--verify", nargs="+", type=Path, metavar="DIR", help="check finished stores, and do no more")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides")
    args = parser.parse_args(arguments)
    if not args.verify and not (args.config_file and args.datasets and args.output):
        parser.error("expected --config-file, --datasets and --output, or --verify")
    return args


if __name__ == "__main__":
    from startup import answer_first

    answer_first(parse_arguments)

import torch
from detectron2.config import CfgNode

from regionspot.checkpoint.checkpointer import load_model
from regionspot.config import load_config
from regionspot.data.build import check_registered
from regionspot.data.tokens import find_damage
from regionspot.data.tokens.manifest import MANIFEST, read_manifest
from regionspot.engine import fork_workers
from regionspot.engine.extract import Extraction, extract_tokens
from regionspot.engine.launch import check_gpus
from regionspot.utils.command_line import run_command, run_process
from regionspot.utils.files import short_directory_name


def store_directory(output: Path, dataset_name: str) -> Path:
    """Return a data set's directory below ``output``; that of another one is refused when it is opened."""
    return output / short_directory_name(dataset_name)


def verify(directories: list[Path]) -> int:
    """Print what is wrong with stores; return how many things are."""
    problems = 0
    for directory in directories:
        try:
            found, manifest = list(find_damage(directory)), read_manifest(directory)
        except (FileNotFoundError, ValueError) as error:
            print(error)
            problems += 1
            continue
        print(
            "\n".join(found) or f"{directory}: {manifest['boxes']} boxes of {manifest['images']} images, all as written"
        )
        problems += len(found)
    return problems


def work(index: int, args: argparse.Namespace, cfg: CfgNode) -> None:
    """Extract in one of the processes."""
    fork_workers()
    if args.num_gpus > 1 and cfg.MODEL.DEVICE == "cuda":
        cfg.MODEL.DEVICE = f"cuda:{index}"
    elif args.num_gpus > 1:
        torch.set_num_threads(max((os.cpu_count() or 1) // args.num_gpus, 1))
    check_registered(args.datasets, "--datasets")
    model = load_model(cfg)
    extraction = Extraction(
        stages=tuple(args.stages or [cfg.MODEL.REGIONSPOT.TOKEN_STAGE]),
        flip=args.flip,
        feature_maps=args.feature_maps,
        shard_images=args.shard_images,
        batch_size=cfg.TEST.BATCH_SIZE if args.batch_size is None else args.batch_size,
        skip_damaged=args.skip_damaged,
        workers=cfg.DATALOADER.NUM_WORKERS,
        machine=(args.machine_rank, args.num_machines),
    )
    for name in args.datasets:
        directory = store_directory(args.output, name)
        extract_tokens(
            model.recognizer, model.recognizer.weight_sources, name, directory, extraction, show_progress=index == 0
        )


def report(args: argparse.Namespace) -> None:
    """Print what the stores hold, and the lines of a config that train with them."""
    stores: list[str] = []
    for name in args.datasets:
        directory = store_directory(args.output, name)
        if (directory / MANIFEST).is_file():
            manifest = read_manifest(directory)
            left_out = sum(len(entry.get("left_out", ())) for entry in manifest["shards"])
            print(
                f"{directory}: {manifest['boxes']} boxes of {manifest['images']} images, {left_out} unreadable left out"
            )
            stores.append(str(directory))
        else:
            print(f"{directory}: not finished; other processes or machines have the rest, or copy their shards here")
    if len(stores) == len(args.datasets):
        print(f"DATASETS:\n  TRAIN: {tuple(args.datasets)}\n  TOKEN_STORES_TRAIN: {tuple(stores)}")


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING)
    if args.verify:
        return min(verify(args.verify), 1)
    cfg = load_config(args.config_file, args.opts)
    check_registered(args.datasets, "--datasets")
    check_gpus(args.num_gpus, cfg.MODEL.DEVICE)
    if args.num_gpus > 1:
        torch.multiprocessing.spawn(partial(run_process, work), (args, cfg), nprocs=args.num_gpus)
    else:
        work(0, args, cfg)
    report(args)
    return 0


if __name__ == "__main__":
    run_command(main, kept="finished shards are kept")
