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

from regionspot.data.proposals import ProposalFile
from regionspot.data.tokens import TokenStore
from regionspot.utils.images import check_deep_range, decode_image

_BLANK_SIZE = (32, 32)


class UnreadableImageError(ValueError):
    """The image of a record is missing, damaged, or of another size than its annotations say."""


class RegionSpotDatasetMapper:
    """Detectron2's mapper for regions: it keeps the annotated boxes at test time, too, where they are the proposals."""

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
    ) -> None:
        """
        Args:
            augmentations: applied to image and boxes alike.
            image_format: "RGB" or "BGR".
            token_store: stored features of the annotated boxes; images are then flipped from left to right only, and
                only if the store covers that.
            proposal_file: boxes to recognize in place of the annotated ones; in training, boxes to learn from beside
                them.
            vocabulary: key of the vocabulary that the regions are scored against, "" for the one in use.
            reduced_size: let a JPEG be decoded at a smaller size whose shorter side is at least this; 0 does not. For
                stored tokens only: SAM needs the whole image.
            match_iou: in training, a proposal of at least this IoU with an annotated box is a region of its class.
            deep_range: values that become 0 and 255 in an image of more than 8 bits a channel, see ``decode_image``.
            blank_unreadable: of an image that cannot be read give a black one without boxes, and ``unreadable``, why.

        Raises:
            ValueError: augmentations, or proposals, that the stored tokens do not cover.
        """
        if token_store is not None and proposal_file is not None:
            raise ValueError("stored tokens are of annotated boxes: leave out them, or PROPOSAL_FILES_TRAIN")
        if token_store is not None:
            _check_coverage(augmentations, token_store)
        elif reduced_size:
            raise ValueError("INPUT.REDUCED_JPEG needs stored tokens (DATASETS.TOKEN_STORES_TRAIN): SAM sees the image")
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.token_store = token_store
        self.proposal_file = proposal_file
        self.vocabulary = vocabulary
        self.reduced_size = reduced_size
        self.match_iou = match_iou
        self.deep_range = check_deep_range(deep_range)
        self.blank_unreadable = blank_unreadable

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        is_train: bool = True,
        token_store: TokenStore | None = None,
        proposal_file: ProposalFile | None = None,
        vocabulary: str = "",
    ) -> dict:
        augmentations = utils.build_augmentation(cfg, is_train)
        if is_train and cfg.INPUT.CROP.ENABLED:
            augmentations.insert(0, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
        return {
            # a shortest edge of 0 leaves the image as it is, and is no augmentation
            "augmentations": [a for a in augmentations if not _is_identity(a)],
            "image_format": cfg.INPUT.FORMAT,
            "token_store": token_store,
            "proposal_file": proposal_file,
            "vocabulary": vocabulary,
            "reduced_size": cfg.INPUT.REDUCED_JPEG if is_train else 0,
            "match_iou": cfg.MODEL.REGIONSPOT.PROPOSALS.IOU_THRESH_TRAIN if is_train else 0.0,
            "deep_range": cfg.INPUT.DEEP_RANGE,
            "blank_unreadable": cfg.DATALOADER.SKIP_UNREADABLE and not is_train,  # training takes another image
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Read the image and bring its boxes into the image's frame.

        Args:
            record: Detectron2's standard record.

        Returns:
            The record with ``image`` ((3, H, W) uint8) and ``instances`` (``gt_boxes``, XYXY in the pixels of
            ``image``, and ``gt_classes``), and without ``annotations``. Crowds and boxes without area are left out.
            With a proposal file also ``proposals``; with a token store ``tokens`` and, where the store has feature
            maps, ``feature_map`` in place of ``image``; with a key also ``vocabulary``.

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
        boxes, classes = read_annotations(record)
        record.pop("annotations", None)
        with_image = self.token_store is None or not self.token_store.has_feature_maps
        inputs = T.AugInput(self.read_image(record) if with_image else _placeholder(record))
        transforms = self.augmentations(inputs)
        size = inputs.image.shape[:2]
        if with_image:
            record["image"] = torch.as_tensor(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        if self.token_store is not None:
            flips = sum(isinstance(t, T.HFlipTransform) for t in transforms.transforms)
            kept = _to_instances(boxes, classes, (record["height"], record["width"]))
            record.update(self.token_store.get(record["image_id"], kept.gt_boxes.tensor, bool(flips % 2)))
            boxes, classes = kept.gt_boxes.tensor.numpy().astype(float), kept.gt_classes.numpy()
            if with_image:  # which may have been decoded at a smaller size
                boxes *= np.tile([size[1] / record["width"], size[0] / record["height"]], 2)
        # a box that is less than a rounding error wide may have no area when it is flipped: then its token goes, too
        tokens = {"tokens": record["tokens"]} if self.token_store is not None else {}
        record["instances"] = _to_instances(transforms.apply_box(boxes), classes, size, **tokens)
        if tokens:
            record["tokens"] = record["instances"].tokens
            record["instances"].remove("tokens")
        if self.proposal_file is not None:
            proposals = self.proposal_file.get(record["image_id"], (record["height"], record["width"]))
            proposals._image_size = tuple(size)
            proposals.proposal_boxes = Boxes(transforms.apply_box(proposals.proposal_boxes.tensor.numpy()))
            proposals = proposals[proposals.proposal_boxes.nonempty()]
            if self.match_iou:
                record["instances"] = _add_matched(record["instances"], proposals.proposal_boxes, self.match_iou)
            else:
                record["proposals"] = proposals
        if self.vocabulary:
            record["vocabulary"] = self.vocabulary
        return record

    def _blank(self, record: dict[str, Any], reason: str) -> dict[str, Any]:
        record = {key: value for key, value in record.items() if key != "annotations"}
        size, none = _BLANK_SIZE, torch.zeros(0)
        record.update(image=torch.zeros(3, *size, dtype=torch.uint8), unreadable=reason)
        record["instances"] = Instances(size, gt_boxes=Boxes(none.reshape(0, 4)), gt_classes=none.long())
        if self.proposal_file is not None:
            record["proposals"] = Instances(size, proposal_boxes=Boxes(none.reshape(0, 4)), objectness_logits=none)
        if self.vocabulary:
            record["vocabulary"] = self.vocabulary
        return record

    def read_image(self, record: dict[str, Any]) -> np.ndarray:
        """Return the (H, W, 3) uint8 image of a record; ``UnreadableImageError`` if it cannot be read."""
        try:
            image, size = decode_image(record["file_name"], self.image_format, self.reduced_size, self.deep_range)
            utils.check_image_size(record, np.broadcast_to(np.uint8(0), size))
        except (OSError, ValueError, utils.SizeMismatchError) as error:
            raise UnreadableImageError(f"{error} (image id {record.get('image_id')})") from error
        return image


def _is_identity(augmentation: T.Augmentation) -> bool:
    return isinstance(augmentation, T.ResizeShortestEdge) and tuple(augmentation.short_edge_length) in ((0,), (0, 0))


def _check_coverage(augmentations: list[T.Augmentation], store: TokenStore) -> None:
    covered = "no augmentation"
    if store.has_flips:
        covered = "the flip from left to right only"
        augmentations = [a for a in augmentations if not (isinstance(a, T.RandomFlip) and a.horizontal)]
    if augmentations:
        names = ", ".join(type(augmentation).__name__ for augmentation in augmentations)
        raise ValueError(
            f"token store {store.directory} covers {covered}, but the config asks for {names}: "
            "set INPUT.MIN_SIZE_TRAIN (0,), INPUT.RANDOM_FLIP none (or horizontal, with a store made with --flip) and "
            "INPUT.CROP.ENABLED False, or train without stored tokens"
        )


def _placeholder(record: dict[str, Any]) -> np.ndarray:
    """Return an image of the right size that takes no memory, for augmentations to be drawn by."""
    return np.broadcast_to(np.uint8(0), (record["height"], record["width"], 3))


def annotated_regions(record: dict[str, Any]) -> Instances:
    """Return the regions of a record that are learned from: ``gt_boxes`` in the picture's frame, ``gt_classes``."""
    return _to_instances(*read_annotations(record), (record["height"], record["width"]))


def read_annotations(record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes (n, 4) float64 XYXY and classes (n,) of a record, crowds left out."""
    kept = [annotation for annotation in record.get("annotations", []) if not annotation.get("iscrowd", 0)]
    classes = np.array([annotation["category_id"] for annotation in kept], dtype=np.int64)
    # float32 first, as Detectron2 and JsonDataset have it: the same file gives the same bits, whoever reads it
    boxes = np.array([annotation["bbox"] for annotation in kept], dtype=np.float32).astype(float).reshape(-1, 4)
    modes = np.array([annotation["bbox_mode"] for annotation in kept])
    for mode in set(modes.tolist()):
        boxes[modes == mode] = BoxMode.convert(boxes[modes == mode], BoxMode(mode), BoxMode.XYXY_ABS)
    return boxes, classes


def _to_instances(boxes: np.ndarray, classes: np.ndarray, size: tuple[int, int], **fields: torch.Tensor) -> Instances:
    """Return boxes, cut to an image of (height, width), with classes and fields; those without area are left out."""
    instances = Instances(size, gt_boxes=Boxes(torch.as_tensor(boxes)), gt_classes=torch.as_tensor(classes), **fields)
    instances.gt_boxes.clip(size)
    return instances[instances.gt_boxes.nonempty(threshold=1e-5)]


def _add_matched(instances: Instances, proposals: Boxes, match_iou: float) -> Instances:
    """Return annotated regions and, behind them, the proposals that match one, with its class."""
    if not len(instances) or not len(proposals):
        return instances
    best, index = pairwise_iou(instances.gt_boxes, proposals).max(dim=0)
    matched = Instances(instances.image_size, gt_boxes=proposals, gt_classes=instances.gt_classes[index])
    return Instances.cat([instances, matched[best >= match_iou]])


def has_area(boxes: np.ndarray, size: tuple[int, int]) -> list[bool]:
    """Tell which (n, 4) XYXY boxes have area inside an image of (height, width)."""
    cut = Boxes(torch.as_tensor(boxes))
    cut.clip(size)
    return cut.nonempty(threshold=1e-5).tolist()
