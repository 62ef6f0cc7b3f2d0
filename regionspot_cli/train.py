"""Trains or evaluates a model."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm

from regionspot.checkpoint.checkpointer import load_model
from regionspot.config import load_config
from regionspot.data.build import check_registered
from regionspot.engine import RegionSpotTrainer, launch, set_up_run
from regionspot.evaluation.report import without_nan
from regionspot.utils.files import write_json
from regionspot.utils.run_lock import run_lock


def main(args: Namespace) -> Any:
    """Train or evaluate in one of the processes."""
    cfg = load_config(args.config_file, args.opts)
    cfg.freeze()
    with run_lock(cfg.OUTPUT_DIR):  # before anything is written there
        set_up_run(cfg, args)
        return train_or_evaluate(cfg, args)


def train_or_evaluate(cfg: CfgNode, args: Namespace) -> Any:
    """Do what the command line says."""
    if args.eval_only:
        if not cfg.DATASETS.TEST:
            raise ValueError("DATASETS.TEST is empty: expected the name of a registered data set")
        check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
        results = RegionSpotTrainer.test(cfg, load_model(cfg, resume=args.resume))
        if comm.is_main_process():
            # Detectron2's tester leaves out the name of a single data set
            by_dataset = results if len(cfg.DATASETS.TEST) > 1 else {cfg.DATASETS.TEST[0]: results}
            tables = {
                name: {task: without_nan(values) for task, values in tasks.items()}
                for name, tasks in by_dataset.items()
            }
            write_json(Path(cfg.OUTPUT_DIR) / "results.json", tables)
        return results
    trainer = RegionSpotTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def start(args: Namespace) -> None:
    """Start the processes that were asked for; one alone is this process."""
    launch(main, args, load_config(args.config_file, args.opts).MODEL.DEVICE)
