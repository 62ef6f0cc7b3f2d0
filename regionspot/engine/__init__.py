"""Training and evaluation runs."""

from regionspot.engine.launch import fork_workers, launch
from regionspot.engine.trainer import RegionSpotTrainer

__all__ = ["RegionSpotTrainer", "fork_workers", "launch"]
