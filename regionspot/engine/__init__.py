"""Training and evaluation runs."""

from regionspot.engine.launch import launch
from regionspot.engine.trainer import RegionSpotTrainer

__all__ = ["RegionSpotTrainer", "launch"]
