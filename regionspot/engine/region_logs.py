"""What training logs about names of regions: top-1 accuracy of batches; loss, accuracy and drawings of test images."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.evaluation import inference_context
from detectron2.utils import comm
from torch import nn

from regionspot.checkpoint.loading import find_recognizer
from regionspot.data.build import build_test_loader, dataset_vocabulary
from regionspot.data.training_set import image_ids
from regionspot.drawing import draw_labels
from regionspot.modeling import RegionRecognizer, RegionSpot
from regionspot.modeling.losses import region_focal_loss
from regionspot.structures import to_rgb

logger = logging.getLogger(__name__)

DRAWN = 4  # images of a validation that are drawn


class RegionAccuracy(HookBase):
    """Logs "region_top1": the percentage of a batch's regions whose best name is the annotated one.

    Only steps at the log's period are looked at, in the main process; others cost nothing.
    """

    def __init__(self, model: nn.Module, period: int) -> None:
        """Look at every ``period``-th step of ``model``, a ``RegionSpot`` that DDP may have wrapped."""
        self.period = period
        self.model = next(module for module in model.modules() if isinstance(module, RegionSpot))
        self._inputs: list[list[dict[str, Any]]] = []  # of each batch of the step
        self._outputs: list[list[torch.Tensor]] = []  # semantic tokens of each image of each batch
        self._handles: list[Any] = []

    def before_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0:
            integration = self.model.recognizer.knowledge_integration
            self._handles = [
                self.model.register_forward_pre_hook(lambda _, args: self._inputs.append(args[0])),
                # a call may contain others, for parts of the batch: the last output is that of the whole
                integration.register_forward_hook(
                    lambda _, args, output: self._outputs.append([tokens.detach() for tokens in output])
                ),
                self.model.register_forward_hook(lambda *_: self._keep_last_output()),
            ]

    def _keep_last_output(self) -> None:
        del self._outputs[len(self._inputs) - 1 : -1]

    def after_step(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._handles:
            batches = zip(self._inputs, self._outputs, strict=True)
            pairs = [pair for inputs, outputs in batches for pair in zip(inputs, outputs, strict=True)]
            correct, total = _count_correct(self.model.recognizer, pairs)
            if total:
                self.trainer.storage.put_scalar("region_top1", 100 * correct / total)
        self._inputs, self._outputs, self._handles = [], [], []


@torch.no_grad()
def _count_correct(recognizer: RegionRecognizer, pairs: list[tuple[dict[str, Any], torch.Tensor]]) -> tuple[float, int]:
    """Return how many regions are named right, and how many there are."""
    matches = []
    for inputs, semantic_tokens in pairs:
        best = recognizer.score(semantic_tokens, inputs.get("vocabulary", "")).argmax(dim=1)
        matches.append(best == inputs["instances"].gt_classes.to(best.device))
    joined = torch.cat(matches) if matches else torch.zeros(0)
    return float(joined.sum()), len(joined)


@dataclass
class Validation:
    """Loss and accuracy of annotated regions, in all processes' images together.

    Attributes:
        loss: as in training, without dropout; NaN without images.
        top1: percent; NaN without regions.
        drawings: by image id (H, W, 3) uint8 RGB, the annotated names beside the predicted ones; of this process.
    """

    loss: float
    top1: float
    drawings: dict[str, np.ndarray]


@torch.no_grad()
def validate_regions(cfg: CfgNode, model: nn.Module, name: str, num_images: int) -> Validation:
    """Recognize the annotated regions of ``num_images`` images, evenly spaced in a test set, by its own names.

    Images without regions do not count, nor do data sets without annotations.
    """
    regionspot = next(module for module in model.modules() if isinstance(module, RegionSpot))
    ids = image_ids(DatasetCatalog.get(name))
    chosen = np.linspace(0, len(ids) - 1, min(num_images, len(ids))).round().astype(int)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.REGIONSPOT.PROPOSALS.SOURCE = "gt"
    loader = build_test_loader(cfg, name, skip=set(ids.tolist()) - set(ids[chosen].tolist()))
    sums, drawings = np.zeros(4), dict[str, np.ndarray]()  # sum of losses, images; correct, regions
    vocabulary = find_recognizer(model).using_vocabulary(dataset_vocabulary(cfg, name))
    with inference_context(regionspot), vocabulary:
        for batch in loader:
            for inputs in batch:
                if len(inputs.get("instances", ())) and not inputs.get("unreadable"):
                    sums += _validate_image(cfg, regionspot, inputs, drawings)
    total = np.sum(comm.all_gather(sums), axis=0)
    loss, top1 = (float(part / whole) if whole else float("nan") for part, whole in (total[:2], total[2:]))
    return Validation(loss, 100 * top1, drawings)


def _validate_image(
    cfg: CfgNode, model: RegionSpot, inputs: dict[str, Any], drawings: dict[str, np.ndarray]
) -> np.ndarray:
    recognizer, instances = model.recognizer, inputs["instances"]
    image = to_rgb(inputs["image"], model.input_format)
    tokens = recognizer.position_tokens([image], [instances.gt_boxes])
    logits = recognizer.classify(tokens, recognizer.vision_language.encode_images([image]))
    targets = instances.gt_classes.to(logits[0].device)
    best = logits[0].argmax(dim=1)
    if len(drawings) < DRAWN and comm.is_main_process():
        boxes, array = instances.gt_boxes.tensor.cpu().numpy(), image.permute(1, 2, 0).cpu().numpy().astype(np.uint8)
        sides = [[recognizer.vocabulary[label] for label in labels.tolist()] for labels in (targets, best)]
        drawn = [draw_labels(array, boxes, None, labels) for labels in sides]
        drawings[str(inputs["image_id"])] = np.concatenate(drawn, axis=1)
    node = cfg.MODEL.REGIONSPOT.LOSS
    loss = region_focal_loss(logits, [targets], node.FOCAL_ALPHA, node.FOCAL_GAMMA)
    return np.array([float(loss), 1, float((best == targets).sum()), len(targets)])
