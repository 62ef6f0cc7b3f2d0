"""LVIS evaluation on any NumPy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lvis.eval
import numpy as np
from detectron2.evaluation import LVISEvaluator as Detectron2LVISEvaluator


class _NumPyWithFloat:
    """NumPy as the lvis package knows it: with ``np.float``, which NumPy 1.24 removed."""

    float = float

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@contextmanager
def lvis_on_current_numpy() -> Iterator[None]:
    """Let ``lvis.eval``, and nothing else, see ``np.float``."""
    original = lvis.eval.np
    lvis.eval.np = _NumPyWithFloat()
    try:
        yield
    finally:
        lvis.eval.np = original


class LVISEvaluator(Detectron2LVISEvaluator):
    """Detectron2's LVIS evaluator, free of the lvis package's trouble with current NumPy."""

    def evaluate(self) -> dict | None:
        with lvis_on_current_numpy():
            return super().evaluate()
