#!/usr/bin/env python
"""Train or evaluate a detector whose head is RegionSpot's, by Detectron2's own trainer and evaluators.

Examples:
    projects/RegionSpotRCNN/train_net.py --config-file projects/RegionSpotRCNN/configs/faster_rcnn_R_50_FPN.yaml \
        --eval-only MODEL.REGIONSPOT.HEAD.WEIGHTS regionspot_bb.pth
    projects/RegionSpotRCNN/train_net.py --config-file projects/RegionSpotRCNN/configs/faster_rcnn_R_50_FPN.yaml \
        --num-gpus 8 MODEL.REGIONSPOT.HEAD.WEIGHTS regionspot_bb.pth
"""

import argparse
import weakref
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
    default_setup,
)
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from regionspot.config import load_config
from regionspot.data.build import check_registered
from regionspot.engine import launch
from regionspot.engine.optimizer import build_optimizer
from regionspot.evaluation import DetectionLVISEvaluator
from regionspot.modeling.detector_weights import SafeDetectionCheckpointer


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` with LVIS's and COCO's evaluators, AdamW, and several processes on CPUs, too."""

    def __init__(self, cfg: CfgNode) -> None:
        """Build what ``DefaultTrainer`` builds, which wraps a model for several processes with a GPU each only."""
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        device_ids = [comm.get_local_rank()] if torch.device(cfg.MODEL.DEVICE).type == "cuda" else None
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=device_ids)
        loop = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = loop(model, self.build_train_loader(cfg), optimizer)
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
        folder = output_folder or f"{cfg.OUTPUT_DIR}/inference"
        return (DetectionLVISEvaluator if is_lvis else COCOEvaluator)(dataset_name, output_dir=folder)


def main(args: argparse.Namespace) -> Any:
    cfg = load_config(args.config_file, args.opts)
    check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
    if not args.eval_only:
        check_registered(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
    cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="regionspot")
    if args.eval_only:
        torch.manual_seed(max(cfg.SEED, 0))  # what has no weights is random, and the same in all processes
        model = Trainer.build_model(cfg)
        SafeDetectionCheckpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    launch(main, default_argument_parser(epilog=__doc__).parse_args())
