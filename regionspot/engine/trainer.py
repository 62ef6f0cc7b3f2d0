"""The trainer that RegionSpot and the detectors that embed it share."""

import contextlib
import logging
import weakref
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase, create_ddp_model, default_writers, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from torch import nn

from regionspot.checkpoint.checkpointer import SafeDetectionCheckpointer
from regionspot.checkpoint.loading import find_recognizer
from regionspot.engine.hooks import BestCheckpointer, Speed, UnreadableImages, WeightAverage
from regionspot.engine.optimizer import warn_of_jump
from regionspot.engine.stop import StopOnSignal
from regionspot.engine.tracker import ExperimentTracker, check_tracker
from regionspot.engine.train_loop import TrainLoop, autocast_precision
from regionspot.modeling import RegionRecognizer
from regionspot.utils.run_lock import run_lock

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingPlan:
    """The settings of a run, beside its model, data, optimizer and schedule."""

    output_dir: str  # for checkpoints and logs; one run at a time
    max_iter: int  # iterations of the whole training
    seed: int  # of data and dropout, the same in all processes
    weights: str = ""  # checkpoint to start from
    accumulate: int = 1  # batches of the loader per step
    precision: torch.dtype | None = None  # of autocast; None is float32
    average_decay: float | None = None  # share of the moving average that a step keeps; None: no average
    checkpoint_period: int = 5000  # iterations between checkpoints
    checkpoints_kept: int = 0  # number of last ones to keep beside model_final and model_best; 0: all
    eval_period: int = 0  # iterations between evaluations; 0: only at the end
    best_metric: str = ""  # metric that selects model_best; "": none
    log_period: int = 20  # iterations between lines of the log
    tracker: str = ""  # "wandb", "mlflow", or "" for none
    tracker_project: str = "regionspot"
    config: str = ""  # as YAML, for the tracker

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "TrainingPlan":
        return cls(
            output_dir=cfg.OUTPUT_DIR,
            max_iter=cfg.SOLVER.MAX_ITER,
            seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
            weights=cfg.MODEL.WEIGHTS,
            accumulate=cfg.SOLVER.ACCUMULATE,
            precision=autocast_precision(cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE, cfg.MODEL.DEVICE),
            average_decay=cfg.SOLVER.EMA.DECAY if cfg.SOLVER.EMA.ENABLED else None,
            checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
            checkpoints_kept=cfg.SOLVER.CHECKPOINTS_KEPT,
            eval_period=cfg.TEST.EVAL_PERIOD,
            best_metric=best_metric(cfg) if cfg.DATASETS.TEST else "",
            tracker=check_tracker(cfg.TRACKER.NAME),
            tracker_project=cfg.TRACKER.PROJECT,
            config=cfg.dump(),
        )


def best_metric(cfg: CfgNode) -> str:
    """Return ``TEST.BEST_METRIC`` as the log names it: by default the first test set's, where there are several."""
    names, metric = cfg.DATASETS.TEST, cfg.TEST.BEST_METRIC
    if not metric or len(names) < 2 or metric.startswith((*(f"{name}/" for name in names), "odinw_average/")):
        return metric
    return f"{names[0]}/{metric}"


class Trainer(TrainerBase):
    """Trains a model on GPUs or CPUs, in one process or several, and resumes exactly where it was stopped.

    Subclasses build the parts, pass them to ``__init__``, and define how to save (``build_checkpointer``) and how to
    evaluate (``evaluate``).
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        plan: TrainingPlan,
        **ddp_options: Any,
    ) -> None:
        """
        Args:
            model: returns a dict of losses for a batch in training mode.
            data_loader: infinite batches; only a loader over a ``TrainingStream`` can be resumed exactly.
            optimizer: over the trained parameters.
            scheduler: PyTorch's, or fvcore's ``ParamScheduler``.
            plan: the settings.
            ddp_options: arguments of ``DistributedDataParallel``.
        """
        super().__init__()
        device = next(model.parameters()).device
        # As in Detectron2, processes do not exchange buffers: means and text embeddings are constants. The model itself
        # moves its inputs to its device; DDP would do so field by field.
        options = {"broadcast_buffers": False, "device_ids": None, "gradient_as_bucket_view": True, **ddp_options}
        self.model, self.plan = create_ddp_model(model, **options), plan
        self.optimizer, self.scheduler = optimizer, scheduler
        # A loop of its own, as in DefaultTrainer, whose checkpoints it shares: the state is under "_trainer".
        self.loop = TrainLoop(self.model, data_loader, optimizer, plan.seed, plan.accumulate, plan.precision)
        self.start_iter, self.max_iter = 0, plan.max_iter
        checkpointables: dict[str, Any] = {"trainer": weakref.proxy(self)}  # the trainer holds the checkpointer
        self.average: WeightAverage | None = None
        if plan.average_decay is not None:
            checkpointables["ema"] = self.average = WeightAverage(_find_averaged_module(model), plan.average_decay)
        self.checkpointer = self.build_checkpointer(model, **checkpointables)
        self.stop = StopOnSignal(self.checkpointer, device)
        self.register_hooks(self.build_hooks())

    @abstractmethod
    def build_checkpointer(self, model: nn.Module, **checkpointables: Any) -> SafeDetectionCheckpointer:
        """Return a checkpointer that saves and loads ``model`` in ``plan.output_dir``."""

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """Return the metrics of the model as it is now."""

    def build_hooks(self) -> list[HookBase]:
        """Return the hooks; evaluation precedes the checkpoint, so that the best metric so far is saved with it."""
        plan, checkpointer = self.plan, self.checkpointer
        result: list[HookBase] = [
            hooks.IterationTimer(),
            hooks.LRScheduler(self.optimizer, self.scheduler),
            UnreadableImages(self.loop.unreadable, Path(plan.output_dir) / "unreadable_images.txt"),
            hooks.EvalHook(plan.eval_period, self._evaluate),
        ]
        if comm.is_main_process():
            if plan.eval_period > 0 and plan.best_metric:
                result.append(BestCheckpointer(plan.eval_period, checkpointer, plan.best_metric))
            max_to_keep = plan.checkpoints_kept if plan.checkpoints_kept > 0 else None
            result += [
                hooks.PeriodicCheckpointer(checkpointer, plan.checkpoint_period, max_to_keep=max_to_keep),
                Speed(plan.log_period, self.loop.device),
                hooks.PeriodicWriter(default_writers(plan.output_dir, self.max_iter), plan.log_period),
            ]
            if plan.tracker:
                options = (plan.tracker, plan.tracker_project, plan.output_dir, plan.config, plan.log_period)
                result.append(ExperimentTracker(*options))
        return [*result, self.stop]  # last: it sees the step as the other hooks have left it

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint in the output directory, if ``resume`` and there is one, else ``plan.weights``."""
        self.checkpointer.resume_or_load(self.plan.weights, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1

    def train(self) -> dict[str, Any]:  # type: ignore[override]
        """Train, and return the metrics of the last evaluation.

        Raises:
            ValueError: another run uses the output directory.
            Interrupted: a signal stopped the training, after a checkpoint.
        """
        self.last_results: dict[str, Any] = {}
        with run_lock(self.plan.output_dir):
            if comm.is_main_process():  # left by a run that was killed while it wrote
                for leftover in Path(self.plan.output_dir).glob(".*.pth.*.tmp"):
                    leftover.unlink()
            self.loop.resume_from(self.start_iter)
            # fvcore's schedules are functions of the iteration alone; PyTorch's also of a checkpoint's learning rate
            if 0 < self.start_iter < self.max_iter and isinstance(self.scheduler, torch.optim.lr_scheduler.LRScheduler):
                warn_of_jump(self.optimizer, self.scheduler, self.start_iter)
            self._save_final_of_killed_run()
            super().train(self.start_iter, self.max_iter)
        return self.last_results

    def _save_final_of_killed_run(self) -> None:
        """Write ``model_final`` for a run that was killed between its last checkpoint and that one."""
        is_over = self.start_iter >= self.max_iter > 0
        if is_over and comm.is_main_process() and not (Path(self.plan.output_dir) / "model_final.pth").is_file():
            self.checkpointer.save("model_final", iteration=self.iter)

    def run_step(self) -> None:
        self.loop.iter = self.iter
        self.loop.run_step()
        # before the hooks that log, evaluate and save
        done, periods = self.iter + 1, (self.plan.log_period, self.plan.eval_period, self.plan.checkpoint_period)
        if done == self.max_iter or any(period > 0 and done % period == 0 for period in periods):
            self.loop.check_last_step()
        if self.average:
            self.average.update()

    def before_train(self) -> None:
        super().before_train()
        if self.average:
            self.average.start()
        if self.stop.evaluation_due and self.iter < self.max_iter:
            # the interrupted evaluation was the previous iteration's, under which its metrics are logged
            self.iter -= 1
            self.storage.iter = self.iter
            for hook in self._hooks:
                if isinstance(hook, (hooks.EvalHook, BestCheckpointer)):
                    hook.after_step()
            self.iter += 1
            self.storage.iter = self.iter

    def after_train(self) -> None:
        """Run the hooks; evaluate only if training has reached its end."""
        self.storage.iter = self.iter
        for hook in self._hooks:
            if self.iter >= self.max_iter or not isinstance(hook, (hooks.EvalHook, BestCheckpointer)):
                hook.after_train()

    def _evaluate(self) -> dict[str, Any]:
        with self.stop.evaluation(), self.average.applied() if self.average else contextlib.nullcontext():
            self.last_results = self.evaluate()
        return self.last_results

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "_trainer": self.loop.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.loop.load_state_dict(state_dict["_trainer"])


def _find_averaged_module(model: nn.Module) -> nn.Module:
    """Return the attention module, which must be all that learns: checkpoints keep the average of nothing else."""
    has_recognizer = any(isinstance(module, RegionRecognizer) for module in model.modules())
    attention = find_recognizer(model).knowledge_integration if has_recognizer else nn.Identity()
    averaged = set(attention.parameters())
    others = [name for name, x in model.named_parameters() if x.requires_grad and x not in averaged]
    if others:
        raise ValueError(
            f"SOLVER.EMA averages RegionSpot's attention module, but {', '.join(others[:2])} and others learn; set "
            "SOLVER.EMA.ENABLED False, or freeze the host (MODEL.REGIONSPOT.HEAD.FREEZE_HOST)"
        )
    return attention
