#!/usr/bin/env python
"""Train or evaluate a detector whose head is RegionSpot's, by Detectron2's own trainer and evaluators.

Examples:
    projects/RegionSpotRCNN/train_net.py --config-file projects/RegionSpotRCNN/configs/faster_rcnn_R_50_FPN.yaml \
        --eval-only MODEL.REGIONSPOT.HEAD.WEIGHTS regionspot_bb.pth
    projects/RegionSpotRCNN/train_net.py --config-file projects/RegionSpotRCNN/configs/faster_rcnn_R_50_FPN.yaml \
        --num-gpus 8 MODEL.REGIONSPOT.HEAD.WEIGHTS regionspot_bb.pth
"""

import argparse
import contextlib
import weakref
from collections import OrderedDict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_argument_parser,
)
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from regionspot import RegionSpotROIHeads
from regionspot.checkpoint.checkpointer import SafeDetectionCheckpointer
from regionspot.checkpoint.loading import find_recognizer
from regionspot.config import load_config
from regionspot.data.build import check_registered, dataset_vocabulary
from regionspot.engine import launch, set_up_run
from regionspot.engine.optimizer import build_optimizer
from regionspot.engine.run_setup import log_size
from regionspot.engine.train_loop import autocast_precision
from regionspot.evaluation import DetectionLVISEvaluator
from regionspot.utils.command_line import run_command
from regionspot.utils.run_lock import run_lock


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` with LVIS's and COCO's evaluators, AdamW, and several processes on CPUs, too."""

    def __init__(self, cfg: CfgNode) -> None:
        """Build what ``DefaultTrainer`` builds, which wraps a model for several processes with a GPU each only."""
        TrainerBase.__init__(self)
        check_solver(cfg)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = build_model(cfg)  # `self.build_model` would log all of its modules
        log_size(model)
        optimizer = self.build_optimizer(cfg, model)
        device_ids = [comm.get_local_rank()] if torch.device(cfg.MODEL.DEVICE).type == "cuda" else None
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
        data_loader, precision = self.build_train_loader(cfg), autocast_precision(cfg)
        if precision is None:
            self._trainer = SimpleTrainer(model, data_loader, optimizer)
        else:
            self._trainer = AMPTrainer(model, data_loader, optimizer, precision=precision)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeDetectionCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        is_lvis = MetadataCatalog.get(dataset_name).get("evaluator_type") == "lvis"
        directory = output_folder or f"{cfg.OUTPUT_DIR}/inference"
        return (DetectionLVISEvaluator if is_lvis else COCOEvaluator)(dataset_name, output_dir=directory)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict[str, Any]:
        """Evaluate on each of ``DATASETS.TEST``, RegionSpot's head against that data set's own vocabulary."""
        results = OrderedDict()
        for index, name in enumerate(cfg.DATASETS.TEST):
            single = cfg.clone()
            single.defrost()
            single.DATASETS.TEST = (name,)
            own = [evaluators[index]] if evaluators else None
            with contextlib.ExitStack() as stack:
                if any(isinstance(module, RegionSpotROIHeads) for module in model.modules()):
                    stack.enter_context(find_recognizer(model).using_vocabulary(dataset_vocabulary(cfg, name)))
                results[name] = super().test(single, model, own)
        return next(iter(results.values())) if len(results) == 1 else results


def check_solver(cfg: CfgNode) -> None:
    """Refuse what ``tools/train_net.py`` has and Detectron2's trainer has not."""
    if cfg.SOLVER.ACCUMULATE != 1 or cfg.SOLVER.EMA.ENABLED:
        raise ValueError(
            "SOLVER.ACCUMULATE and SOLVER.EMA are of tools/train_net.py: expected 1 and False, got "
            f"{cfg.SOLVER.ACCUMULATE} and {cfg.SOLVER.EMA.ENABLED}"
        )
    if cfg.SOLVER.AMP.ENABLED and torch.device(cfg.MODEL.DEVICE).type != "cuda":
        raise ValueError("SOLVER.AMP.ENABLED: Detectron2's trainer has mixed precision on CUDA only; set it to False")


def main(args: argparse.Namespace) -> Any:
    cfg = load_config(args.config_file, args.opts)
    check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
    if not args.eval_only:
        check_registered(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
    cfg.freeze()
    with run_lock(cfg.OUTPUT_DIR):  # before anything is written there
        set_up_run(cfg, args)
        return train_or_evaluate(cfg, args)


def train_or_evaluate(cfg: CfgNode, args: argparse.Namespace) -> Any:
    """Do what the command line says."""
    if args.eval_only:
        torch.manual_seed(max(cfg.SEED, 0))  # what has no weights is random, and the same in all processes
        model = build_model(cfg)
        SafeDetectionCheckpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run(args: argparse.Namespace) -> None:
    launch(main, args, load_config(args.config_file, args.opts).MODEL.DEVICE)


if __name__ == "__main__":
    arguments = default_argument_parser(epilog=__doc__).parse_args()
    run_command(run, arguments, kept="the checkpoints so far are kept", options=["--resume"])
