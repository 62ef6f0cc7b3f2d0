"""The moving average of weights, and hooks beside Detectron2's own."""

import copy
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from regionspot.checkpoint.checkpointer import SafeDetectionCheckpointer
from regionspot.utils.memory import peak_memory

logger = logging.getLogger(__name__)


class WeightAverage:
    """Exponential moving average of a module's weights.

    Attributes:
        average: a copy of the module with the averaged weights; a checkpoint holds its state dict.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Average the weights of ``module``; each step keeps the share ``decay`` in [0, 1) of the average."""
        if not 0 <= decay < 1:
            raise ValueError(f"SOLVER.EMA.DECAY: expected a number in [0, 1), got {decay}")
        self.module = module
        self.average = copy.deepcopy(module).eval().requires_grad_(False)
        self._update = get_ema_multi_avg_fn(decay)
        self.was_loaded = False

    def start(self) -> None:
        """Start from the module's weights, which were loaded after ``__init__``, unless a checkpoint had an average."""
        if not self.was_loaded:
            self.average.load_state_dict(self.module.state_dict())

    def update(self) -> None:
        self._update(list(self.average.parameters()), [p.detach() for p in self.module.parameters()], 0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the module the averaged weights inside the block."""
        own = {key: value.clone() for key, value in self.module.state_dict().items()}
        self.module.load_state_dict(self.average.state_dict())
        try:
            yield
        finally:
            self.module.load_state_dict(own)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.average.load_state_dict(state)
        self.was_loaded = True


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's, which also keeps the best metric when training resumes, and never marks its file as the *last*."""

    def __init__(self, eval_period: int, checkpointer: SafeDetectionCheckpointer, val_metric: str) -> None:
        # Detectron2 saves with is_last=True, and a resumed run would start from the best checkpoint.
        super().__init__(eval_period, SimpleNamespace(save=partial(checkpointer.save, is_last=False)), val_metric)

    def state_dict(self) -> dict[str, Any]:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_metric, self.best_iter = state["best_metric"], state["best_iter"]


class UnreadableImages(HookBase):
    """Lists the images that training could not read and replaced by others, and counts them at the end."""

    def __init__(self, reasons: set[str], path: Path) -> None:
        """Append ``reasons``, which the training loop adds to, to the file ``path``, as other processes and runs do."""
        self.reasons, self.path, self._written = reasons, path, set[str]()

    def before_train(self) -> None:
        self._written = self._read()

    def after_step(self) -> None:
        new = {" ".join(reason.split()) for reason in self.reasons} - self._written
        self.reasons.clear()
        if new:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in sorted(new))
            self._written |= new
            logger.warning("replaced by another image: %s", "; ".join(sorted(new)))

    def after_train(self) -> None:
        lines = self._read()
        if lines:
            logger.warning("%d images could not be read and were replaced by others: %s", len(lines), self.path)

    def _read(self) -> set[str]:
        return set(self.path.read_text(encoding="utf-8").splitlines()) if self.path.is_file() else set()


class Speed(HookBase):
    """Logs images per second, and after the first steps of a run memory and remaining time (without evaluations)."""

    def __init__(self, period: int, device: torch.device, first_steps: int = 5) -> None:
        self.period, self.device, self.first_steps = period, device, first_steps

    def after_step(self) -> None:
        done = self.trainer.iter + 1 - self.trainer.start_iter
        if (self.trainer.iter + 1) % self.period == 0:
            latest = self.trainer.storage.histories()
            logger.info(
                "%.1f images/s, %.0f%% of the time waiting for data",
                latest["images_per_second"].median(self.period),
                100 * latest["data_share"].median(self.period),
            )
        if done == 1:  # the first step is not timed: it also starts workers and chooses kernels
            self.start = time.perf_counter()
        if done == self.first_steps:
            seconds, end = (time.perf_counter() - self.start) / (done - 1), self.trainer.max_iter
            left = timedelta(seconds=round(seconds * (end - self.trainer.iter - 1)))
            logger.info(
                "first %d steps: peak memory %.2f GB (%s), %.3f s a step, about %s to iteration %d",
                *(done, peak_memory(self.device), self.device.type, seconds, left, end),
            )
