"""The optimizer: rates and decays of the config reach their parameters."""

import pytest
import torch
from torch import nn

from regionspot.engine.optimizer import build_optimizer

from ..helpers import tiny_config

CHANGES = ("SOLVER.BASE_LR", 0.1, "SOLVER.WEIGHT_DECAY", 0.5, "SOLVER.WEIGHT_DECAY_NORM", 0.25)
CHANGES += ("SOLVER.WEIGHT_DECAY_BIAS", 0.125, "SOLVER.BIAS_LR_FACTOR", 2.0)


def test_step_without_gradient_only_decays():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(tiny_config(*CHANGES), model).step()
    linear, norm = model
    expected = {linear.weight: 0.1 * 0.5, linear.bias: 0.2 * 0.125, norm.weight: 0.1 * 0.25, norm.bias: 0.1 * 0.25}
    for parameter, decay in expected.items():
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, 1 - decay))


def test_default_recipe_is_the_papers():
    solver = tiny_config().SOLVER
    assert (solver.OPTIMIZER, solver.BASE_LR, solver.WEIGHT_DECAY) == ("AdamW", 2.5e-5, 1e-4)
    assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR, solver.MAX_ITER) == (1000, 0.01, 450000)
    assert (tuple(solver.STEPS), solver.GAMMA, solver.IMS_PER_BATCH) == ((350000, 420000), 0.1, 16)
    assert (solver.CLIP_GRADIENTS.CLIP_TYPE, solver.CLIP_GRADIENTS.CLIP_VALUE) == ("full_model", 1.0)


@pytest.mark.parametrize(("kind", "value"), [("AdamW", "norm"), ("SGD", "full_model"), ("Adam", "full_model")])
def test_unsupported_combinations_are_refused(kind, value):
    cfg = tiny_config("SOLVER.OPTIMIZER", kind, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", value)
    with pytest.raises(ValueError, match="SOLVER"):
        build_optimizer(cfg, nn.Linear(2, 2))
