"""Training and evaluation runs."""

from regionspot.engine.launch import fork_workers, launch
from regionspot.engine.run_setup import set_up_run
from regionspot.engine.trainer import RegionSpotTrainer

__all__ = ["RegionSpotTrainer", "fork_workers", "launch", "set_up_run"]
