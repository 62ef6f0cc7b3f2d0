"""RegionSpot as the head of another detector: open-vocabulary classes for any ``GeneralizedRCNN``."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY, ROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from regionspot.checkpoint.key_layout import PARTS
from regionspot.modeling.localizers.localizer import LocalizerOutput
from regionspot.modeling.masks import RegionMasks
from regionspot.modeling.postprocessing import merge_detections
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.modeling.roi_heads.host import build_host_heads, freeze_rcnns_around_heads, refine_boxes
from regionspot.modeling.roi_heads.host_vocabulary import match_names, read_aliases
from regionspot.structures import Prompts, check_boxes, check_classes, read_proposals
from regionspot.vocabulary import dataset_names, load_vocabulary

TRAINING = "names of DATASETS.TRAIN"  # key of the vocabulary that is trained with


@ROI_HEADS_REGISTRY.register()
class RegionSpotROIHeads(ROIHeads):
    """Names the proposals of a host detector over any vocabulary and gives SAM's masks of them.

    The images are those that the host sees, with its normalization undone. In training the regions are those that
    Detectron2's ``ROIHeads`` samples as foreground. The state dict has the host's own heads, where they are kept, under
    the host's own keys, and the recognizer under ``recognizer.``.
    """

    @configurable
    def __init__(
        self,
        *,
        recognizer: RegionRecognizer,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "BGR",
        masks: bool = False,
        refine: bool = False,
        box_score: str = "objectness",
        box_nms_thresh: float = 1.0,
        top_k_proposals: int = -1,
        host: nn.Module | None = None,
        host_vocabulary: list[str] | None = None,
        host_aliases: Mapping[str, str | None] | None = None,
        merge_nms_thresh: float = 1.0,
        freeze: bool = True,
        **kwargs: object,
    ) -> None:
        """
        Args:
            recognizer: the model proper; its ``rule`` has the thresholds.
            pixel_mean, pixel_std: the host's normalization.
            input_format: channel order of the host's images, "RGB" or "BGR".
            masks: whether detections have masks.
            refine: move proposals by the box regression of ``host`` first.
            box_score: "objectness" of the proposals, or "foreground" of ``host``.
            box_nms_thresh: class-agnostic suppression before anything is recognized; 1 for none.
            top_k_proposals: boxes kept of an image, best first; -1 for all.
            host: the host's own ROI heads.
            host_vocabulary: the names of its classes, of which detections are then its own.
            host_aliases: names of its classes under other names, see ``match_names``.
            merge_nms_thresh: of what ``merge_detections`` does with these and RegionSpot's.
            freeze: let nothing of the ``GeneralizedRCNN`` around learn.
            kwargs: of ``ROIHeads``: how regions to train with are sampled.
        """
        super().__init__(**kwargs)
        if input_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT: expected RGB or BGR, got {input_format!r}")
        if box_score not in ("objectness", "foreground") or (box_score == "foreground" and not refine):
            raise ValueError(
                "MODEL.REGIONSPOT.HEAD.BOX_SCORE: expected objectness, or foreground with BOXES refined; "
                f"got {box_score!r}"
            )
        if host is None and (refine or host_vocabulary):
            raise ValueError("boxes are refined, and names are known, by the host's own heads: got none")
        if host is not None and host_vocabulary and len(host_vocabulary) != host.num_classes:
            raise ValueError(
                f"MODEL.REGIONSPOT.HEAD.HOST_VOCABULARY: expected the {host.num_classes} names of the host's classes "
                f"(MODEL.ROI_HEADS.NUM_CLASSES) in its order, got {len(host_vocabulary)}"
            )
        self.recognizer = recognizer
        self.host = host
        self.input_format, self.masks, self.refine = input_format, masks, refine
        self.box_score, self.box_nms_thresh, self.top_k_proposals = box_score, box_nms_thresh, top_k_proposals
        self.host_vocabulary, self.merge_nms_thresh = list(host_vocabulary or []), merge_nms_thresh
        self.host_aliases = dict(host_aliases or {})
        self.frozen = freeze
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        self.register_load_state_dict_pre_hook(_to_our_keys)
        self.register_state_dict_post_hook(_to_host_keys)
        self.register_load_state_dict_post_hook(_forgive_loaded_parts)
        if freeze:
            freeze_rcnns_around_heads()
            if host is not None:
                host.requires_grad_(False)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        if "REGIONSPOT" not in cfg.MODEL:
            raise KeyError("MODEL.REGIONSPOT is missing: call regionspot.add_regionspot_config(cfg) before merging")
        node = cfg.MODEL.REGIONSPOT.HEAD
        if node.HOST_CONFIG and not node.HOST:
            raise ValueError(
                f"MODEL.REGIONSPOT.HEAD.HOST_CONFIG {node.HOST_CONFIG}: regionspot.config.load_config alone reads it; "
                "load the config by that, or merge the host's config yourself and leave this empty"
            )
        if node.BOXES not in ("proposals", "refined"):
            raise ValueError(f"MODEL.REGIONSPOT.HEAD.BOXES: expected proposals or refined, got {node.BOXES!r}")
        with_host = node.BOXES == "refined" or bool(node.HOST_VOCABULARY)
        host = build_host_heads(cfg, input_shape) if with_host else None  # before anything large is read
        host_vocabulary = load_vocabulary(node.HOST_VOCABULARY) if node.HOST_VOCABULARY else None
        recognizer = RegionRecognizer.from_pretrained(cfg, node.WEIGHTS)
        recognizer.rule.score_thresh = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
        recognizer.rule.nms_thresh = cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST
        _add_vocabularies(recognizer, cfg)
        return {
            **ROIHeads.from_config(cfg),
            "recognizer": recognizer,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "masks": cfg.MODEL.MASK_ON,
            "refine": node.BOXES == "refined",
            "box_score": node.BOX_SCORE,
            "box_nms_thresh": node.BOX_NMS_THRESH,
            "top_k_proposals": cfg.MODEL.REGIONSPOT.PROPOSALS.TOP_K,
            "host": host,
            "host_vocabulary": host_vocabulary,
            "host_aliases": read_aliases(node.HOST_ALIASES, host_vocabulary or []) if node.HOST_ALIASES else None,
            "merge_nms_thresh": node.MERGE_NMS_THRESH,
            "freeze": node.FREEZE_HOST,
        }

    def set_vocabulary(self, names: str | Sequence[str], key: str = "default") -> None:
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
            features: of the host's backbone; for its own heads only.
            proposals: B ``Instances`` with ``proposal_boxes`` (XYXY in the pixels of the images) and, optionally,
                ``objectness_logits`` or ``scores``.
            targets: in training, B ``Instances`` with ``gt_boxes`` and ``gt_classes``.

        Returns:
            In training the sampled regions and ``{"loss_regionspot": scalar}`` (and the losses of the host's own heads,
            if they learn, too); else detections as ``RegionRecognizer.forward`` gives them, and {}.

        Raises:
            ValueError: boxes that name no region, or a class outside the vocabulary.
        """
        if self.training:
            if targets is None:
                raise ValueError("training needs annotated 'instances' with the images, got none")
            return self._losses(images, features, proposals, targets)
        with torch.no_grad():
            return self._detect(self._original_images(images), features, proposals), {}

    def forward_with_given_boxes(self, features: dict[str, torch.Tensor], instances: list[Instances]) -> None:
        """Refused: SAM's masks need the images, which Detectron2 does not give here."""
        raise NotImplementedError(
            "RegionSpotROIHeads gives masks with its detections; it cannot add them to instances without the images"
        )

    def _original_images(self, images: ImageList) -> list[torch.Tensor]:
        """Return the (3, H, W) uint8 RGB images that the host was given, on the CPU: what the other ways in get."""
        originals = []
        for normalized, (height, width) in zip(images.tensor, images.image_sizes):
            pixels = normalized[:, :height, :width].float() * self.pixel_std + self.pixel_mean
            image = pixels.round().clamp(0, 255).to("cpu", torch.uint8)
            originals.append(image if self.input_format == "RGB" else image.flip(0))
        return originals

    def _regions(
        self, features: dict[str, torch.Tensor], proposals: list[Instances]
    ) -> tuple[list[Boxes], list[torch.Tensor | None]]:
        """Return the boxes to recognize and their scores."""
        for i, given in enumerate(proposals):
            check_boxes(given.proposal_boxes.tensor, given.image_size, f"proposals of image {i} of the batch")
        if self.refine:
            proposals = self._refined(features, proposals)
        best = [read_proposals(given, self.top_k_proposals, self.box_nms_thresh) for given in proposals]
        return [boxes for boxes, _ in best], [scores for _, scores in best]

    def _refined(self, features: dict[str, torch.Tensor], proposals: list[Instances]) -> list[Instances]:
        """Return proposals that the host's box regression has moved, with the scores that are asked for."""
        assert self.host is not None
        results = []
        for given, (boxes, foreground) in zip(proposals, refine_boxes(self.host, features, proposals)):
            refined = Instances(given.image_size, proposal_boxes=boxes)
            if self.box_score == "foreground":
                refined.scores = foreground
            elif (objectness := read_proposals(given)[1]) is not None:
                refined.scores = objectness
            results.append(refined[boxes.nonempty()])
        return results

    def _detect(
        self, images: list[torch.Tensor], features: dict[str, torch.Tensor], proposals: list[Instances]
    ) -> list[Instances]:
        boxes, scores = self._regions(features, proposals)
        masks = "lazy" if self.masks else ""
        if not self.host_vocabulary:
            return self.recognizer(images, boxes, scores, masks=masks)
        assert self.host is not None
        found, _ = self.host(None, features, proposals)  # no image: the heads that there are do not look at it
        matches = torch.tensor(match_names(self.host_vocabulary, self.recognizer.vocabulary, self.host_aliases))
        known = [_renamed(detections, matches) for detections in found]
        others = ~torch.isin(torch.arange(len(self.recognizer.vocabulary)), matches)
        encoded = self.recognizer.encode_images(images)
        named = self.recognizer.recognize(images, boxes, scores, None, masks, others, encoded)
        prompts = [Prompts(boxes=detections.pred_boxes.tensor) for detections in known]
        located = self.recognizer.locate(encoded, prompts, with_masks=True) if masks else [None] * len(known)
        return [self._merge(ours, theirs, more) for (ours, _), theirs, more in zip(named, known, located)]

    def _merge(self, ours: Instances, theirs: Instances, located: LocalizerOutput | None) -> Instances:
        """Merge by score; the boxes of the host's detections are regions behind ours."""
        masks: RegionMasks | None = ours.get_fields().pop("pred_masks", None)
        first = len(masks.logits) if masks is not None else 0
        theirs.region_indices = first + torch.arange(len(theirs), device=theirs.scores.device)
        merged = merge_detections(ours, theirs, self.merge_nms_thresh, self.recognizer.rule.top_k)
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
        key = TRAINING if TRAINING in self.recognizer.classifier.vocabularies else ""
        self.num_classes = len(self.recognizer.classifier.get_names(key))  # which is what background is called
        learning = None if self.frozen else self.host
        if learning is not None and learning.num_classes != self.num_classes:
            raise ValueError(
                f"MODEL.ROI_HEADS.NUM_CLASSES: a host that learns needs the data set's {self.num_classes} classes, got "
                f"{learning.num_classes}; or set MODEL.REGIONSPOT.HEAD.FREEZE_HOST True"
            )
        for i, target in enumerate(targets):
            check_classes(target.gt_classes, self.num_classes, f"image {i} of the batch")
            check_boxes(target.gt_boxes.tensor, target.image_size, f"annotated boxes of image {i} of the batch")
        sampled = self.label_and_sample_proposals(proposals, targets)
        regions = [x[x.gt_classes != self.num_classes] for x in sampled]
        pictures = self._original_images(images)
        tokens = self.recognizer.position_tokens(pictures, [x.proposal_boxes for x in regions])
        feature_map = self.recognizer.vision_language.encode_images(pictures)
        classes = [x.gt_classes for x in regions]
        losses = self.recognizer.losses(tokens, feature_map, classes, [key] * len(regions))
        losses = {"loss_regionspot": losses["loss_cls"]}
        if learning is not None:
            losses.update(learning(images, features, proposals, targets)[1])
        return regions, losses


def _renamed(detections: Instances, matches: torch.Tensor) -> Instances:
    """Return the host's detections with the class indices that (K,) ``matches`` has for its, without those of -1."""
    classes = matches.to(detections.pred_classes.device)[detections.pred_classes]
    renamed = Instances(detections.image_size, pred_boxes=detections.pred_boxes, scores=detections.scores)
    renamed.pred_classes = classes
    return renamed[(classes >= 0) & renamed.pred_boxes.nonempty()]


def _add_vocabularies(recognizer: RegionRecognizer, cfg: CfgNode) -> None:
    """Set the names of the data sets, to be encoded when they are first needed."""
    if names := _names(cfg.DATASETS.TRAIN):
        recognizer.classifier.add(TRAINING, names)
    if not recognizer.classifier.active and (names := _names(cfg.DATASETS.TEST)):
        recognizer.classifier.add("default", names)
        recognizer.classifier.active = "default"


def _names(datasets: Sequence[str]) -> list[str]:
    """Return the class names of the first of the data sets, none where its files are not here."""
    if not datasets:
        return []
    json_file = MetadataCatalog.get(datasets[0]).get("json_file")
    if json_file and not MetadataCatalog.get(datasets[0]).get("thing_classes") and not Path(json_file).is_file():
        return []
    return dataset_names(datasets[0])


def _to_our_keys(head: RegionSpotROIHeads, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    if head.host is None:
        return
    tails = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    theirs = [tail for tail in tails if not tail.startswith(("recognizer.", "host."))]
    expected = head.host.state_dict().keys()
    if theirs and not any(tail in expected for tail in theirs):
        raise ValueError(
            f"the checkpoint has ROI heads of another kind than MODEL.REGIONSPOT.HEAD.HOST: expected keys such as "
            f"{prefix}{next(iter(expected))}, got {prefix}{theirs[0]}; set HOST to the kind that the host had itself"
        )
    for tail in theirs:
        state[f"{prefix}host.{tail}"] = state.pop(prefix + tail)


def _to_host_keys(head: RegionSpotROIHeads, state: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}host.")]:
        state[prefix + key.removeprefix(f"{prefix}host.")] = state.pop(key)


def _forgive_loaded_parts(head: RegionSpotROIHeads, keys: nn.modules.module._IncompatibleKeys) -> None:
    """Do not report parts that a host's checkpoint has nothing of and that have weights of their own."""
    expected = head.recognizer.state_dict()
    for part, prefix in PARTS.items():
        if not head.recognizer.weight_sources[part]:
            continue
        marker = "recognizer." + prefix
        missing = {key for key in keys.missing_keys if marker in key}
        if len(missing) == sum(key.startswith(prefix) for key in expected):
            keys.missing_keys[:] = [key for key in keys.missing_keys if key not in missing]
