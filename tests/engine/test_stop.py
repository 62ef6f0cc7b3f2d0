"""Training stopped by a signal: what it saves, and that the resumed run equals an uninterrupted one."""

import os
import signal
import time
from argparse import Namespace
from functools import partial

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from regionspot.engine import RegionSpotTrainer, launch
from regionspot.utils.command_line import Interrupted

from .test_trainer import EXACT, assert_same, config, saved, scenes, train  # noqa: F401

OVERRIDES = (*EXACT, "SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 100)


class SendSignal(HookBase):
    def __init__(self, iteration, signum):
        self.iteration, self.signum = iteration, signum

    def before_step(self):
        if self.trainer.iter == self.iteration:
            signal.raise_signal(self.signum)


def train_until_signal(directory, output, iteration, signum=signal.SIGTERM, overrides=OVERRIDES):
    cfg = config(directory, output, *overrides)
    output.mkdir(exist_ok=True)
    torch.manual_seed(cfg.SEED)
    trainer = RegionSpotTrainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.register_hooks([SendSignal(iteration, signum)])
    with pytest.raises(Interrupted) as stopped:
        trainer.train()
    assert stopped.value.number == signum
    return str(stopped.value)


def test_stopped_run_resumes_exactly(scenes, tmp_path):  # noqa: F811
    train(scenes, tmp_path / "whole", *OVERRIDES)
    handlers = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    text = train_until_signal(scenes, tmp_path / "run", 4)
    assert text == "stopped after iteration 5 of 12: model_0000004.pth is kept"
    assert saved(tmp_path / "run", (tmp_path / "run" / "last_checkpoint").read_text())["iteration"] == 4
    assert "model_0000008.pth" in train_until_signal(scenes, tmp_path / "run", 8, signal.SIGINT)
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert train(scenes, tmp_path / "run", *OVERRIDES, resume=True).start_iter == 9
    assert_same(saved(tmp_path / "run"), saved(tmp_path / "whole"))


def test_second_signal_stops_at_once(scenes, tmp_path, monkeypatch):  # noqa: F811
    class Twice(SendSignal):
        def before_step(self):
            if self.trainer.iter == 3:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)  # at the same moment, as a launcher does: counts as one
                monkeypatch.setattr("regionspot.engine.stop._TOGETHER", 0.0)
                time.sleep(0.01)
                signal.raise_signal(signal.SIGINT)

    trainer = RegionSpotTrainer(config(scenes, tmp_path, *OVERRIDES))
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([Twice(0, 0)])
    with pytest.raises(KeyboardInterrupt) as stopped:
        trainer.train()
    assert not isinstance(stopped.value, Interrupted) and not list(tmp_path.glob("*.pth"))


def test_signal_in_last_evaluation_keeps_final_model(scenes, tmp_path, monkeypatch):  # noqa: F811
    overrides = (*OVERRIDES, "DATASETS.TEST", ("test_trainer",))
    monkeypatch.setattr(RegionSpotTrainer, "test", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted, match="after iteration 12 of 12: model_final.pth is kept"):
        train(scenes, tmp_path, *overrides)
    assert saved(tmp_path)["iteration"] == 11


def test_stopped_evaluation_runs_first_on_resume(scenes, tmp_path, monkeypatch):  # noqa: F811
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


class SendToParent(HookBase):
    """The last process asks the launcher to stop, which forwards the signal to all."""

    def before_step(self):
        if self.trainer.iter == 4 and comm.get_rank() == 1:
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(0.1)


def train_in_process(args):
    torch.set_num_threads(1)
    cfg = config(args.scenes, args.output, *OVERRIDES)
    trainer = RegionSpotTrainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.register_hooks([SendToParent()] if args.stops else [])
    trainer.train()


def test_two_stopped_processes_resume_exactly(scenes, tmp_path, monkeypatch):  # noqa: F811
    torch.set_num_threads(1)
    forked = partial(torch.multiprocessing.start_processes, start_method="fork")  # saves the imports
    monkeypatch.setattr(torch.multiprocessing, "start_processes", forked)

    def train_two(output, stops=False):
        output.mkdir(exist_ok=True)
        args = Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto", scenes=scenes)
        launch(train_in_process, Namespace(**vars(args), output=output, stops=stops), "cpu")

    train_two(tmp_path / "whole")
    with pytest.raises(Interrupted) as stopped:
        train_two(tmp_path / "run", stops=True)
    assert stopped.value.number == signal.SIGTERM
    [checkpoint] = (tmp_path / "run").glob("model_*.pth")
    assert (tmp_path / "run" / "last_checkpoint").read_text() == checkpoint.name != "model_final.pth"
    assert 4 <= saved(tmp_path / "run", checkpoint.name)["iteration"] == int(checkpoint.stem[6:]) < 11
    train_two(tmp_path / "run")
    assert_same(saved(tmp_path / "run"), saved(tmp_path / "whole"))
