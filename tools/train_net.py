#!/usr/bin/env python
"""Train RegionSpot, or evaluate it with --eval-only.

Examples:
    tools/train_net.py --config-file configs/RegionSpot-BB-stage1.yaml --num-gpus 8
    tools/train_net.py --config-file configs/RegionSpot-BB-stage1.yaml --num-gpus 8 --resume
    torchrun --nproc-per-node 8 tools/train_net.py --config-file configs/RegionSpot-BB-stage1.yaml
    tools/train_net.py --config-file configs/RegionSpot-BB.yaml --eval-only MODEL.WEIGHTS model.pth
    tools/train_net.py --config-file configs/RegionSpot-BB.yaml --num-gpus 2 MODEL.DEVICE cpu   (two processes)
    tools/train_net.py --config-file configs/RegionSpot-BB.yaml DATASETS.TRAIN "('my.json:my_images',)"
"""

import argparse
import json
from pathlib import Path
from typing import Any


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse Detectron2's usual arguments (``default_argument_parser``), without the seconds that its import takes."""
    parser = argparse.ArgumentParser(epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="", metavar="FILE", help="path to config file")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="perform evaluation only")
    parser.add_argument("--num-gpus", type=int, default=1, help="number of gpus *per machine*")
    parser.add_argument("--num-machines", type=int, default=1, help="total number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="the rank of this machine (unique per machine)")
    parser.add_argument("--dist-url", default="auto", help="where processes meet; several machines: tcp://HOST:PORT")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    from startup import answer_first

    answer_first(parse_arguments)

from detectron2.config import CfgNode
from detectron2.utils import comm

from regionspot.checkpoint.checkpointer import load_model
from regionspot.config import load_config
from regionspot.data.build import check_registered
from regionspot.engine import RegionSpotTrainer, launch, set_up_run
from regionspot.evaluation.report import without_nan
from regionspot.utils.command_line import run_command
from regionspot.utils.files import atomic_path
from regionspot.utils.run_lock import run_lock


def main(args: argparse.Namespace) -> Any:
    cfg = load_config(args.config_file, args.opts)
    cfg.freeze()
    with run_lock(cfg.OUTPUT_DIR):  # before anything is written there
        set_up_run(cfg, args)
        return train_or_evaluate(cfg, args)


def train_or_evaluate(cfg: CfgNode, args: argparse.Namespace) -> Any:
    """Do what the command line says."""
    if args.eval_only:
        if not cfg.DATASETS.TEST:
            raise ValueError("DATASETS.TEST is empty: expected the name of a registered data set")
        check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
        results = RegionSpotTrainer.test(cfg, load_model(cfg, resume=args.resume))
        if comm.is_main_process():
            several = results if len(cfg.DATASETS.TEST) > 1 else {cfg.DATASETS.TEST[0]: results}
            with atomic_path(Path(cfg.OUTPUT_DIR) / "results.json") as temporary:
                tables = {
                    name: {task: without_nan(values) for task, values in sets.items()} for name, sets in several.items()
                }
                temporary.write_text(json.dumps(tables, indent=1))
        return results
    trainer = RegionSpotTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run(args: argparse.Namespace) -> None:
    launch(main, args, load_config(args.config_file, args.opts).MODEL.DEVICE)


if __name__ == "__main__":
    arguments = parse_arguments()
    if arguments.eval_only:
        run_command(run, arguments, kept="the predictions so far are kept")
    run_command(run, arguments, kept="the checkpoints so far are kept", options=["--resume"])
