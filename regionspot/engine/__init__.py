"""Training and evaluation runs."""

from regionspot.engine.trainer import RegionSpotTrainer

__all__ = ["RegionSpotTrainer"]
