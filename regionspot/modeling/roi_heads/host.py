"""The detector around a head: its own ROI heads, and keeping it as it is."""

from functools import cache
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, ROIHeads, StandardROIHeads, build_roi_heads
from detectron2.structures import Boxes, Instances
from torch import nn

from regionspot.modeling.recognizer import RegionRecognizer

HOSTS = ("StandardROIHeads", "CascadeROIHeads", "Res5ROIHeads")


def build_host_heads(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the ROI heads that ``MODEL.REGIONSPOT.HEAD.HOST`` names, for boxes and classes only."""
    name = cfg.MODEL.REGIONSPOT.HEAD.HOST or "StandardROIHeads"
    if name not in HOSTS:
        raise ValueError(f"MODEL.REGIONSPOT.HEAD.HOST: expected one of {', '.join(HOSTS)}; got {name!r}")
    if name != "Res5ROIHeads" and not cfg.MODEL.ROI_BOX_HEAD.NAME:
        raise ValueError(
            f"MODEL.REGIONSPOT.HEAD.HOST {name}: the host has no MODEL.ROI_BOX_HEAD.NAME; set HOST to the kind of ROI "
            "heads that it had itself, Res5ROIHeads if it is a C4 detector"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NAME = name
    cfg.MODEL.MASK_ON = cfg.MODEL.KEYPOINT_ON = False
    return build_roi_heads(cfg, input_shape)


def refine_boxes(
    heads: nn.Module, features: dict[str, torch.Tensor], proposals: list[Instances]
) -> list[tuple[Boxes, torch.Tensor]]:
    """Move proposals by the host's own box regression, each once, whatever its class.

    Where the regression is that of a class, it is that of the proposal's most probable one.

    Args:
        heads: one of ``HOSTS``.
        features: of the backbone.
        proposals: B ``Instances`` with ``proposal_boxes``.

    Returns:
        For each image its N_i boxes, cut to the image, and (N_i,) float: how probable it is that they hold an object.
    """
    if isinstance(heads, CascadeROIHeads):
        predictor, predictions, last = _run_cascade(heads, [features[f] for f in heads.box_in_features], proposals)
    else:
        boxes = [x.proposal_boxes for x in proposals]
        if isinstance(heads, Res5ROIHeads):
            pooled = heads.res5(heads.pooler([features[f] for f in heads.in_features], boxes)).mean(dim=[2, 3])
        else:
            assert isinstance(heads, StandardROIHeads)
            pooled = heads.box_head(heads.box_pooler([features[f] for f in heads.box_in_features], boxes))
        predictor, predictions, last = heads.box_predictor, heads.box_predictor(pooled), proposals
    results = []
    for deltas, probabilities, given in zip(
        predictor.predict_boxes(predictions, last), predictor.predict_probs(predictions, last), proposals
    ):
        foreground = probabilities[:, :-1]  # (N, K); the last is the background
        each = deltas.view(len(deltas), deltas.shape[1] // 4, 4)  # (N, 1 or K, 4)
        largest, best = foreground.max(dim=1)
        refined = Boxes(each[torch.arange(len(each)), best if each.shape[1] > 1 else torch.zeros_like(best)])
        refined.clip(given.image_size)
        objects = largest if predictor.use_sigmoid_ce else foreground.sum(dim=1)  # classes exclude each other or not
        results.append((refined, objects))
    return results


def _run_cascade(heads: CascadeROIHeads, features: list[torch.Tensor], proposals: list[Instances]) -> tuple:
    sizes = [x.image_size for x in proposals]
    for stage in range(heads.num_cascade_stages):
        predictions = heads._run_stage(features, proposals, stage)
        predictor = heads.box_predictor[stage]
        if stage + 1 < heads.num_cascade_stages:
            proposals = heads._create_proposals_from_boxes(predictor.predict_boxes(predictions, proposals), sizes)
    return predictor, predictions, proposals


def freeze_host(model: nn.Module) -> None:
    """Let nothing of a detector that holds a ``RegionRecognizer`` learn but the recognizer's attention module.

    What stands beside the part that holds the recognizer takes no gradient and works as at inference (no running
    means, no dropout, no losses of its own), whatever ``model.train()`` says.

    Args:
        model: any module whose children are the parts of a detector. A ``RegionSpotROIHeads`` does this by itself
            for the ``GeneralizedRCNN`` that it is put into.
    """
    if _freeze_children not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_freeze_children)
    _freeze_children(model)


def _freeze_children(model: nn.Module, _: Any = None) -> None:
    for child in model.children():
        if not any(isinstance(module, RegionRecognizer) for module in child.modules()):
            child.requires_grad_(False).eval()


@cache
def freeze_rcnns_around_heads() -> None:
    """From now on let a ``GeneralizedRCNN`` that gets a head with ``frozen`` set be frozen, by ``freeze_host``.

    A head is built before its model and never learns of it; so PyTorch is asked to tell when modules become parts of
    others. What the model gets after the head (as ``PanopticFPN`` does) is frozen, too. Installed once a process.
    """
    nn.modules.module.register_module_module_registration_hook(_freeze_around)


def _freeze_around(parent: nn.Module, _: str, child: nn.Module | None) -> None:
    if not isinstance(parent, GeneralizedRCNN):
        return
    if getattr(child, "frozen", False) and isinstance(child, ROIHeads):
        freeze_host(parent)
    elif child is not None and _freeze_children in parent._forward_pre_hooks.values():
        child.requires_grad_(False).eval()
