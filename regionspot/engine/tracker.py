"""Experiment trackers, if they are installed: Weights & Biases and MLflow get the numbers that the log gets."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from detectron2.engine import HookBase

from regionspot.utils.files import short_hash

TRACKERS = ("wandb", "mlflow")


def check_tracker(name: str) -> str:
    """Return ``TRACKER.NAME``; refuse unknown trackers and those that are not installed."""
    if name and name not in TRACKERS:
        raise ValueError(f"TRACKER.NAME: expected {', '.join(TRACKERS)} or nothing, got {name!r}")
    if name and find_spec(name) is None:
        raise ValueError(f"TRACKER.NAME {name}: the package {name} is not installed; pip install {name}")
    return name


class ExperimentTracker(HookBase):
    """Sends the training's numbers to a tracker, at the log's period; a resumed run continues its record there."""

    def __init__(self, name: str, project: str, output_dir: str, config: str, period: int) -> None:
        """
        Args:
            name: "wandb" or "mlflow", which must be installed; each is set up by its own environment variables.
            project: of Weights & Biases, or the experiment of MLflow.
            output_dir: of the run; its last part is the run's name.
            config: the whole config as YAML.
            period: iterations between numbers.
        """
        self.name, self.project, self.output_dir = name, project, Path(output_dir)
        self.config, self.period = config, period
        self._logged = -1  # the last iteration whose numbers were sent

    def before_train(self) -> None:
        self._module: Any = import_module(self.name)
        self._logged = self.trainer.start_iter - 1
        run_name = self.output_dir.absolute().name
        if self.name == "wandb":
            self._run = self._module.init(
                project=self.project,
                name=run_name,
                id=short_hash(str(self.output_dir.absolute())),
                resume="allow",
                dir=str(self.output_dir),
                config=yaml.safe_load(self.config),
            )
        else:
            self._module.set_experiment(self.project)
            file = self.output_dir / "mlflow_run.txt"
            is_resumed = self.trainer.start_iter > 0 and file.is_file()
            self._run = self._module.start_run(file.read_text() if is_resumed else None, run_name=run_name)
            file.write_text(self._run.info.run_id)
            self._module.log_text(self.config, "config.yaml")

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0:
            self._send()

    def after_train(self) -> None:
        self._send()  # the last evaluation's
        if self.name == "wandb":
            self._run.finish()
        else:
            self._module.end_run()

    def _send(self) -> None:
        latest = self.trainer.storage.latest_with_smoothing_hint(self.period)
        values = {key: float(value) for key, (value, iteration) in latest.items() if iteration > self._logged}
        self._logged = self.trainer.iter
        if not values:
            return
        if self.name == "wandb":
            self._run.log(values, step=self.trainer.iter)
        else:
            allowed = {re.sub(r"[^\w\-./ ]", "_", key): value for key, value in values.items()}
            self._module.log_metrics(allowed, step=self.trainer.iter)
