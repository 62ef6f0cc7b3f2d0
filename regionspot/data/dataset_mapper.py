"""From a data set's record to the model's input."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou

from regionspot.data.box_jitter import check_strength, jitter_boxes
from regionspot.data.proposals import ProposalFile
from regionspot.data.store_coverage import check_coverage, check_match_iou
from regionspot.data.tokens import TokenStore
from regionspot.structures import MIN_SIDE
from regionspot.utils.images import check_deep_range, decode_image

_BLANK_SIZE = (32, 32)  # (height, width) of images in place of unreadable ones


class UnreadableImageError(ValueError):
    """The image of a record is missing, damaged, or of another size than its annotations say."""


class RegionSpotDatasetMapper:
    """Detectron2's mapper for regions. Test images keep their annotated boxes, which are the default proposals."""

    @configurable
    def __init__(
        self,
        *,
        augmentations: list[T.Augmentation],
        image_format: str,
        token_store: TokenStore | None = None,
        proposal_file: ProposalFile | None = None,
        vocabulary: str = "",
        reduced_size: int = 0,
        match_iou: float = 0.0,
        deep_range: Sequence[float] = (),
        blank_unreadable: bool = False,
        box_jitter: float = 0.0,
    ) -> None:
        """
        Args:
            augmentations: applied to image and boxes alike.
            image_format: "RGB" or "BGR".
            token_store: stored features of the boxes to learn from; the only augmentation is then the horizontal flip,
                if the store has it.
            proposal_file: boxes to recognize instead of the annotated ones; in training, additional boxes.
            vocabulary: key of the vocabulary that the regions are scored against, "" for the current one.
            reduced_size: see ``decode_image``. For stored tokens only: SAM needs the whole image.
            match_iou: in training, a proposal of at least this IoU with an annotated box is a region of its class.
            deep_range: see ``decode_image``.
            blank_unreadable: replace an unreadable image by a black one without boxes, with the reason as
                ``unreadable``.
            box_jitter: in training, the strength of the errors by which boxes are moved, see ``jitter_boxes``; with
                stored tokens, those of one of the stored copies are taken instead.

        Raises:
            ValueError: augmentations, proposals or a jitter that the stored tokens do not cover.
        """
        check_strength(box_jitter, "INPUT.BOX_JITTER")
        if token_store is not None:
            check_coverage(token_store, augmentations, box_jitter, proposal_file, match_iou)
        elif reduced_size:
            raise ValueError("INPUT.REDUCED_JPEG needs stored tokens (DATASETS.TOKEN_STORES_TRAIN): SAM sees the image")
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.token_store = token_store
        self.proposal_file = proposal_file
        self.vocabulary = vocabulary
        self.reduced_size = reduced_size
        self.match_iou = match_iou
        self.adds_proposals = proposal_file is not None and match_iou > 0
        self.deep_range = check_deep_range(deep_range)
        self.blank_unreadable = blank_unreadable
        self.box_jitter = box_jitter

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        is_train: bool = True,
        token_store: TokenStore | None = None,
        proposal_file: ProposalFile | None = None,
        vocabulary: str = "",
    ) -> dict:
        if is_train and proposal_file is not None:
            check_match_iou(cfg.MODEL.REGIONSPOT.PROPOSALS.IOU_THRESH_TRAIN)
        augmentations = utils.build_augmentation(cfg, is_train)
        if is_train and cfg.INPUT.CROP.ENABLED:
            augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
        return {
            # A shortest edge of 0 does not resize; stored tokens require that nothing does.
            "augmentations": [a for a in augmentations if not _is_identity(a)],
            "image_format": cfg.INPUT.FORMAT,
            "token_store": token_store,
            "proposal_file": proposal_file,
            "vocabulary": vocabulary,
            "reduced_size": cfg.INPUT.REDUCED_JPEG if is_train else 0,
            "match_iou": cfg.MODEL.REGIONSPOT.PROPOSALS.IOU_THRESH_TRAIN if is_train else 0.0,
            "deep_range": cfg.INPUT.DEEP_RANGE,
            "blank_unreadable": cfg.DATALOADER.SKIP_UNREADABLE and not is_train,  # training takes another image
            "box_jitter": cfg.INPUT.BOX_JITTER if is_train else 0.0,
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Read an image, augment it, and map its boxes to the augmented image.

        Args:
            record: Detectron2's standard record.

        Returns:
            The record without ``annotations`` and with ``image`` ((3, H, W) uint8) and ``instances`` (``gt_boxes``,
            XYXY in the pixels of ``image``, and ``gt_classes``), without crowds and boxes without area. A proposal
            file adds ``proposals``, a token store ``tokens`` and, if it has feature maps, ``feature_map`` instead of
            ``image``, a vocabulary's key ``vocabulary``.

        Raises:
            UnreadableImageError: the image is missing, damaged, or of another size than the record says.
        """
        try:
            return self._map(copy.copy(record))
        except UnreadableImageError as error:
            if not self.blank_unreadable:
                raise
            return self._blank(record, str(error))

    def _map(self, record: dict[str, Any]) -> dict[str, Any]:
        # 1. The annotated boxes, (n, 4) XYXY in the original image.
        boxes, classes = read_annotations(record)
        record.pop("annotations", None)

        # 2. The image. Stored feature maps replace it; augmentations are then drawn for its size alone.
        needs_image = self.token_store is None or not self.token_store.has_feature_maps
        if needs_image:
            inputs = T.AugInput(self.read_image(record))
        else:  # a broadcast zero takes no memory
            inputs = T.AugInput(np.broadcast_to(np.uint8(0), (record["height"], record["width"], 3)))
        transforms = self.augmentations(inputs)
        size = inputs.image.shape[:2]  # of the model's input
        if needs_image:
            record["image"] = torch.as_tensor(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))

        # 3. What depends on the boxes in the original image, clipped and not augmented, as extraction has them.
        tokens = {}
        if self.token_store is not None or self.box_jitter or self.adds_proposals:
            is_flipped = sum(isinstance(transform, T.HFlipTransform) for transform in transforms.transforms) % 2 == 1
            boxes, classes = self._learned_regions(record, boxes, classes, is_flipped)
        if self.token_store is not None:
            tokens = {"tokens": record["tokens"]}
            if needs_image:  # a JPEG may have been decoded at a smaller size
                boxes *= np.tile([size[1] / record["width"], size[0] / record["height"]], 2)

        # 4. Boxes in the model's input. One thinner than a rounding error may lose its area when it is flipped: its
        #    token goes with it.
        instances = _to_instances(transforms.apply_box(boxes), classes, size, **tokens)
        if tokens:
            record["tokens"] = instances.tokens
            instances.remove("tokens")
        record["instances"] = instances

        # 5. Boxes to recognize at test time.
        if self.proposal_file is not None and not self.adds_proposals:
            record["proposals"] = self._read_proposals(record, transforms, size)

        # 6. The names that the classes belong to, where data sets with different ones are mixed.
        if self.vocabulary:
            record["vocabulary"] = self.vocabulary
        return record

    def _learned_regions(
        self, record: dict[str, Any], boxes: np.ndarray, classes: np.ndarray, is_flipped: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the boxes (n, 4) and classes (n,) to learn from; stored features of them are added to the record."""
        size = (record["height"], record["width"])
        regions = _to_instances(boxes, classes, size)
        if self.adds_proposals:
            assert self.proposal_file is not None
            proposals = self.proposal_file.get(record["image_id"], size)
            regions = _add_matched(regions, proposals.proposal_boxes, self.match_iou)
        learned = regions.gt_boxes.tensor  # (n, 4) float32 XYXY in the original image
        if self.token_store is not None:
            copies = None
            if self.box_jitter:  # 0 is the box itself; the same copy for all stages of a region
                copies = torch.from_numpy(np.random.randint(self.token_store.num_copies + 1, size=len(learned)))
            features = self.token_store.get(record["image_id"], learned, is_flipped, copies)
            learned = features.pop("boxes", learned)
            record.update(features)
        elif self.box_jitter:
            # NumPy's global generator, which the augmentations draw from, too
            rng = np.random.default_rng(np.random.randint(2**32, dtype=np.uint32))
            learned = torch.from_numpy(jitter_boxes(learned.numpy(), size, self.box_jitter, rng))
        return learned.numpy().astype(float), regions.gt_classes.numpy()

    def _read_proposals(self, record: dict[str, Any], transforms: T.TransformList, size: tuple[int, int]) -> Instances:
        original = self.proposal_file.get(record["image_id"], (record["height"], record["width"]))  # type: ignore[union-attr]
        boxes = Boxes(transforms.apply_box(original.proposal_boxes.tensor.numpy()))
        proposals = Instances(tuple(size), **{**original.get_fields(), "proposal_boxes": boxes})
        return proposals[boxes.nonempty()]

    def _blank(self, record: dict[str, Any], reason: str) -> dict[str, Any]:
        no_boxes, none = Boxes(torch.zeros(0, 4)), torch.zeros(0)
        blank = {key: value for key, value in record.items() if key != "annotations"}
        blank.update(image=torch.zeros(3, *_BLANK_SIZE, dtype=torch.uint8), unreadable=reason)
        blank["instances"] = Instances(_BLANK_SIZE, gt_boxes=no_boxes, gt_classes=none.long())
        if self.proposal_file is not None:
            blank["proposals"] = Instances(_BLANK_SIZE, proposal_boxes=no_boxes, objectness_logits=none)
        if self.vocabulary:
            blank["vocabulary"] = self.vocabulary
        return blank

    def read_image(self, record: dict[str, Any]) -> np.ndarray:
        """Return the (H, W, 3) uint8 image of a record; ``UnreadableImageError`` if it cannot be read."""
        try:
            image, size = decode_image(record["file_name"], self.image_format, self.reduced_size, self.deep_range)
            # of the whole image, which takes no memory as a broadcast zero
            utils.check_image_size(record, np.broadcast_to(np.uint8(0), size))
        except (OSError, ValueError, utils.SizeMismatchError) as error:
            raise UnreadableImageError(f"{error} (image id {record.get('image_id')})") from error
        return image


def _is_identity(augmentation: T.Augmentation) -> bool:
    return isinstance(augmentation, T.ResizeShortestEdge) and tuple(augmentation.short_edge_length) in ((0,), (0, 0))


def annotated_regions(record: dict[str, Any]) -> Instances:
    """Return the regions of a record to learn from: ``gt_boxes`` (original pixels) and ``gt_classes``."""
    return _to_instances(*read_annotations(record), (record["height"], record["width"]))


def read_annotations(record: dict[str, Any], with_crowds: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes (n, 4) float64 XYXY and classes (n,) int64 of a record's annotations."""
    annotations = [a for a in record.get("annotations", []) if with_crowds or not a.get("iscrowd", 0)]
    classes = np.array([annotation["category_id"] for annotation in annotations], dtype=np.int64)
    # float32 first, as in Detectron2 and JsonDataset: the same file gives the same bits, whoever reads it
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float32).astype(float).reshape(-1, 4)
    modes = np.array([annotation["bbox_mode"] for annotation in annotations])
    for mode in set(modes.tolist()):
        boxes[modes == mode] = BoxMode.convert(boxes[modes == mode], BoxMode(mode), BoxMode.XYXY_ABS)
    return boxes, classes


def _to_instances(boxes: np.ndarray, classes: np.ndarray, size: tuple[int, int], **fields: torch.Tensor) -> Instances:
    """Return boxes clipped to an image of (height, width), with classes and fields; those without area are dropped."""
    instances = Instances(size, gt_boxes=Boxes(torch.as_tensor(boxes)), gt_classes=torch.as_tensor(classes), **fields)
    instances.gt_boxes.clip(size)
    return instances[instances.gt_boxes.nonempty(threshold=MIN_SIDE)]


def _add_matched(instances: Instances, proposals: Boxes, match_iou: float) -> Instances:
    """Return annotated regions followed by the proposals that match one, with its class."""
    proposals = proposals[proposals.nonempty(threshold=MIN_SIDE)]  # as of annotated boxes
    if not len(instances) or not len(proposals):
        return instances
    best, index = pairwise_iou(instances.gt_boxes, proposals).max(dim=0)
    matched = Instances(instances.image_size, gt_boxes=proposals, gt_classes=instances.gt_classes[index])
    return Instances.cat([instances, matched[best >= match_iou]])
