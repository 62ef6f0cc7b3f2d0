"""Detectron2's trainer for RegionSpot."""

import contextlib
import logging
import os
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils import comm
from torch import nn

from regionspot.checkpoint.checkpointer import RegionSpotCheckpointer
from regionspot.checkpoint.loading import find_recognizer
from regionspot.data.build import (
    build_test_loader,
    build_train_loader,
    check_registered,
    dataset_vocabulary,
    proposal_source,
)
from regionspot.data.dataset_mapper import RegionSpotDatasetMapper
from regionspot.data.image_check import check_images
from regionspot.engine.evaluate import choose_metric, evaluate_dataset
from regionspot.engine.extract import describe_clip, describe_sam
from regionspot.engine.hooks import (
    AverageState,
    BestCheckpointer,
    FirstSteps,
    Throughput,
    UnreadableImages,
    WeightAverage,
)
from regionspot.engine.optimizer import build_optimizer, fit_schedule, warn_of_jump
from regionspot.engine.run_setup import log_size
from regionspot.engine.stop import StopOnSignal
from regionspot.engine.train_loop import TrainLoop, autocast_precision
from regionspot.modeling import RegionSpot
from regionspot.utils.files import directory_name
from regionspot.utils.run_lock import run_lock

logger = logging.getLogger(__name__)


class RegionSpotTrainer(DefaultTrainer):
    """``DefaultTrainer`` with RegionSpot's loaders, optimizer, checkpoints and vocabularies, on GPUs or CPUs."""

    def __init__(self, cfg: CfgNode) -> None:
        """Build everything that ``cfg`` names; weights are loaded by ``resume_or_load``."""
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        check_architecture(cfg)
        check_registered(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")  # before what is wrong with the test sets
        check_tests(cfg)
        precision = autocast_precision(cfg)
        seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        data_loader = build_train_loader(cfg, seed)
        self.vocabularies = {name: dataset_vocabulary(cfg, name) for name in cfg.DATASETS.TRAIN}
        model = self.build_model(cfg)
        self.recognizer = find_recognizer(model)
        optimizer = self.build_optimizer(cfg, model)
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=[comm.get_local_rank()] if on_gpu else None)
        self._trainer = TrainLoop(model, data_loader, optimizer, seed, cfg.SOLVER.ACCUMULATE, precision)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.average: WeightAverage | None = None
        checkpointables: dict[str, Any] = {"trainer": weakref.proxy(self)}
        if cfg.SOLVER.EMA.ENABLED:
            self.average = WeightAverage(self.recognizer.knowledge_integration, cfg.SOLVER.EMA.DECAY)
            checkpointables["ema"] = AverageState(self.average)
        self.checkpointer = RegionSpotCheckpointer.from_config(cfg, model, cfg.OUTPUT_DIR, **checkpointables)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.stop = StopOnSignal(self.checkpointer, torch.device(cfg.MODEL.DEVICE))
        self.register_hooks(self.build_hooks())

    def train(self) -> Any:
        """Train, and evaluate as the config says.

        Raises:
            ValueError: another run is at work in ``OUTPUT_DIR``, or a token store is of other models.
        """
        with run_lock(self.cfg.OUTPUT_DIR):
            if comm.is_main_process():  # what a run that was killed while it wrote has left
                for leftover in Path(self.cfg.OUTPUT_DIR).glob(".*.pth.*.tmp"):
                    leftover.unlink()
            return self._train()

    def _train(self) -> Any:
        self._check_token_stores()
        for name, names in self.vocabularies.items():
            self.recognizer.set_vocabulary(names, name)
        self._trainer.resume_from(self.start_iter)
        if 0 < self.start_iter < self.max_iter:
            warn_of_jump(self._trainer.optimizer, self.scheduler, self.start_iter)
        return super().train()

    def _check_token_stores(self) -> None:
        """Refuse stores of another SAM or CLIP than the model's, now that its weights are there."""
        stores = [mapper.token_store for mapper in self._trainer.data_loader.dataset.mappers if mapper.token_store]
        if not stores:
            return
        sources = self.recognizer.weight_sources
        expected = {"sam": describe_sam(self.recognizer, sources["sam"])}
        if stores[0].has_feature_maps and self.cfg.MODEL.REGIONSPOT.CLIP.FEATURES != "none":  # as all of them
            expected["clip"] = describe_clip(self.recognizer, sources["clip_model"])
        for store in stores:
            store.check_origin(expected)

    def before_train(self) -> None:
        super().before_train()
        if self.stop.evaluation_due and self.iter < self.max_iter:  # of the iteration before
            self.iter -= 1
            self.storage.iter = self.iter
            for hook in self._hooks:
                if isinstance(hook, (hooks.EvalHook, BestCheckpointer)):
                    hook.after_step()
            self.iter += 1
            self.storage.iter = self.iter

    def after_train(self) -> None:
        """Run the hooks; those that evaluate only after a training that reached its end."""
        self.storage.iter = self.iter
        for hook in self._hooks:
            if self.iter >= self.max_iter or not isinstance(hook, (hooks.EvalHook, BestCheckpointer)):
                hook.after_train()

    def build_hooks(self) -> list[HookBase | None]:
        """Return the hooks: evaluation comes before the checkpoint, so that one that is resumed knows the best."""
        cfg = self.cfg

        def evaluate() -> dict[str, Any]:
            with self.stop.evaluation(), self.average.applied() if self.average else contextlib.nullcontext():
                self._last_eval_results = self.test(cfg, self.model)
            return self._last_eval_results

        result: list[HookBase | None] = [hooks.IterationTimer(), hooks.LRScheduler(), self.average]
        result.append(UnreadableImages(self._trainer.unreadable, Path(cfg.OUTPUT_DIR) / "unreadable_images.txt"))
        result.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, evaluate))
        if comm.is_main_process():
            if cfg.TEST.EVAL_PERIOD > 0 and cfg.TEST.BEST_METRIC and cfg.DATASETS.TEST:
                result.append(BestCheckpointer(cfg.TEST.EVAL_PERIOD, self.checkpointer, best_metric(cfg)))
            kept = cfg.SOLVER.CHECKPOINTS_KEPT if cfg.SOLVER.CHECKPOINTS_KEPT > 0 else None
            result.append(hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, max_to_keep=kept))
            result += [Throughput(), FirstSteps(self._trainer.device)]
            result.append(hooks.PeriodicWriter(self.build_writers(), period=20))
        return [*result, self.stop]

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_model(cfg)
        log_size(model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        return super().build_lr_scheduler(fit_schedule(cfg), optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict[str, Any]:
        """Evaluate on each of ``DATASETS.TEST`` against that data set's own vocabulary.

        Args:
            cfg: the config.
            model: the model.
            evaluators: one for each test set, in place of ours, such as Detectron2's own.

        Returns:
            Metrics; under the data sets' names where there are several, and then with "average" of the ODinW sets.
        """
        check_architecture(cfg)
        check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
        results: dict[str, Any] = OrderedDict()
        for index, name in enumerate(cfg.DATASETS.TEST):
            with find_recognizer(model).using_vocabulary(dataset_vocabulary(cfg, name)):
                if evaluators:
                    results[name] = inference_on_dataset(model, build_test_loader(cfg, name), evaluators[index])
                    continue
                directory = os.path.join(cfg.OUTPUT_DIR, "inference", directory_name(name))
                results[name] = evaluate_dataset(cfg, model, name, directory)
        if len(results) == 1:
            return next(iter(results.values()))
        odinw = [result for name, result in results.items() if name.startswith("odinw_") and result]
        if odinw:  # sets without annotations do not count
            tasks = [task for task in ("bbox", "segm") if all(task in result for result in odinw)]
            average = {task: float(np.nanmean([result[task]["AP"] for result in odinw])) for task in tasks}
            results["odinw_average"] = {task: {"AP": value} for task, value in average.items()}
        return results


def check_architecture(cfg: CfgNode) -> None:
    """Refuse models that are not RegionSpot's own, whose regions this trainer and its evaluation know."""
    name = cfg.MODEL.META_ARCHITECTURE
    if not issubclass(META_ARCH_REGISTRY.get(name), RegionSpot):
        raise ValueError(
            f"MODEL.META_ARCHITECTURE: expected RegionSpot or CropBaseline, got {name!r}; a detector with RegionSpot's "
            "head is trained and evaluated by projects/RegionSpotRCNN/train_net.py"
        )


def check_tests(cfg: CfgNode) -> None:
    """Refuse test sets, their files and vocabularies that an evaluation, hours later, would stumble over."""
    check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
    for name in cfg.DATASETS.TEST:
        proposal_source(cfg, name)
        dataset_vocabulary(cfg, name)
        choose_metric(cfg, name)
        records, mapper = DatasetCatalog.get(name), RegionSpotDatasetMapper(cfg, False)
        check_images(records, np.arange(len(records)), name, mapper, cfg.DATALOADER.SKIP_UNREADABLE)


def best_metric(cfg: CfgNode) -> str:
    """Return the name of ``TEST.BEST_METRIC`` in the log; of several test sets the first's, if it names none."""
    names, metric = cfg.DATASETS.TEST, cfg.TEST.BEST_METRIC
    if len(names) < 2 or metric.startswith((*(f"{name}/" for name in names), "odinw_average/")):
        return metric
    return f"{names[0]}/{metric}"
