"""Training that a signal stops (SIGTERM on a preempted machine, Ctrl-C) saves a checkpoint first."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import distributed

from regionspot.checkpoint.checkpointer import SafeDetectionCheckpointer
from regionspot.utils.command_line import Interrupted, install_handlers, restore_handlers

logger = logging.getLogger(__name__)

# Seconds within which signals count as one: a launcher and a terminal may both send it.
_TOGETHER = 2.0


class StopOnSignal(HookBase):
    """Ends training after the step in which a signal came, in all processes; a second signal ends it immediately.

    The resumed run ends with the same weights, bit for bit. A signal interrupts an evaluation, which may take hours;
    the resumed run starts with it.

    Attributes:
        evaluation_due: the checkpoint precedes the evaluation of its iteration.
    """

    def __init__(self, checkpointer: SafeDetectionCheckpointer, device: torch.device) -> None:
        """Save by ``checkpointer``; processes agree by a tensor on ``device``."""
        self.checkpointer, self.device = checkpointer, device
        self.evaluation_due = False
        self._received: tuple[int, float] | None = None  # the signal, and when it came
        self._raises = False
        self._previous: dict[int, Any] = {}

    def before_train(self) -> None:
        self._received = None
        self._previous = install_handlers(self._receive)

    def after_train(self) -> None:
        restore_handlers(self._previous)

    def after_step(self) -> None:
        if self.trainer.iter + 1 < self.trainer.max_iter and self._agree():
            self._stop()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Stop if a signal was received before, and inside the block as soon as one is."""
        self.evaluation_due = True
        if self._agree():
            self._stop()
        self._raises = True
        try:
            yield
        except Interrupted:
            self._stop()
        finally:
            self._raises = False
        self.evaluation_due = False

    def state_dict(self) -> dict[str, Any]:
        return {"evaluation_due": self.evaluation_due}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.evaluation_due = state["evaluation_due"]

    def _receive(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received = number, now
            # the signal may have interrupted the logger, which holds a lock
            os.write(2, f"{signal.Signals(number).name}: stopping; a second signal stops without saving\n".encode())
            if self._raises:
                raise Interrupted
        elif now - self._received[1] > _TOGETHER:
            restore_handlers(self._previous)
            signal.raise_signal(number)

    def _agree(self) -> bool:
        """Return whether any process has received a signal; all must stop in the same step, or collectives hang."""
        if comm.get_world_size() == 1:
            return self._received is not None
        flag = torch.tensor(float(self._received is not None), device=self.device)
        distributed.all_reduce(flag, distributed.ReduceOp.MAX)
        return bool(flag.item())

    def _stop(self) -> None:
        restore_handlers(self._previous)
        self.trainer.loop.check_last_step()  # all processes are here; a step that failed must not be taken up again
        iteration, end = self.trainer.iter, self.trainer.max_iter
        name = "model_final"  # saved before the last evaluation
        if iteration + 1 < end:
            name = f"model_{iteration:07d}"
            self.checkpointer.save(name, iteration=iteration)
        text = f"stopped after iteration {min(iteration + 1, end)} of {end}: {name}.pth is kept"
        logger.info("%s; the same command with --resume continues", text)
        raise Interrupted(text, self._received[0] if self._received else signal.SIGTERM)
