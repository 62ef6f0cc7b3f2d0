"""RegionSpot as a Detectron2 meta-architecture."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import nn

from regionspot.checkpoint.key_layout import translate_released_keys
from regionspot.modeling.proposal_sources import SamAutomaticProposals, build_proposal_source
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.structures import check_image_format, check_regions, image_name, read_proposals, read_targets, to_rgb


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
            masks: format of the masks at inference: "bitmask" (``pred_masks``, which Detectron2's evaluators take),
                "rle" (``pred_masks_rle``, one for all detections of a box) or "" for none.
            proposal_source: computes boxes of RGB images at inference, in place of those that come with them.
            top_k_proposals: number of best proposals to keep of an image; -1 for all.
        """
        super().__init__()
        self.recognizer = recognizer
        self.input_format = check_image_format(input_format)
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
                * ``height``, ``width``: size of the output; the image's own by default.
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
            Instances}``: detections and all regions, see ``Recognition``.

        Raises:
            KeyError: an image comes without boxes.
            ValueError: an image of wrong shape, an invalid box, or a class outside the vocabulary.
        """
        if not batched_inputs:
            return {} if self.training else []
        return self._losses(batched_inputs) if self.training else self.inference(batched_inputs)

    def inference(self, batched_inputs: list[dict[str, Any]], masks: str | None = None) -> list[dict[str, Instances]]:
        """Recognize the regions of images, as ``forward`` describes; ``masks`` is their format for this call."""
        images = [to_rgb(inputs["image"], self.input_format) for inputs in batched_inputs]
        features = None
        if self.proposal_source is not None:
            if isinstance(self.proposal_source, SamAutomaticProposals):  # SAM's encoder runs once for boxes and tokens
                features = self.recognizer.encode_images(images)
            proposals = self.propose(images, features.embeddings if features else None)
            batched_inputs = [{**inputs, "proposals": x} for inputs, x in zip(batched_inputs, proposals)]
        regions = [self._regions(inputs) for inputs in batched_inputs]
        boxes, scores = [boxes for boxes, _ in regions], [scores for _, scores in regions]
        check_regions(images, boxes, scores, [image_name(inputs) for inputs in batched_inputs])
        sizes = [
            (int(inputs.get("height", image.shape[1])), int(inputs.get("width", image.shape[2])))
            for inputs, image in zip(batched_inputs, images)
        ]
        masks = self.masks if masks is None else masks
        results = self.recognizer.recognize(images, boxes, scores, sizes, masks, features=features)
        return [{"instances": result.detections, "regions": result.regions} for result in results]

    @torch.no_grad()
    def propose(self, images: list[torch.Tensor], embeddings: torch.Tensor | None = None) -> list[Instances]:
        """Return the proposals of ``MODEL.REGIONSPOT.PROPOSALS.SOURCE`` for (3, H, W) RGB images in [0, 255].

        ``embeddings`` are SAM's of the images, (B, C, h, w), if they are known already.

        Raises:
            ValueError: the source finds no boxes itself.
        """
        if self.proposal_source is None:
            raise ValueError("no boxes: give them, or set MODEL.REGIONSPOT.PROPOSALS.SOURCE sam_automatic or detector")
        if isinstance(self.proposal_source, SamAutomaticProposals):
            return self.proposal_source(images, embeddings)
        return self.proposal_source(images)

    def _regions(self, inputs: dict[str, Any]) -> tuple[Boxes, torch.Tensor | None]:
        """Return an image's boxes and, where they have them, their scores."""
        if "proposals" in inputs:
            return read_proposals(inputs["proposals"], self.top_k_proposals)
        if "instances" in inputs:
            return inputs["instances"].gt_boxes, None
        raise KeyError(
            f"{image_name(inputs)}: no boxes; expected the key 'proposals' or 'instances', got {sorted(inputs)}"
        )

    def _losses(self, batched_inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        keys = [inputs.get("vocabulary", "") for inputs in batched_inputs]  # data sets are mixed in a batch
        num_classes = [len(self.recognizer.classifier.get_names(key)) for key in keys]
        targets = [read_targets(inputs, num) for inputs, num in zip(batched_inputs, num_classes)]
        tokens, maps = self._stored(batched_inputs, "tokens"), self._stored(batched_inputs, "feature_map")
        feature_map = None if maps is None else torch.stack(maps)  # (B, L, width)
        # with all features stored, a training batch carries no pixels at all
        needs_map = feature_map is None and self.recognizer.vision_language.features != "none"
        images = []
        if tokens is None or needs_map:
            images = [to_rgb(inputs["image"], self.input_format) for inputs in batched_inputs]
        boxes, classes = [x.gt_boxes for x in targets], [x.gt_classes for x in targets]
        return {"loss_cls": self.recognizer.loss(images, boxes, classes, keys, tokens, feature_map)}

    def _stored(self, batched_inputs: list[dict[str, Any]], key: str) -> list[torch.Tensor] | None:
        """Return the stored features under ``key`` if all images have them, in float32 (stores hold float16)."""
        if not all(key in inputs for inputs in batched_inputs):
            return None
        return [inputs[key].to(self.device, non_blocking=True).float() for inputs in batched_inputs]


def _translate_released_keys(model: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    translate_released_keys(state, f"{prefix}recognizer.")
