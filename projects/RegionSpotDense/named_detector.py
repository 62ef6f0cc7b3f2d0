"""RegionSpot's names for the boxes of any Detectron2 detector, a ``GeneralizedRCNN`` or not."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from regionspot import RegionRecognizer, freeze_host
from regionspot.checkpoint.checkpointer import SafeDetectionCheckpointer
from regionspot.checkpoint.key_layout import translate_released_keys
from regionspot.modeling.proposal_sources import to_proposals
from regionspot.structures import check_image_format, read_proposals, read_targets, to_rgb

logger = logging.getLogger(f"regionspot.{__name__}")


def load_detector(detector: nn.Module, weights: str) -> nn.Module:
    """Return ``detector`` with its own checkpoint loaded: a file or URL, "" to leave it as it is."""
    if weights:
        SafeDetectionCheckpointer(detector).load(weights)
    else:
        logger.warning("No weights are given for the detector: it keeps those it has, random or not")
    return detector


class NamedDetector(nn.Module):
    """A detector finds boxes, whatever their classes; the recognizer names them over any vocabulary."""

    def __init__(
        self,
        *,
        detector: nn.Module,
        recognizer: RegionRecognizer,
        input_format: str = "BGR",
        detector_weights: str = "",
        masks: bool = False,
        freeze: bool = True,
        box_nms_thresh: float = 0.7,
        top_k: int = -1,
    ) -> None:
        """
        Args:
            detector: any model with Detectron2's contract that returns ``instances`` with ``pred_boxes`` and ``scores``
                in [0, 1]: RetinaNet, FCOS, ...
            recognizer: names the boxes; its ``rule`` has the thresholds.
            input_format: channel order of the detector's images, "RGB" or "BGR".
            detector_weights: file or URL of the detector's own checkpoint; "" leaves it as it is.
            masks: whether detections have SAM's masks.
            freeze: whether the detector is frozen. Otherwise its own losses train it, and its classes must be those of
                the data set.
            box_nms_thresh: IoU of the class-agnostic suppression before naming (a detector may return a box once for
                every class); 1 for none.
            top_k: number of best boxes to keep of an image; -1 for all.
        """
        super().__init__()
        self.input_format = check_image_format(input_format, "input_format")
        self.detector, self.recognizer = detector, recognizer
        self.masks, self.frozen = masks, freeze
        self.box_nms_thresh, self.top_k = box_nms_thresh, top_k
        load_detector(detector, detector_weights)
        if freeze:
            freeze_host(self)
        self.register_load_state_dict_pre_hook(_translate_keys)

    def set_vocabulary(self, names: str | Sequence[str], key: str = "default") -> None:
        """Recognize ``names`` from now on, see ``RegionRecognizer.set_vocabulary``."""
        self.recognizer.set_vocabulary(names, key)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]] | dict[str, torch.Tensor]:
        """Detectron2's contract.

        Args:
            batched_inputs: one dict an image: ``image`` (3, H, W), uint8 or float in [0, 255], of any sizes;
                ``height`` and ``width``, the output size (by default the image's own); in training
                ``instances`` with ``gt_boxes`` (XYXY, pixels of ``image``) and ``gt_classes`` (of the vocabulary).

        Returns:
            In training ``{"loss_regionspot": scalar}`` and the losses of a detector that learns; else for each image
            ``{"instances": Instances}`` at output size, as ``RegionRecognizer.forward`` describes them.

        Raises:
            KeyError: a training image without annotations.
            ValueError: an invalid annotated box, or a class outside the vocabulary.
        """
        if self.training:
            return self._losses(batched_inputs)
        frames = [(x["image"].shape[-2], x["image"].shape[-1]) for x in batched_inputs]
        sizes = [(int(x.get("height", h)), int(x.get("width", w))) for x, (h, w) in zip(batched_inputs, frames)]
        # The recognizer needs boxes in the frame of the image, so the detector's output has the image's size.
        with torch.no_grad():
            outputs = self.detector([{**x, "height": h, "width": w} for x, (h, w) in zip(batched_inputs, frames)])
            boxes, scores = zip(*(self._regions(x["instances"], size) for x, size in zip(outputs, frames)))
            masks = "bitmask" if self.masks else ""
            results = self.recognizer(self._images(batched_inputs), list(boxes), list(scores), sizes, masks)
        return [{"instances": detections} for detections in results]

    def _images(self, batched_inputs: list[dict[str, Any]]) -> list[torch.Tensor]:
        """Return the (3, H, W) RGB images."""
        return [to_rgb(inputs["image"], self.input_format) for inputs in batched_inputs]

    def _regions(self, detections: Instances, size: tuple[int, int]) -> tuple[Boxes, torch.Tensor | None]:
        """Return the best boxes of an image of (height, width), and their (N,) scores."""
        return read_proposals(
            to_proposals(detections.pred_boxes.tensor, detections.scores, size), self.top_k, self.box_nms_thresh
        )

    def _losses(self, batched_inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        targets = [read_targets(inputs, len(self.recognizer.vocabulary)) for inputs in batched_inputs]
        boxes, classes = [x.gt_boxes for x in targets], [x.gt_classes for x in targets]
        losses = {"loss_regionspot": self.recognizer.loss(self._images(batched_inputs), boxes, classes)}
        return losses if self.frozen else {**losses, **self.detector(batched_inputs)}


def _translate_keys(_: nn.Module, state: dict[str, torch.Tensor], prefix: str, *__: object) -> None:
    """Let a checkpoint in the released layout, such as one of the attention module alone, load into the recognizer."""
    translate_released_keys(state, f"{prefix}recognizer.")
    if state and not any(key.startswith(f"{prefix}recognizer.") for key in state):
        raise ValueError(
            f"the checkpoint holds nothing of RegionSpot: expected keys such as {prefix}recognizer.(...), got "
            f"{next(iter(state))}; the detector's own checkpoint is model.detector_weights"
        )
