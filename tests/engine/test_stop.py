"""Training that a signal stops: what it saves, and that the run that goes on equals one that was never stopped."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from detectron2.engine import HookBase

from regionspot.engine import RegionSpotTrainer
from regionspot.utils.signals import Interrupted

from ..helpers import ROOT, TINY
from .test_trainer import EXACT, assert_same, config, saved, scenes, train  # noqa: F401

OVERRIDES = (*EXACT, "SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 100)


class SendSignal(HookBase):
    def __init__(self, iteration, number):
        self.iteration, self.number = iteration, number

    def before_step(self):
        if self.trainer.iter == self.iteration:
            signal.raise_signal(self.number)


def train_until_signal(folder, output, iteration, number=signal.SIGTERM, overrides=OVERRIDES):
    cfg = config(folder, output, *overrides)
    output.mkdir(exist_ok=True)
    torch.manual_seed(cfg.SEED)
    trainer = RegionSpotTrainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.register_hooks([SendSignal(iteration, number)])
    with pytest.raises(Interrupted) as stopped:
        trainer.train()
    assert stopped.value.number == number
    return str(stopped.value)


def test_stopped_training_goes_on_to_the_bit(scenes, tmp_path):  # noqa: F811
    train(scenes, tmp_path / "whole", *OVERRIDES)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    text = train_until_signal(scenes, tmp_path / "run", 4)
    assert text == "stopped after iteration 5 of 12: model_0000004.pth is kept"
    assert saved(tmp_path / "run", (tmp_path / "run" / "last_checkpoint").read_text())["iteration"] == 4
    assert "model_0000008.pth" in train_until_signal(scenes, tmp_path / "run", 8, signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert train(scenes, tmp_path / "run", *OVERRIDES, resume=True).start_iter == 9
    assert_same(saved(tmp_path / "run"), saved(tmp_path / "whole"))


def test_second_signal_stops_at_once(scenes, tmp_path, monkeypatch):  # noqa: F811
    class Twice(SendSignal):
        def before_step(self):
            if self.trainer.iter == 3:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)  # at the same moment, as a launcher does: still one
                monkeypatch.setattr("regionspot.engine.stop._TOGETHER", 0.0)
                time.sleep(0.01)
                signal.raise_signal(signal.SIGINT)

    trainer = RegionSpotTrainer(config(scenes, tmp_path, *OVERRIDES))
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([Twice(0, 0)])
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer.train()
    assert not isinstance(stopped.value, Interrupted) and not list(tmp_path.glob("*.pth"))


def test_signal_in_the_last_evaluation_keeps_the_final_model(scenes, tmp_path, monkeypatch):  # noqa: F811
    overrides = (*OVERRIDES, "DATASETS.TEST", ("test_trainer",))
    monkeypatch.setattr(RegionSpotTrainer, "test", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="after iteration 12 of 12: model_final.pth is kept"):
        train(scenes, tmp_path, *overrides)
    assert saved(tmp_path)["iteration"] == 11


def test_stopped_evaluation_is_the_first_of_the_run_that_goes_on(scenes, tmp_path, monkeypatch):  # noqa: F811
    overrides = (*OVERRIDES, "DATASETS.TEST", ("test_trainer",), "TEST.EVAL_PERIOD", 4)
    evaluated, stop = [], True

    def evaluate(_, cfg, model):
        if len(evaluated) == 1 and stop:
            signal.raise_signal(signal.SIGTERM)
        evaluated.append(sum(float(p.detach().sum()) for p in model.parameters() if p.requires_grad))
        return {"bbox": {"AP": float(len(evaluated) == 2)}}

    monkeypatch.setattr(RegionSpotTrainer, "test", evaluate)
    with pytest.raises(Interrupted, match="after iteration 8 of 12"):
        train(scenes, tmp_path / "run", *overrides)
    stop = False
    train(scenes, tmp_path / "run", *overrides, resume=True)
    stopped, evaluated[:] = list(evaluated), []
    train(scenes, tmp_path / "whole", *overrides)
    assert stopped == evaluated and len(evaluated) == 3
    assert_same(saved(tmp_path / "run"), saved(tmp_path / "whole"))
    assert saved(tmp_path / "run")["trainer"]["hooks"]["BestCheckpointer"] == {"best_metric": 1.0, "best_iter": 7}
    assert_same(saved(tmp_path / "run", "model_best.pth"), saved(tmp_path / "whole", "model_best.pth"))


def command(scenes, output, *options):  # noqa: F811
    data = [f"('{scenes}/data/annotations.json:{scenes}/data/images',)", "DATASETS.TEST", "()"]
    frozen = ["MODEL.REGIONSPOT.SAM.WEIGHTS", scenes / "sam.pth", "MODEL.REGIONSPOT.CLIP.WEIGHTS", scenes / "clip.pth"]
    solver = ["SOLVER.MAX_ITER", 400, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.STEPS", "()", "OUTPUT_DIR", output]
    options = [ROOT / "tools/train_net.py", "--config-file", TINY, "--dist-url", "auto", *options]
    return [sys.executable, *map(str, [*options, "DATASETS.TRAIN", *data, *frozen, *solver])]


def test_two_processes_stop_together_where_the_first_is_told_to(scenes, tmp_path):  # noqa: F811
    log = tmp_path / "stdout"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command(scenes, tmp_path / "out", "--num-gpus", 2), stdout=file, stderr=file, env=environment, cwd=tmp_path
        )
        deadline = time.monotonic() + 300
        while "iter: " not in log.read_text() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143, log.read_text()
    assert "iter: " in log.read_text(), log.read_text()[-3000:]
    [checkpoint] = (tmp_path / "out").glob("model_*.pth")
    assert (tmp_path / "out" / "last_checkpoint").read_text() == checkpoint.name != "model_final.pth"
    assert saved(tmp_path / "out", checkpoint.name)["iteration"] == int(checkpoint.stem[6:])
