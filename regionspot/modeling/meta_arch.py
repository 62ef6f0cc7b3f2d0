"""RegionSpot as a Detectron2 meta-architecture."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import nn

from regionspot.checkpoint.key_layout import translate_released_keys
from regionspot.modeling.proposal_sources import build_proposal_source
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.structures import check_boxes, check_classes, read_proposals


@META_ARCH_REGISTRY.register()
class RegionSpot(nn.Module):
    """Recognize given regions of images over any vocabulary ("Recognize Any Regions", arXiv 2311.01373).

    Its state dict is Detectron2's ordinary one; it also loads the released checkpoints' keys as they are.
    """

    @configurable
    def __init__(
        self,
        *,
        recognizer: RegionRecognizer,
        input_format: str = "RGB",
        masks: str = "",
        proposal_source: Callable[[list[torch.Tensor]], list[Instances]] | None = None,
        top_k_proposals: int = -1,
    ) -> None:
        """
        Args:
            recognizer: the model proper.
            input_format: channel order of the images, "RGB" or "BGR".
            masks: what inference gives masks as: "bitmask" (``pred_masks``, which Detectron2's evaluators take),
                "rle" (``pred_masks_rle``, for ours: one for all detections of a box) or "".
            proposal_source: finds the boxes of RGB images at inference, in place of those that come with them.
            top_k_proposals: proposals kept of an image, best first; -1 for all.
        """
        super().__init__()
        if input_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT: expected RGB or BGR, got {input_format!r}")
        self.recognizer = recognizer
        self.input_format = input_format
        self.masks = masks
        self.proposal_source = proposal_source
        self.top_k_proposals = top_k_proposals
        self.register_load_state_dict_pre_hook(_translate_released_keys)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        recognizer = cls.build_recognizer(cfg)
        return {
            "recognizer": recognizer,
            "proposal_source": build_proposal_source(cfg, recognizer.localizer),
            "top_k_proposals": cfg.MODEL.REGIONSPOT.PROPOSALS.TOP_K,
            "input_format": cfg.INPUT.FORMAT,
            "masks": "bitmask" if cfg.MODEL.MASK_ON else "",
        }

    @classmethod
    def build_recognizer(cls, cfg: CfgNode) -> RegionRecognizer:
        return RegionRecognizer(cfg)

    @property
    def device(self) -> torch.device:
        return self.recognizer.vision_language.pixel_mean.device

    def set_vocabulary(self, names: str | Sequence[str], key: str = "default") -> None:
        """Recognize ``names`` from now on, see ``RegionRecognizer.set_vocabulary``."""
        self.recognizer.set_vocabulary(names, key)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]] | dict[str, torch.Tensor]:
        """Detectron2's contract.

        Args:
            batched_inputs: one dict an image, with the keys:

                * ``image``: (3, H, W), uint8 or float in [0, 255], channels as ``INPUT.FORMAT`` says.
                * ``height``, ``width``: output size wanted; the image's own by default.
                * ``proposals``: ``Instances`` with ``proposal_boxes`` and, optionally, ``scores`` in [0, 1] or
                  ``objectness_logits``. Without it the boxes are those of ``instances``.
                * ``instances``: ``Instances`` with ``gt_boxes`` and, in training, ``gt_classes``.
                * ``tokens`` (N, D) and ``feature_map`` (L, width), in training: stored features of the boxes and of
                  the image, which then are not computed; with both, ``image`` is not needed.

                * ``vocabulary``, in training: key of the vocabulary that the image is scored against (see
                  ``RegionRecognizer.set_vocabulary``); the one in use by default.

                Boxes are XYXY in the pixels of ``image``.

        Returns:
            In training ``{"loss_cls": scalar}``; else for each image ``{"instances": Instances, "regions":
            Instances}``: detections and all regions, as ``RegionRecognizer.recognize`` describes them.

        Raises:
            KeyError: an image comes without boxes.
            ValueError: an image of wrong shape, a box that names no region, or a class outside the vocabulary.
        """
        if not batched_inputs:
            return {} if self.training else []
        if self.training:
            return self._losses(batched_inputs)
        images = [self._image(inputs) for inputs in batched_inputs]
        if self.proposal_source is not None:
            found = self.proposal_source(images)
            batched_inputs = [{**inputs, "proposals": x} for inputs, x in zip(batched_inputs, found)]
        regions = [self._regions(inputs) for inputs in batched_inputs]
        sizes = [
            (int(inputs.get("height", image.shape[1])), int(inputs.get("width", image.shape[2])))
            for inputs, image in zip(batched_inputs, images)
        ]
        results = self.recognizer.recognize(
            images, [boxes for boxes, _ in regions], [scores for _, scores in regions], sizes, self.masks
        )
        return [{"instances": detections, "regions": regions} for detections, regions in results]

    def _image(self, inputs: dict[str, Any]) -> torch.Tensor:
        image = inputs["image"]
        if image.dim() != 3 or image.shape[0] != 3:
            raise ValueError(f"{_name(inputs)}: expected shape (3, H, W), got {tuple(image.shape)}")
        return image if self.input_format == "RGB" else image.flip(0)

    def _regions(self, inputs: dict[str, Any]) -> tuple[Boxes, torch.Tensor | None]:
        """Return an image's boxes and, where they have them, their scores."""
        if "proposals" in inputs:
            boxes, scores = read_proposals(inputs["proposals"], self.top_k_proposals)
        elif "instances" in inputs:
            boxes, scores = inputs["instances"].gt_boxes, None
        else:
            raise KeyError(
                f"{_name(inputs)}: no boxes; expected the key 'proposals' or 'instances', got {sorted(inputs)}"
            )
        check_boxes(boxes.tensor, tuple(inputs["image"].shape[-2:]), f"boxes of {_name(inputs)}")
        return boxes, scores

    def _losses(self, batched_inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        boxes, classes = zip(*(self._targets(inputs) for inputs in batched_inputs))
        tokens, feature_map = self._frozen_features(batched_inputs, boxes)
        keys = [inputs.get("vocabulary", "") for inputs in batched_inputs]
        targets = [image_classes.to(self.device, non_blocking=True) for image_classes in classes]
        return self.recognizer.losses(tokens, feature_map, targets, keys)

    def _frozen_features(
        self, batched_inputs: list[dict[str, Any]], boxes: Sequence[Boxes]
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Return tokens and feature map of a batch: those that come with it, computed where they do not."""
        with_tokens = all("tokens" in inputs for inputs in batched_inputs)
        with_map = self.recognizer.vision_language.features == "none" or all("feature_map" in x for x in batched_inputs)
        images = [] if with_tokens and with_map else [self._image(inputs) for inputs in batched_inputs]
        if with_tokens:
            tokens = [inputs["tokens"].to(self.device, non_blocking=True).float() for inputs in batched_inputs]
        else:
            tokens = self.recognizer.position_tokens(images, boxes)
        if not with_map:
            return tokens, self.recognizer.vision_language.encode_images(images)
        if self.recognizer.vision_language.features == "none":
            return tokens, None
        maps = [inputs["feature_map"].to(self.device, non_blocking=True) for inputs in batched_inputs]
        return tokens, torch.stack(maps).float()

    def _targets(self, inputs: dict[str, Any]) -> tuple[Boxes, torch.Tensor]:
        """Return an image's annotated boxes and their classes."""
        if "instances" not in inputs:
            raise KeyError(f"{_name(inputs)}: training needs the key 'instances', got {sorted(inputs)}")
        boxes, classes = inputs["instances"].gt_boxes, inputs["instances"].gt_classes
        check_boxes(boxes.tensor, inputs["instances"].image_size, f"boxes of {_name(inputs)}")
        number = len(self.recognizer.classifier.get_names(inputs.get("vocabulary", "")))
        check_classes(classes, number, _name(inputs))
        return boxes, classes


def _name(inputs: dict[str, Any]) -> str:
    return f"image {inputs.get('file_name', inputs.get('image_id', 'without a name'))}"


def _translate_released_keys(model: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    translate_released_keys(state, f"{prefix}recognizer.")
