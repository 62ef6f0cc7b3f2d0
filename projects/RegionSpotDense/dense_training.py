"""Training and evaluation of a detector whose boxes RegionSpot names, behind train_net.py."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig, instantiate
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig, ListConfig
from torch import nn

from regionspot import RegionRecognizer
from regionspot.checkpoint.checkpointer import SafeDetectionCheckpointer
from regionspot.checkpoint.loading import find_recognizer, seeded_weights
from regionspot.data.build import check_registered
from regionspot.engine import Trainer, TrainingPlan, launch, set_up_run
from regionspot.engine.evaluate import load_host
from regionspot.engine.optimizer import clip_before_steps
from regionspot.engine.train_loop import autocast_precision
from regionspot.utils.run_lock import run_lock
from regionspot.vocabulary import dataset_names


def class_names(recognizer: RegionRecognizer, loader: DictConfig) -> list[str]:
    """Return the class names of a loader's first data set, or of the configured vocabulary if there is one."""
    if "default" in recognizer.classifier.vocabularies:
        return recognizer.classifier.get_names("default")
    names = loader.dataset.names
    return dataset_names(names[0] if isinstance(names, ListConfig) else names)


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """Return the metrics of the config's evaluator, {} in all processes but the first."""
    recognizer = find_recognizer(model)
    with recognizer.using_vocabulary(class_names(recognizer, cfg.dataloader.test)):
        loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
        results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


class DenseTrainer(Trainer):
    """RegionSpot's trainer for what a lazy config names."""

    def __init__(self, cfg: DictConfig, model: nn.Module) -> None:
        """Prepare to train ``model``; weights are loaded by ``resume_or_load``."""
        self.cfg = cfg
        recognizer = find_recognizer(model)
        recognizer.set_vocabulary(class_names(recognizer, cfg.dataloader.train), "training")
        cfg.optimizer.params.model = model
        optimizer = instantiate(cfg.optimizer)
        clip_before_steps(optimizer, model, cfg.train.clip_gradients)
        plan = TrainingPlan(
            output_dir=cfg.train.output_dir,
            max_iter=cfg.train.max_iter,
            seed=max(cfg.train.seed, 0),
            weights=cfg.train.init_checkpoint,
            accumulate=cfg.train.accumulate,
            precision=autocast_precision(cfg.train.amp.enabled, cfg.train.amp.dtype, cfg.train.device),
            average_decay=cfg.train.ema.decay if cfg.train.ema.enabled else None,
            checkpoint_period=cfg.train.checkpointer.period,
            checkpoints_kept=cfg.train.checkpointer.max_to_keep,
            eval_period=cfg.train.eval_period,
            log_period=cfg.train.log_period,
        )
        loader, multiplier = instantiate(cfg.dataloader.train), instantiate(cfg.lr_multiplier)
        super().__init__(model, loader, optimizer, multiplier, plan, **cfg.train.ddp)

    def build_checkpointer(self, model: nn.Module, **checkpointables: Any) -> SafeDetectionCheckpointer:
        return SafeDetectionCheckpointer(model, self.cfg.train.output_dir, **checkpointables)

    def evaluate(self) -> dict[str, Any]:
        return evaluate(self.cfg, self.model)


def load(args: Namespace) -> DictConfig:
    """Return the config of the command line: Python code, which nobody should run by naming a YAML file."""
    if not args.config_file.endswith(".py") or not Path(args.config_file).is_file():
        raise FileNotFoundError(f"--config-file {args.config_file!r}: expected a lazy config, a .py file")
    return LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)


def main(args: Namespace) -> Any:
    cfg = load(args)
    with run_lock(cfg.train.output_dir):  # before anything is written there
        set_up_run(cfg, args)
        return train_or_evaluate(cfg, args)


def train_or_evaluate(cfg: DictConfig, args: Namespace) -> Any:
    """Return the metrics, or the model that was trained."""
    for part in ("test",) if args.eval_only else ("train", "test"):
        names = cfg.dataloader[part].dataset.names
        check_registered(names if isinstance(names, ListConfig) else [names], f"dataloader.{part}.dataset.names")
    with seeded_weights(cfg.train.seed):
        model = instantiate(cfg.model).to(cfg.train.device)
    if args.eval_only:
        load_host(model, cfg.train.init_checkpoint, cfg.train.output_dir, args.resume)
        return evaluate(cfg, model)
    trainer = DenseTrainer(cfg, model)
    trainer.resume_or_load(args.resume)
    trainer.train()
    return model


def start(args: Namespace) -> None:
    """Start the processes of the command line."""
    launch(main, args, load(args).train.device)
