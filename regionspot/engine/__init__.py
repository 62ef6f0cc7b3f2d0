"""Training and evaluation runs."""

from regionspot.engine.launch import fork_workers, launch
from regionspot.engine.regionspot_trainer import RegionSpotTrainer
from regionspot.engine.run_setup import set_up_run
from regionspot.engine.trainer import Trainer, TrainingPlan

__all__ = ["RegionSpotTrainer", "Trainer", "TrainingPlan", "fork_workers", "launch", "set_up_run"]
