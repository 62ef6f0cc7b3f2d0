"""From a data set's record to the model's input."""

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import Boxes

from regionspot.data.proposals import ProposalFile
from regionspot.data.token_store import TokenStore
from regionspot.utils.images import read_image


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
    ) -> None:
        """
        Args:
            augmentations: applied to image and boxes alike.
            image_format: "RGB" or "BGR".
            token_store: stored features of the annotated boxes; they cover no augmentation.
            proposal_file: boxes to recognise in place of the annotated ones.
        """
        if token_store is not None and not all(isinstance(a, T.ResizeShortestEdge) for a in augmentations):
            raise ValueError("stored tokens cover no augmentation: set INPUT.RANDOM_FLIP none, or train without them")
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.token_store = token_store
        self.proposal_file = proposal_file

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        is_train: bool = True,
        token_store: TokenStore | None = None,
        proposal_file: ProposalFile | None = None,
    ) -> dict:
        if token_store is not None and tuple(cfg.INPUT.MIN_SIZE_TRAIN) != (0,):
            raise ValueError(
                "stored tokens are of unscaled images: set INPUT.MIN_SIZE_TRAIN (0,), or train without them"
            )
        return {
            "augmentations": utils.build_augmentation(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
            "token_store": token_store,
            "proposal_file": proposal_file,
        }

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Read the image and bring its boxes into the image's frame.

        Args:
            record: Detectron2's standard record.

        Returns:
            The record with ``image`` ((3, H, W) uint8) and ``instances`` (``gt_boxes``, XYXY in the pixels of
            ``image``, and ``gt_classes``), and without ``annotations``. Crowds and boxes without area are left out.
            With a proposal file also ``proposals``; with a token store ``tokens`` and, where the store has feature
            maps, ``feature_map`` in place of ``image``.

        Raises:
            ValueError: the image is missing, damaged, or of another size than the record says.
        """
        record = copy.deepcopy(record)
        if self.token_store is not None and self.token_store.feature_maps is not None:
            transforms, size = T.TransformList([T.NoOpTransform()]), (record["height"], record["width"])
        else:
            inputs = T.AugInput(self._read(record))
            transforms = self.augmentations(inputs)
            size = inputs.image.shape[:2]
            record["image"] = torch.as_tensor(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        record["instances"] = self._instances(record.pop("annotations", []), transforms, size)
        if self.token_store is not None:
            record.update(self.token_store.get(record["image_id"], record["instances"].gt_boxes.tensor))
        if self.proposal_file is not None:
            proposals = self.proposal_file.get(record["image_id"], (record["height"], record["width"]))
            proposals._image_size = tuple(size)
            proposals.proposal_boxes = Boxes(transforms.apply_box(proposals.proposal_boxes.tensor.numpy()))
            record["proposals"] = proposals
        return record

    @staticmethod
    def _instances(annotations: list[dict[str, Any]], transforms: T.TransformList, size: tuple[int, int]) -> Any:
        kept = []
        for annotation in annotations:
            if not annotation.get("iscrowd", 0):
                annotation.pop("segmentation", None)  # masks come from SAM
                kept.append(utils.transform_instance_annotations(annotation, transforms, size))
        return utils.filter_empty_instances(utils.annotations_to_instances(kept, size))

    def _read(self, record: dict[str, Any]) -> np.ndarray:
        try:
            image = read_image(record["file_name"], self.image_format)
            utils.check_image_size(record, image)
        except (OSError, ValueError, utils.SizeMismatchError) as error:
            raise ValueError(f"{error} (image id {record.get('image_id')})") from error
        return image
