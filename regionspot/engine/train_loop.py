"""One training step: mixed precision, gradient accumulation, and losses that are not finite."""

import contextlib
import logging
import random
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from regionspot.data.build import training_stream
from regionspot.data.training_set import TrainingSet

logger = logging.getLogger(__name__)

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
MAX_SKIPPED_STEPS = 100  # in a row: each halves the loss scale, and no scale is that far off


@dataclass
class _TakenStep:
    """A step whose numbers have not been looked at.

    Attributes:
        iteration: its number.
        ids: of its images.
        names: of the losses.
        values: float, on their way to the CPU: the losses; 1 if those of all processes are finite; 1 if the step was
            skipped.
        copied: when they have arrived; None if they have.
        data_time: seconds spent waiting for the loader.
    """

    iteration: int
    ids: list[str]
    names: list[str]
    values: torch.Tensor
    copied: torch.cuda.Event | None
    data_time: float


class TrainLoop(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` with mixed precision on CUDA and CPU, gradient accumulation and exact resuming.

    Random numbers of a step (dropout) depend on seed, process and iteration only, those of the data on seed and
    position (``TrainingStream``): a resumed run continues as if it had never stopped.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: DataLoader,
        optimizer: torch.optim.Optimizer,
        seed: int,
        accumulate: int = 1,
        precision: torch.dtype | None = None,
    ) -> None:
        """The arguments are those of ``Trainer`` and ``TrainingPlan``."""
        super().__init__(model, data_loader, optimizer)
        self.seed, self.accumulate, self.precision = seed, accumulate, precision
        self.device = next(model.parameters()).device
        self.unreadable: set[str] = set()  # one reason per image that was replaced (DATALOADER.SKIP_UNREADABLE)
        # only float16 has too few exponent bits for gradients; with other precisions the scaler does nothing
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == torch.float16)
        self.skipped = self.skipped_in_row = 0  # steps whose gradients overflowed in float16
        is_fused = getattr(optimizer, "_step_supports_amp_scaling", False)  # PyTorch's sign: it heeds ``found_inf``
        self.checks_later = is_fused and not self.scaler.is_enabled() and self.device.type != "cpu"
        self._unchecked: _TakenStep | None = None

    def resume_from(self, iteration: int) -> None:
        """Move the data to the position of ``iteration``; called before the first step."""
        if not isinstance(getattr(self.data_loader, "dataset", None), TrainingSet):
            if iteration:
                logger.warning("the data start over: this loader cannot be resumed where it was")
            return
        stream, sampler = training_stream(self.data_loader), self.data_loader.batch_sampler
        stream.seed = self.data_loader.dataset.seed = self.seed
        stream.start = iteration * self.accumulate * sampler.batch_size

    def run_step(self) -> None:
        assert self.model.training, "the model was left in eval mode"
        seed_step(self.seed, self.iter)
        start, data_time, num_images = time.perf_counter(), 0.0, 0
        self.optimizer.zero_grad()
        total: dict[str, torch.Tensor] = {}
        self._ids: list[str] = []
        for index in range(self.accumulate):
            before = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - before
            num_images += len(batch)
            self.unreadable.update(reason for inputs in batch for reason in inputs.get("unreadable", ()))
            self._ids += [str(inputs.get("image_id", inputs.get("file_name"))) for inputs in batch]
            for name, loss in self._backward(batch, is_last=index == self.accumulate - 1).items():
                total[name] = total.get(name, 0) + loss
        self.after_backward()
        if self.checks_later:
            self._step_unchecked(total, data_time)
        else:
            self._step(total, data_time)
        seconds = time.perf_counter() - start
        storage = get_event_storage()
        storage.put_scalar("images_per_second", num_images * comm.get_world_size() / seconds)
        storage.put_scalar("data_share", data_time / seconds)

    def _backward(self, batch: list[dict[str, Any]], is_last: bool) -> dict[str, torch.Tensor]:
        """Accumulate the gradients of one batch of the step; return its share of the losses."""
        with contextlib.ExitStack() as stack:
            # processes exchange gradients once a step, with its last batch
            if isinstance(self.model, DistributedDataParallel) and not is_last:
                stack.enter_context(self.model.no_sync())
            with torch.autocast(self.device.type, self.precision, enabled=self.precision is not None):
                losses = {name: loss / self.accumulate for name, loss in self.model(batch).items()}
            self.scaler.scale(sum(losses.values())).backward()
        return {name: value.detach() for name, value in losses.items()}

    def _step_unchecked(self, losses: dict[str, torch.Tensor], data_time: float) -> None:
        """Update the weights, or leave them where a number is not finite: the GPU decides, no one waits for it.

        Its numbers are looked at when the next step has been started.
        """
        values, all_finite = self._are_finite(losses)
        self.optimizer.found_inf = 1 - all_finite  # type: ignore[attr-defined]
        self.optimizer.step()
        found_inf = self.optimizer.__dict__.pop("found_inf")  # with the gradient's norm, if that is clipped
        values = torch.cat([values, torch.stack([all_finite, found_inf])]).to("cpu", non_blocking=True)
        copied = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
        self.check_last_step()
        self._unchecked = _TakenStep(self.iter, self._ids, list(losses), values, copied, data_time)

    def check_last_step(self) -> None:
        """Write the metrics of the last step, if that is still to be done; its error is raised here."""
        taken, self._unchecked = self._unchecked, None
        if taken is None:
            return
        if taken.copied is not None:
            taken.copied.synchronize()
        *values, all_finite, is_skipped = taken.values
        losses = dict(zip(taken.names, values))
        if is_skipped:
            what = "the gradient's norm is not finite" if all_finite else str({k: x.item() for k, x in losses.items()})
            is_here = bool(all_finite) or not all(map(torch.isfinite, values))
            raise self._not_a_number(what, is_here, taken.iteration, taken.ids)
        self._write_metrics(losses, taken.data_time, iter=taken.iteration)

    @staticmethod
    def _are_finite(losses: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses in one tensor, and 1 if those of all processes are finite, else 0; both float."""
        values = torch.stack([loss.float() for loss in losses.values()])
        all_finite = torch.isfinite(values).all().float()
        # All processes must decide alike, or their weights part ways: gradients are shared already, losses are not.
        if comm.get_world_size() > 1:
            distributed.all_reduce(all_finite, distributed.ReduceOp.MIN)
        return values, all_finite

    def _step(self, losses: dict[str, torch.Tensor], data_time: float) -> None:
        """Update the weights, or skip the step where float16 overflowed; in other precisions the run ends.

        In float16 a loss or gradient that is not finite means that the loss scale is too large: it is lowered.
        """
        values, all_finite = self._are_finite(losses)
        scale = self.scaler.get_scale()
        if all_finite.item():
            self._write_metrics(losses, data_time)
            self.scaler.unscale_(self.optimizer)  # a fused optimizer would do so itself, after gradients are clipped
            try:
                self.scaler.step(self.optimizer)  # skips the update if a gradient is not finite
            except FloatingPointError as error:
                raise self._not_a_number(str(error)) from error
            self.scaler.update()
        elif self.scaler.is_enabled():
            self.scaler.update(scale * self.scaler.get_backoff_factor())
        else:
            what = str({name: x.item() for name, x in losses.items()})
            raise self._not_a_number(what, is_here=not torch.isfinite(values).all())
        if self.scaler.is_enabled():
            self._count_skipped(is_skipped=self.scaler.get_scale() < scale)

    def _count_skipped(self, is_skipped: bool) -> None:
        self.skipped += is_skipped
        self.skipped_in_row = self.skipped_in_row + 1 if is_skipped else 0
        get_event_storage().put_scalar("skipped_steps", self.skipped)
        if self.skipped_in_row >= MAX_SKIPPED_STEPS:
            raise self._not_a_number(f"the gradients of {self.skipped_in_row} steps in a row, in float16")
        if is_skipped:
            logger.info(
                "iteration %d: float16 overflowed; the step is skipped (%d in all) and the loss scale lowered to %g",
                self.iter,
                self.skipped,
                self.scaler.get_scale(),
            )

    def _not_a_number(
        self, what: str, is_here: bool = True, iteration: int | None = None, ids: list[str] | None = None
    ) -> FloatingPointError:
        """Return the error that all processes raise, with the images of those processes that have the problem.

        ``iteration`` and ``ids`` of the images are by default those of the step that is taken.
        """
        iteration, ids = self.iter if iteration is None else iteration, ids or self._ids
        reports = [report for report in comm.all_gather((what, ids) if is_here else None) if report is not None]
        images = ", ".join(image for _, ids in reports for image in ids)
        return FloatingPointError(
            f"not a number in iteration {iteration}: {'; '.join(dict(reports))}; images of the batch: {images}. "
            "Look at these images' boxes and stored tokens, or lower SOLVER.BASE_LR"
        )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seed": self.seed, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.seed = state_dict.get("seed", self.seed)
        if state_dict.get("scaler"):
            self.scaler.load_state_dict(state_dict["scaler"])


def seed_step(seed: int, iteration: int) -> None:
    """Seed every generator from the seed, this process's rank and the iteration."""
    state = np.random.SeedSequence([seed, comm.get_rank(), iteration]).generate_state(3)
    torch.manual_seed(int(state[0]))
    np.random.seed(int(state[1]))
    random.seed(int(state[2]))


def autocast_precision(is_enabled: bool, name: str, device: str) -> torch.dtype | None:
    """Return the precision of ``SOLVER.AMP`` (``ENABLED``, ``DTYPE``), None for float32; refuse float16 on a CPU."""
    if name not in PRECISIONS:
        raise ValueError(f"SOLVER.AMP.DTYPE: expected {' or '.join(PRECISIONS)}, got {name!r}")
    if not is_enabled:
        return None
    if name == "fp16" and torch.device(device).type != "cuda":
        raise ValueError("SOLVER.AMP.DTYPE fp16 needs CUDA; on a CPU set bf16, or SOLVER.AMP.ENABLED False")
    return PRECISIONS[name]
