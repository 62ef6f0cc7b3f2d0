"""Detectron2's trainer for RegionSpot."""

import logging
import os
import weakref
from collections import OrderedDict
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, SimpleTrainer, create_ddp_model
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from regionspot.checkpoint import RegionSpotCheckpointer, find_recognizer
from regionspot.data.build import build_test_loader, build_train_loader, check_registered, dataset_vocabulary
from regionspot.engine.optimizer import build_optimizer
from regionspot.evaluation import build_evaluator

logger = logging.getLogger(__name__)


class RegionSpotTrainer(DefaultTrainer):
    """``DefaultTrainer`` with RegionSpot's loaders, optimiser, checkpoints and vocabularies, on GPUs or CPUs."""

    def __init__(self, cfg: CfgNode) -> None:
        """Build everything that ``cfg`` names; weights are loaded by ``resume_or_load``."""
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
        data_loader = self.build_train_loader(cfg)
        self.vocabulary = dataset_vocabulary(cfg, cfg.DATASETS.TRAIN)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=[comm.get_local_rank()] if on_gpu else None)
        if cfg.SOLVER.AMP.ENABLED and not on_gpu:
            logger.info("SOLVER.AMP.ENABLED has no effect on a CPU: training in float32")
        trainer = AMPTrainer if cfg.SOLVER.AMP.ENABLED and on_gpu else SimpleTrainer
        self._trainer = trainer(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = RegionSpotCheckpointer.from_config(cfg, model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def train(self) -> Any:
        find_recognizer(self.model).set_vocabulary(self.vocabulary, "train")
        return super().train()

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict[str, Any]:
        """Evaluate on each of ``DATASETS.TEST`` against that data set's own vocabulary.

        Returns:
            Metrics; under the data sets' names where there are several.
        """
        check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
        recognizer = find_recognizer(model)
        results = OrderedDict()
        for index, name in enumerate(cfg.DATASETS.TEST):
            single = cfg.clone()
            single.defrost()
            single.DATASETS.TEST = (name,)
            single.DATASETS.PROPOSAL_FILES_TEST = cfg.DATASETS.PROPOSAL_FILES_TEST[index : index + 1]
            with recognizer.using_vocabulary(dataset_vocabulary(cfg, [name])):
                results[name] = super().test(single, model, evaluators[index : index + 1] if evaluators else None)
        return next(iter(results.values())) if len(results) == 1 else results
