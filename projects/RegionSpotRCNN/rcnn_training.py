"""Training and evaluation of a detector with RegionSpot's head, behind train_net.py."""

import contextlib
from argparse import Namespace
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    inference_on_dataset,
    print_csv_format,
    verify_results,
)
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn
from torch.utils.data import DataLoader

from regionspot import RegionSpotROIHeads, engine
from regionspot.checkpoint.checkpointer import SafeDetectionCheckpointer
from regionspot.checkpoint.loading import find_recognizer, seeded_weights
from regionspot.config import load_config
from regionspot.data.build import build_mapped_loader, check_registered, dataset_vocabulary
from regionspot.data.samplers import build_training_stream
from regionspot.engine import TrainingPlan, launch, set_up_run
from regionspot.engine.evaluate import load_host
from regionspot.engine.optimizer import build_lr_scheduler, build_optimizer
from regionspot.engine.run_setup import log_size
from regionspot.evaluation import DetectionLVISEvaluator
from regionspot.utils.run_lock import run_lock


class Trainer(engine.Trainer):
    """RegionSpot's trainer for any ``GeneralizedRCNN``, with LVIS's and COCO's evaluators."""

    def __init__(self, cfg: CfgNode) -> None:
        """Build what ``cfg`` names; weights are loaded by ``resume_or_load``."""
        self.cfg = cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        check_registered(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")  # the head needs their names when it is built
        plan, model = TrainingPlan.from_config(cfg), build_model(cfg)
        log_size(model)
        optimizer = build_optimizer(cfg, model)
        super().__init__(model, build_train_loader(cfg), optimizer, build_lr_scheduler(cfg, optimizer), plan)

    def build_checkpointer(self, model: nn.Module, **checkpointables: Any) -> SafeDetectionCheckpointer:
        return SafeDetectionCheckpointer(model, self.cfg.OUTPUT_DIR, **checkpointables)

    def evaluate(self) -> dict[str, Any]:
        return self.test(self.cfg, self.model)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate on each of ``DATASETS.TEST``, RegionSpot's head against that data set's own vocabulary."""
        results: dict[str, Any] = {}
        for name in cfg.DATASETS.TEST:
            with contextlib.ExitStack() as stack:
                if any(isinstance(module, RegionSpotROIHeads) for module in model.modules()):
                    stack.enter_context(find_recognizer(model).using_vocabulary(dataset_vocabulary(cfg, name)))
                loader = build_detection_test_loader(cfg, name)
                results[name] = inference_on_dataset(model, loader, build_evaluator(cfg, name))
            if comm.is_main_process():
                print_csv_format(results[name])
        return next(iter(results.values())) if len(results) == 1 else results


def build_train_loader(cfg: CfgNode) -> DataLoader:
    """Return Detectron2's training images, in batches that resume exactly."""
    records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    return build_mapped_loader(
        records,
        DatasetMapper(cfg, True),
        cfg.SOLVER.IMS_PER_BATCH,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        accumulate=cfg.SOLVER.ACCUMULATE,
        stream=build_training_stream(cfg, [records], 0),
    )


def build_evaluator(cfg: CfgNode, name: str) -> DatasetEvaluator:
    is_lvis = MetadataCatalog.get(name).get("evaluator_type") == "lvis"
    return (DetectionLVISEvaluator if is_lvis else COCOEvaluator)(name, output_dir=f"{cfg.OUTPUT_DIR}/inference")


def main(args: Namespace) -> Any:
    cfg = load_config(args.config_file, args.opts)
    check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
    cfg.freeze()
    with run_lock(cfg.OUTPUT_DIR):  # before anything is written there
        set_up_run(cfg, args)
        return train_or_evaluate(cfg, args)


def train_or_evaluate(cfg: CfgNode, args: Namespace) -> Any:
    """Return the metrics of the last evaluation."""
    if args.eval_only:
        with seeded_weights(cfg.SEED):
            model = build_model(cfg)
        load_host(model, cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, args.resume)
        results = Trainer.test(cfg, model)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(args.resume)
        results = trainer.train()
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def start(args: Namespace) -> None:
    """Start the processes of the command line."""
    launch(main, args, load_config(args.config_file, args.opts).MODEL.DEVICE)
