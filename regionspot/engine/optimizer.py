"""The optimizer of the paper's recipe."""

import logging
import math
from typing import Any

import torch
from detectron2 import solver
from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params
from torch import nn

logger = logging.getLogger(__name__)

FUSED_DEVICES = ["cpu", "cuda"]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer over the parameters that learn.

    ``SOLVER.OPTIMIZER`` "AdamW" is the paper's, "SGD" Detectron2's. With ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE``
    "full_model" the gradient's norm over all parameters is bounded by ``CLIP_VALUE``; other types are Detectron2's.
    """
    clipping = cfg.SOLVER.CLIP_GRADIENTS
    full_model = clipping.ENABLED and clipping.CLIP_TYPE == "full_model"
    if cfg.SOLVER.OPTIMIZER == "SGD" and not full_model:
        return solver.build_optimizer(cfg, model)
    if cfg.SOLVER.OPTIMIZER != "AdamW":
        raise ValueError(
            f"SOLVER.OPTIMIZER: expected AdamW, or SGD without full_model clipping; got {cfg.SOLVER.OPTIMIZER!r}"
        )
    if clipping.ENABLED and not full_model:
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE: AdamW takes full_model, got {clipping.CLIP_TYPE!r}")
    # Detectron2's groups: weight decay of norms and biases has keys of its own
    groups = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    is_fused = all(parameter.device.type in FUSED_DEVICES for parameter in model.parameters())  # one pass over them
    settings: dict[str, Any] = {"lr": cfg.SOLVER.BASE_LR, "weight_decay": cfg.SOLVER.WEIGHT_DECAY, "fused": is_fused}
    optimizer = torch.optim.AdamW(groups, **settings)
    if full_model:
        clip_before_steps(optimizer, model, clipping.CLIP_VALUE)
    return optimizer


def clip_before_steps(optimizer: torch.optim.Optimizer, model: nn.Module, value: float) -> None:
    """Clip the gradient's norm over all trained parameters to ``value`` before each step.

    If it is not finite, an optimizer with ``found_inf`` (a float scalar, 1 skips the step) gets that, others raise.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def clip_gradients(*_: object) -> None:  # a hook of the step runs after a gradient scaler has unscaled
        norm = nn.utils.clip_grad_norm_(parameters, value)
        found_inf = getattr(optimizer, "found_inf", None)
        is_scaled = hasattr(optimizer, "grad_scale")  # by a gradient scaler, which must see itself what overflows
        if found_inf is not None and not is_scaled:
            optimizer.found_inf = torch.maximum(found_inf, (~torch.isfinite(norm)).float())  # type: ignore[attr-defined]
        elif not torch.isfinite(norm) and not found_inf:
            raise FloatingPointError(f"the gradient's norm is {norm.item()}")

    optimizer.register_step_pre_hook(clip_gradients)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
    """Build Detectron2's learning-rate scheduler, with warm-up and steps inside the training.

    A warm-up longer than ``SOLVER.MAX_ITER`` would never reach the learning rate, and steps past it would never lower
    it: such a warm-up becomes a tenth of the training, and such steps are scaled so that the last is at 14/15 of it, as
    in the paper. The log warns of both.
    """
    cfg = cfg.clone()
    cfg.defrost()
    node, end = cfg.SOLVER, cfg.SOLVER.MAX_ITER
    if node.WARMUP_ITERS > end > 0:
        scaled = max(end // 10, 1)
        logger.warning("SOLVER.WARMUP_ITERS %d is longer than MAX_ITER %d: %d", node.WARMUP_ITERS, end, scaled)
        node.WARMUP_ITERS = scaled
    if node.LR_SCHEDULER_NAME != "WarmupCosineLR" and node.STEPS and max(node.STEPS) >= end:
        scaled_steps = {int(step * end * 14 / 15 / max(node.STEPS)) for step in node.STEPS}
        steps = tuple(sorted(scaled_steps - {0}))
        logger.warning("SOLVER.STEPS %s do not lie before MAX_ITER %d: %s", tuple(node.STEPS), end, steps)
        node.STEPS = steps
    return solver.build_lr_scheduler(cfg, optimizer)


def warn_of_jump(optimizer: torch.optim.Optimizer, scheduler: Any, iteration: int) -> None:
    """Warn if a resumed run has another learning rate than its checkpoint, as after a change of ``MAX_ITER``."""
    before, after = optimizer.param_groups[0]["lr"], scheduler.get_lr()[0]
    if not math.isclose(before, after, rel_tol=1e-3):
        logger.warning(
            "the learning rate jumps from %.3g to %.3g at iteration %d: SOLVER.MAX_ITER, STEPS or BASE_LR are not "
            "the checkpoint's",
            before,
            after,
            iteration,
        )
