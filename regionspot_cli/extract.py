"""Extracts SAM's tokens of the boxes to learn from into token stores, or verifies stores."""

import logging
import os
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from regionspot.checkpoint.checkpointer import load_model
from regionspot.config import load_config
from regionspot.data.build import check_registered
from regionspot.data.proposals import ProposalFile
from regionspot.data.store_coverage import check_match_iou
from regionspot.data.tokens import find_damage, get_token_stages
from regionspot.data.tokens.manifest import MANIFEST, read_manifest
from regionspot.data.tokens.side_by_side import list_stores, place_store
from regionspot.data.training_set import check_proposals
from regionspot.engine import fork_workers
from regionspot.engine.extract import Extraction, extract_tokens
from regionspot.engine.launch import check_gpus
from regionspot.modeling.identity import describe_sam
from regionspot.utils.command_line import run_process
from regionspot.utils.files import short_directory_name


def store_directory(output: Path, dataset_name: str) -> Path:
    """Return a data set's directory below ``output``."""
    # Short names may be equal; the manifest then refuses the second data set.
    return output / short_directory_name(dataset_name)


def verify(directories: list[Path]) -> int:
    """Print the problems of stores; return their number."""
    num_problems = 0
    for directory in (store for path in directories for store in list_stores(path) or [path]):
        try:
            problems, manifest = list(find_damage(directory)), read_manifest(directory)
        except (FileNotFoundError, ValueError) as error:
            problems = [str(error)]
        print(
            "\n".join(problems)
            or f"{directory}: {manifest['boxes']} boxes of {manifest['images']} images, all as written"
        )
        num_problems += len(problems)
    return num_problems


def work(index: int, args: Namespace, cfg: CfgNode) -> None:
    """Extract in one of the processes."""
    fork_workers()
    # Each process has a GPU, or an equal share of the cores.
    if args.num_gpus > 1 and cfg.MODEL.DEVICE == "cuda":
        cfg.MODEL.DEVICE = f"cuda:{index}"
        torch.cuda.set_device(index)  # or each process would hold a context on the first GPU, too
    elif args.num_gpus > 1:
        torch.set_num_threads(max((os.cpu_count() or 1) // args.num_gpus, 1))
    check_registered(args.datasets, "--datasets")
    extraction = read_extraction(args, cfg)
    model = load_model(cfg)
    sam = describe_sam(model.recognizer)  # hashes its weights
    for name, proposals in zip(args.datasets, args.proposals or [None] * len(args.datasets)):
        directory = place_store(store_directory(args.output, name), sam, args.side_by_side)
        extraction = replace(extraction, proposals=ProposalFile(proposals) if proposals else None)
        extract_tokens(model.recognizer, name, directory, extraction, show_progress=index == 0)


def read_extraction(args: Namespace, cfg: CfgNode) -> Extraction:
    """Return what to extract of each data set, without its proposals; what the command line lacks is the config's."""
    jitter = cfg.INPUT.BOX_JITTER if args.jitter is None else args.jitter
    return Extraction(
        stages=tuple(args.stages or get_token_stages(cfg)),
        flip=args.flip,
        jitter=jitter,
        jitter_copies=args.jitter_copies if jitter else 0,
        match_iou=cfg.MODEL.REGIONSPOT.PROPOSALS.IOU_THRESH_TRAIN,
        feature_maps=args.feature_maps,
        shard_images=args.shard_images,
        batch_size=cfg.TEST.BATCH_SIZE if args.batch_size is None else args.batch_size,
        skip_damaged=args.skip_damaged,
        workers=cfg.DATALOADER.NUM_WORKERS,
        machine=(args.machine_rank, args.num_machines),
    )


def find_proposals(datasets: list[str], cfg: CfgNode) -> list[str]:
    """Return the config's proposal file of each data set, "" for none; an empty list if no data set has one."""
    files = dict(zip(cfg.DATASETS.TRAIN, cfg.DATASETS.PROPOSAL_FILES_TRAIN))
    proposals = [files.get(name, "") for name in datasets]
    return proposals if any(proposals) else []


def check_inputs(args: Namespace, cfg: CfgNode) -> None:
    """Refuse options and proposal files that do not fit, before a model is loaded and the first data set extracted."""
    check_registered(args.datasets, "--datasets")
    check_gpus(args.num_gpus, cfg.MODEL.DEVICE)
    extraction = read_extraction(args, cfg)  # refuses other options
    if args.proposals:
        check_match_iou(extraction.match_iou)
    for name, path in zip(args.datasets, args.proposals):
        if path:
            check_proposals(ProposalFile(path), DatasetCatalog.get(name))


def describe_store(directory: Path) -> str:
    """Return a line about a store."""
    if not (directory / MANIFEST).is_file():
        return f"{directory}: not finished; other processes or machines have the rest, or copy their shards here"
    manifest = read_manifest(directory)
    left_out = sum(len(entry.get("left_out", ())) for entry in manifest["shards"])
    return f"{directory}: {manifest['boxes']} boxes of {manifest['images']} images, {left_out} unreadable left out"


def report(args: Namespace, cfg: CfgNode) -> None:
    """Print the stores' numbers of boxes and images, and the lines of a config that train with them."""
    stores: list[str] = []
    for name in args.datasets:
        parent = store_directory(args.output, name)
        directories = list_stores(parent) or [parent]
        for directory in directories:
            print(describe_store(directory))
        if all((directory / MANIFEST).is_file() for directory in directories):
            stores.append(str(parent))
    if len(stores) == len(args.datasets):
        print(f"DATASETS:\n  TRAIN: {tuple(args.datasets)}\n  TOKEN_STORES_TRAIN: {tuple(stores)}")
        if args.proposals:
            print(f"  PROPOSAL_FILES_TRAIN: {tuple(args.proposals)}")
        if args.proposals and (iou := cfg.MODEL.REGIONSPOT.PROPOSALS.IOU_THRESH_TRAIN) != 0.5:
            print(f"MODEL:\n  REGIONSPOT:\n    PROPOSALS:\n      IOU_THRESH_TRAIN: {iou}")
        if jitter := read_extraction(args, cfg).jitter:
            print(f"INPUT:\n  BOX_JITTER: {jitter}")


def main(args: Namespace) -> int:
    logging.basicConfig(level=logging.WARNING)
    if args.verify:
        return min(verify(args.verify), 1)
    cfg = load_config(args.config_file, args.opts)
    args.proposals = args.proposals or find_proposals(args.datasets, cfg)
    check_inputs(args, cfg)
    if args.num_gpus > 1:
        torch.multiprocessing.spawn(partial(run_process, work), (args, cfg), nprocs=args.num_gpus)
    else:
        work(0, args, cfg)
    report(args, cfg)
    return 0
