"""The learning rate in short and in resumed trainings."""

import logging

import pytest
import torch

from regionspot.engine import RegionSpotTrainer
from regionspot.engine.optimizer import build_lr_scheduler
from regionspot.engine.train_loop import seed_step

from ..helpers import tiny_config
from .test_trainer import config, scenes, train  # noqa: F401


def rates(*overrides):
    cfg = tiny_config("SOLVER.BASE_LR", 1.0, *overrides)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, values = build_lr_scheduler(cfg, optimizer), []
    for _ in range(cfg.SOLVER.MAX_ITER):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_schedule_beyond_the_end_is_scaled(caplog):
    with caplog.at_level(logging.WARNING, "regionspot"):
        values = rates("SOLVER.MAX_ITER", 60)  # 450k iterations' schedule
    assert "WARMUP_ITERS 1000 is longer than MAX_ITER 60: 6" in caplog.text
    assert "STEPS (350000, 420000) do not lie before MAX_ITER 60: (46, 56)" in caplog.text
    assert values[0] == pytest.approx(0.01) and values[6:46] == [1.0] * 40
    assert values[46:56] == pytest.approx([0.1] * 10) and values[56:] == pytest.approx([0.01] * 4)


def test_schedule_inside_the_training_is_kept(caplog):
    with caplog.at_level(logging.WARNING, "regionspot"):
        values = rates("SOLVER.MAX_ITER", 20, "SOLVER.WARMUP_ITERS", 5, "SOLVER.STEPS", (10, 19))
    assert not caplog.records and values[5:10] == [1.0] * 5 and values[10] == pytest.approx(0.1)


@pytest.mark.parametrize("end", [1, 2, 3, 5])
def test_schedule_of_a_few_iterations(end):
    assert len(rates("SOLVER.MAX_ITER", end)) == end


def test_learning_rate_jump_on_resume_warns(scenes, tmp_path, caplog):  # noqa: F811
    steps = ("SOLVER.WARMUP_ITERS", 1, "SOLVER.CHECKPOINT_PERIOD", 3)
    train(scenes, tmp_path, *steps, "SOLVER.MAX_ITER", 6, "SOLVER.STEPS", (4,))
    with caplog.at_level(logging.WARNING, "regionspot"):
        train(scenes, tmp_path, *steps, "SOLVER.MAX_ITER", 8, "SOLVER.STEPS", (4,), resume=True)
        assert "rate jumps" not in caplog.text
        train(scenes, tmp_path, *steps, "SOLVER.MAX_ITER", 12, "SOLVER.STEPS", (10,), resume=True)
    assert "the learning rate jumps from 7e-05 to 0.0007 at iteration 8" in caplog.text


def test_training_sets_are_checked_first():
    cfg = tiny_config("DATASETS.TRAIN", ("nowhere_train",), "DATASETS.TEST", ("nowhere_test",))
    with pytest.raises(KeyError, match="DATASETS.TRAIN: data set 'nowhere_train'"):
        RegionSpotTrainer(cfg)


def test_step_seed_depends_on_seed_iteration_rank(monkeypatch):
    def draw(seed, iteration, rank):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: rank)
        seed_step(seed, iteration)
        return torch.rand(1).item()

    drawn = [draw(*key) for key in ((1, 5, 0), (2, 5, 0), (1, 6, 0), (1, 5, 1))]
    assert len(set(drawn)) == 4 and draw(1, 5, 0) == drawn[0]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_gradients_match_whole_batch(scenes, tmp_path, accumulate):  # noqa: F811
    def gradients(parts):
        plain = ("SOLVER.CLIP_GRADIENTS.ENABLED", False, "MODEL.REGIONSPOT.INTEGRATION.DROPOUT", 0.0)
        cfg = config(scenes, tmp_path, *plain, "SOLVER.ACCUMULATE", parts, "SOLVER.MAX_ITER", 1)
        torch.manual_seed(0)
        trainer = RegionSpotTrainer(cfg)
        trainer.resume_or_load(resume=False)
        trainer.train()
        parameters = trainer.recognizer.knowledge_integration.named_parameters()
        return {name: parameter.grad.clone() for name, parameter in parameters if parameter.grad is not None}

    whole, parts = gradients(1), gradients(accumulate)
    norm = torch.stack([grad.norm() for grad in whole.values()]).norm()
    joined = torch.stack([grad.norm() for grad in parts.values()]).norm()
    assert joined / norm == pytest.approx(1, abs=0.3)  # parts are normalized by their own boxes
