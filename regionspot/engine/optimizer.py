"""The optimiser of the paper's recipe."""

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from detectron2.solver.build import get_default_optimizer_params
from torch import nn


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimiser over the parameters that learn.

    ``SOLVER.OPTIMIZER`` "AdamW" is the paper's, "SGD" Detectron2's. With ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE``
    "full_model" the gradient's norm over all parameters is bounded by ``CLIP_VALUE``; the other types are
    Detectron2's.
    """
    clipping = cfg.SOLVER.CLIP_GRADIENTS
    full_model = clipping.ENABLED and clipping.CLIP_TYPE == "full_model"
    if cfg.SOLVER.OPTIMIZER == "SGD" and not full_model:
        return build_detectron2_optimizer(cfg, model)
    if cfg.SOLVER.OPTIMIZER != "AdamW":
        raise ValueError(
            f"SOLVER.OPTIMIZER: expected AdamW, or SGD without full_model clipping; got {cfg.SOLVER.OPTIMIZER!r}"
        )
    if clipping.ENABLED and not full_model:
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE: AdamW takes full_model, got {clipping.CLIP_TYPE!r}")
    groups = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    optimizer = torch.optim.AdamW(groups, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)
    if full_model:
        clip_before_steps(optimizer, model, clipping.CLIP_VALUE)
    return optimizer


def clip_before_steps(optimizer: torch.optim.Optimizer, model: nn.Module, value: float) -> None:
    """Bound the norm of the gradient over all parameters that learn by ``value`` before each step.

    A step whose norm is no number raises a FloatingPointError.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def clip_gradients(*_: object) -> None:  # a hook, so that a gradient scaler has unscaled before
        norm = nn.utils.clip_grad_norm_(parameters, value)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm.item()}")

    optimizer.register_step_pre_hook(clip_gradients)
