"""RegionSpot as the head of another detector: open-vocabulary classes for any ``GeneralizedRCNN``."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, ROIHeads
from detectron2.structures import ImageList, Instances
from torch import nn
from torch.nn.functional import normalize

from regionspot.checkpoint.key_layout import PARTS
from regionspot.modeling.localizers.localizer import LocalizerOutput
from regionspot.modeling.masks import RegionMasks
from regionspot.modeling.postprocessing import DetectionRule, Recognition, merge_detections
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.modeling.roi_heads.host import BoxSelection, HostImages, build_host_heads
from regionspot.modeling.roi_heads.host_vocabulary import HostVocabulary, match_names
from regionspot.structures import Prompts, check_boxes, check_targets
from regionspot.vocabulary import VocabularySource, dataset_names

TRAINING = "names of DATASETS.TRAIN"  # key of the vocabulary that is trained with


@ROI_HEADS_REGISTRY.register()
class RegionSpotROIHeads(ROIHeads):
    """Recognizes the proposals of a host detector over any vocabulary, with SAM's masks.

    The images are the host's, with its normalization undone. In training the regions are those that Detectron2's
    ``ROIHeads`` samples as foreground. The state dict has the host's own heads, if any, under the host's own keys, and
    the recognizer under ``recognizer.``.

    Attributes:
        host_is_frozen: whether ``RegionSpotRCNN`` or ``freeze_host`` has frozen the detector beside this head; with
            ``freeze`` the head refuses to be trained before.
    """

    @configurable
    def __init__(
        self,
        *,
        recognizer: RegionRecognizer,
        host_images: HostImages,
        boxes: BoxSelection | None = None,
        host: nn.Module | None = None,
        host_vocabulary: HostVocabulary | None = None,
        masks: bool = False,
        freeze: bool = True,
        **kwargs: object,
    ) -> None:
        """
        Args:
            recognizer: its ``rule`` has the thresholds.
            host_images: restores the original images.
            boxes: which boxes are recognized, and their scores; by default all proposals.
            host: the host's own ROI heads, for refined boxes and for ``host_vocabulary``.
            host_vocabulary: names for which the host's own detections are used.
            masks: whether detections have masks.
            freeze: whether the detector around the head is frozen.
            kwargs: arguments of ``ROIHeads``: how training regions are sampled.
        """
        super().__init__(**kwargs)
        boxes = boxes or BoxSelection()
        if host is None and (boxes.is_refined or host_vocabulary):
            raise ValueError("refined boxes and a host vocabulary need the host's own heads: got none")
        if host is not None and host_vocabulary and len(host_vocabulary.names) != host.num_classes:
            raise ValueError(
                f"MODEL.REGIONSPOT.HEAD.HOST_VOCABULARY: expected the {host.num_classes} names of the host's classes "
                f"(MODEL.ROI_HEADS.NUM_CLASSES) in its order, got {len(host_vocabulary.names)}"
            )
        self.recognizer, self.host_images, self.boxes = recognizer, host_images, boxes
        self.host, self.host_vocabulary = host, host_vocabulary
        self.masks, self.freeze = masks, freeze
        self.host_is_frozen = False
        # hooks rather than an override of load_state_dict, which a host that holds this head would not call
        self.register_load_state_dict_pre_hook(_to_own_keys)
        self.register_state_dict_post_hook(_to_host_keys)
        self.register_load_state_dict_post_hook(_forgive_loaded_parts)
        if freeze and host is not None:
            host.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        if "REGIONSPOT" not in cfg.MODEL:
            raise KeyError("MODEL.REGIONSPOT is missing: call regionspot.add_regionspot_config(cfg) before merging")
        node, roi_heads = cfg.MODEL.REGIONSPOT.HEAD, cfg.MODEL.ROI_HEADS
        if node.HOST_CONFIG and not node.HOST:
            raise ValueError(
                f"MODEL.REGIONSPOT.HEAD.HOST_CONFIG {node.HOST_CONFIG}: regionspot.config.load_config alone reads it; "
                "load the config by that, or merge the host's config yourself and leave this empty"
            )
        boxes = BoxSelection.from_config(cfg)  # cheap checks come before weights are read
        needs_host = boxes.is_refined or bool(node.HOST_VOCABULARY)
        host = build_host_heads(cfg, input_shape) if needs_host else None
        host_vocabulary = HostVocabulary.from_config(cfg) if node.HOST_VOCABULARY else None
        rule = replace(
            DetectionRule.from_config(cfg),
            score_thresh=roi_heads.SCORE_THRESH_TEST,
            nms_thresh=roi_heads.NMS_THRESH_TEST,
        )
        recognizer = RegionRecognizer.from_pretrained(cfg, node.WEIGHTS, rule=rule)
        _add_vocabularies(recognizer, cfg)
        return {
            **ROIHeads.from_config(cfg),
            "recognizer": recognizer,
            "host_images": HostImages(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT),
            "boxes": boxes,
            "host": host,
            "host_vocabulary": host_vocabulary,
            "masks": cfg.MODEL.MASK_ON,
            "freeze": node.FREEZE_HOST,
        }

    def set_vocabulary(self, names: VocabularySource, key: str = "default") -> None:
        """Recognize ``names`` from now on, see ``RegionRecognizer.set_vocabulary``."""
        self.recognizer.set_vocabulary(names, key)

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """Detectron2's contract of ROI heads.

        Args:
            images: B images as the host normalized and padded them.
            features: feature maps of the host's backbone, for its own heads only.
            proposals: B ``Instances`` with ``proposal_boxes`` (XYXY in the pixels of the images) and, optionally,
                ``objectness_logits`` or ``scores``.
            targets: in training, B ``Instances`` with ``gt_boxes`` and ``gt_classes``.

        Returns:
            In training the sampled regions and ``{"loss_regionspot": scalar}`` (with the losses of the host's own heads
            if they learn); else detections as ``RegionRecognizer.forward`` returns them, and {}.

        Raises:
            ValueError: an invalid box, a class outside the vocabulary, or a host that is not frozen but should be.
        """
        if self.training:
            if targets is None:
                raise ValueError("training needs annotated 'instances' with the images, got none")
            return self._losses(images, features, proposals, targets)
        with torch.no_grad():
            return self._detect(self.host_images(images), features, proposals), {}

    def forward_with_given_boxes(self, features: dict[str, torch.Tensor], instances: list[Instances]) -> None:
        """Refused: SAM's masks need the images, which Detectron2 does not pass here."""
        raise NotImplementedError(
            "RegionSpotROIHeads gives masks with its detections; it cannot add them to instances without the images"
        )

    def _detect(
        self, images: list[torch.Tensor], features: dict[str, torch.Tensor], proposals: list[Instances]
    ) -> list[Instances]:
        # A host with diverged weights proposes NaN: say so before SAM turns them into arbitrary masks.
        for i, image_proposals in enumerate(proposals):
            what = f"proposals of image {i} of the batch"
            check_boxes(image_proposals.proposal_boxes.tensor, image_proposals.image_size, what)
        boxes, scores = self.boxes.select(self.host, features, proposals)
        masks = "lazy" if self.masks else ""
        if self.host_vocabulary is None:
            return [result.detections for result in self.recognizer.recognize(images, boxes, scores, masks=masks)]
        assert self.host is not None
        known_names, names = self.host_vocabulary, self.recognizer.vocabulary
        matches = torch.tensor(match_names(known_names.names, names, known_names.aliases))  # (K of the host,)
        host_detections, _ = self.host(None, features, proposals)  # at inference none of HOSTS uses the images
        known = [_rename_classes(detections, matches) for detections in host_detections]
        others = ~torch.isin(torch.arange(len(names)), matches)  # (K,) RegionSpot detects what the host does not know
        encoded = self.recognizer.encode_images(images)  # once, for RegionSpot's boxes and masks of the host's
        named = self.recognizer.recognize(images, boxes, scores, None, masks, others, encoded)
        prompts = [Prompts(boxes=detections.pred_boxes.tensor) for detections in known]
        with_embeddings = self.recognizer.with_embeddings
        if not masks and not with_embeddings:
            return [self._merge(x, y, None) for x, y in zip(named, known)]
        located = self.recognizer.locate(encoded, prompts, bool(masks))
        if with_embeddings:
            host_boxes = [detections.pred_boxes for detections in known]
            embeddings = self.recognizer.region_embeddings(images, host_boxes, encoded, located)
            for detections, image_embeddings in zip(known, embeddings):
                detections.region_embeddings = normalize(image_embeddings.float(), dim=1)
        return [self._merge(x, y, z) for x, y, z in zip(named, known, located)]

    def _merge(self, recognized: Recognition, known: Instances, located: LocalizerOutput | None) -> Instances:
        """Merge RegionSpot's and the host's detections by score; the host's regions are numbered after RegionSpot's."""
        assert self.host_vocabulary is not None
        named = recognized.detections
        masks: RegionMasks | None = named.pred_masks if named.has("pred_masks") else None
        known.region_indices = len(recognized.regions) + torch.arange(len(known), device=known.scores.device)
        if masks is not None:
            named.remove("pred_masks")  # their rows are of other regions than the host's: merged again below
        merged = merge_detections(named, known, self.host_vocabulary.merge_nms_thresh, self.recognizer.rule.top_k)
        if masks is not None and located is not None and located.masks is not None:
            logits = torch.cat([masks.logits, located.masks])
            merged.pred_masks = RegionMasks(logits, merged.region_indices, masks.upsample)
        return merged

    def _losses(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        proposals: list[Instances],
        targets: list[Instances],
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        if self.freeze and not self.host_is_frozen:
            raise ValueError(
                "the detector around RegionSpotROIHeads is not frozen: set MODEL.META_ARCHITECTURE RegionSpotRCNN, or "
                "call regionspot.freeze_host(model) before training; MODEL.REGIONSPOT.HEAD.FREEZE_HOST False lets it "
                "learn"
            )
        key = TRAINING if TRAINING in self.recognizer.classifier.vocabularies else ""
        self.num_classes = len(self.recognizer.classifier.get_names(key))  # ROIHeads' index of background
        learning_host = None if self.freeze else self.host
        if learning_host is not None and learning_host.num_classes != self.num_classes:
            raise ValueError(
                f"MODEL.ROI_HEADS.NUM_CLASSES: a host that learns needs the data set's {self.num_classes} classes, got "
                f"{learning_host.num_classes}; or set MODEL.REGIONSPOT.HEAD.FREEZE_HOST True"
            )
        for i, target in enumerate(targets):
            check_targets(target, self.num_classes, f"image {i} of the batch")
        # annotated boxes are among the proposals (PROPOSAL_APPEND_GT), so that an untrained RPN is no obstacle
        sampled = self.label_and_sample_proposals(proposals, targets)
        regions = [x[x.gt_classes != self.num_classes] for x in sampled]
        boxes, classes = [x.proposal_boxes for x in regions], [x.gt_classes for x in regions]
        loss = self.recognizer.loss(self.host_images(images), boxes, classes, [key] * len(regions))
        losses = {"loss_regionspot": loss}
        if learning_host is not None:
            losses.update(learning_host(images, features, proposals, targets)[1])
        return regions, losses


def _rename_classes(detections: Instances, matches: torch.Tensor) -> Instances:
    """Map the host's classes by ``matches`` (K,) to those of the vocabulary; drop detections of classes with -1."""
    classes = matches.to(detections.pred_classes.device)[detections.pred_classes]
    renamed = Instances(detections.image_size, pred_boxes=detections.pred_boxes, scores=detections.scores)
    renamed.pred_classes = classes
    return renamed[(classes >= 0) & renamed.pred_boxes.nonempty()]


def _add_vocabularies(recognizer: RegionRecognizer, cfg: CfgNode) -> None:
    """Add the names of the data sets, which are encoded when first used."""
    if names := _names(cfg.DATASETS.TRAIN):
        recognizer.classifier.add(TRAINING, names)
    if not recognizer.classifier.active and (names := _names(cfg.DATASETS.TEST)):
        recognizer.classifier.add("default", names)
        recognizer.classifier.active = "default"


def _names(datasets: Sequence[str]) -> list[str]:
    """Return the class names of the first data set, or none if its files are missing (a model needs no data)."""
    if not datasets:
        return []
    metadata = MetadataCatalog.get(datasets[0])
    json_file = metadata.get("json_file")
    if json_file and not metadata.get("thing_classes") and not Path(json_file).is_file():
        return []
    return dataset_names(datasets[0])


# In a checkpoint the host's heads have the same keys as without RegionSpot, roi_heads.box_head.* instead of
# roi_heads.host.box_head.*, so that files move between the two detectors.


def _to_own_keys(head: RegionSpotROIHeads, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    if head.host is None:
        return
    tails = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    host_keys = [tail for tail in tails if not tail.startswith(("recognizer.", "host."))]
    expected = head.host.state_dict().keys()
    if host_keys and not any(key in expected for key in host_keys):
        raise ValueError(
            f"the checkpoint has ROI heads of another kind than MODEL.REGIONSPOT.HEAD.HOST: expected keys such as "
            f"{prefix}{next(iter(expected))}, got {prefix}{host_keys[0]}; set HOST to the kind that the host had itself"
        )
    for key in host_keys:
        state[f"{prefix}host.{key}"] = state.pop(prefix + key)


def _to_host_keys(head: RegionSpotROIHeads, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}host.")]:
        state[prefix + key.removeprefix(f"{prefix}host.")] = state.pop(key)


def _forgive_loaded_parts(head: RegionSpotROIHeads, keys: Any) -> None:
    """Do not report parts as missing that have weights and that a host's checkpoint lacks entirely."""
    expected = head.recognizer.state_dict()
    for part, prefix in PARTS.items():
        if not head.recognizer.weight_sources[part]:
            continue
        marker = "recognizer." + prefix
        missing = {key for key in keys.missing_keys if marker in key}
        if len(missing) == sum(key.startswith(prefix) for key in expected):
            keys.missing_keys[:] = [key for key in keys.missing_keys if key not in missing]
