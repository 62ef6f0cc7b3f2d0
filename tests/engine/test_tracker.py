"""Experiment trackers: refused where they are not installed, and the real ones, offline, where they are."""

import pytest

from regionspot.engine import tracker
from regionspot.engine.tracker import check_tracker

from .test_region_logs import STEADY, train
from .test_trainer import scenes  # noqa: F401


def test_unknown_or_absent_trackers_are_refused(monkeypatch):
    assert check_tracker("") == ""
    with pytest.raises(ValueError, match="TRACKER.NAME: expected wandb, mlflow or nothing, got 'tensorboard'"):
        check_tracker("tensorboard")
    monkeypatch.setattr(tracker, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="TRACKER.NAME wandb: the package wandb is not installed; pip install wandb"):
        check_tracker("wandb")


def test_tracker_is_checked_before_anything_is_built(scenes, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="TRACKER.NAME: expected"):
        train(scenes, tmp_path, "TRACKER.NAME", "none")


OVERRIDES = (*STEADY, "SOLVER.MAX_ITER", 45, "DATASETS.TEST", ("test_trainer",))


def test_mlflow_gets_the_numbers(scenes, tmp_path, monkeypatch):  # noqa: F811
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    train(scenes, tmp_path / "run", *OVERRIDES, "TRACKER.NAME", "mlflow").train()
    client = mlflow.MlflowClient()
    run = client.get_run((tmp_path / "run" / "mlflow_run.txt").read_text())
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "total_loss")][:2] == [19, 39]
    assert {"region_top1", "validation/loss", "bbox/AP"} <= set(run.data.metrics)


def test_wandb_gets_the_numbers(scenes, tmp_path, monkeypatch):  # noqa: F811
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer = train(scenes, tmp_path / "run", *OVERRIDES, "TRACKER.NAME", "wandb")
    trainer.train()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert wandb.run is None  # finished
