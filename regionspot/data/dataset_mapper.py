"""From a data set's record to the model's input."""

import copy
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from regionspot.utils.images import read_image


class RegionSpotDatasetMapper:
    """Detectron2's mapper for regions: it keeps the annotated boxes at test time, too, where they are the proposals."""

    @configurable
    def __init__(self, *, augmentations: list[T.Augmentation], image_format: str) -> None:
        """
        Args:
            augmentations: applied to image and boxes alike.
            image_format: "RGB" or "BGR".
        """
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        return {"augmentations": utils.build_augmentation(cfg, is_train), "image_format": cfg.INPUT.FORMAT}

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Read the image and bring its boxes into the image's frame.

        Args:
            record: Detectron2's standard record.

        Returns:
            The record with ``image`` ((3, H, W) uint8) and ``instances`` (``gt_boxes``, XYXY in the pixels of
            ``image``, and ``gt_classes``), and without ``annotations``. Crowds and boxes without area are left out.

        Raises:
            ValueError: the image is missing, damaged, or of another size than the record says.
        """
        record = copy.deepcopy(record)
        inputs = T.AugInput(self._read(record))
        transforms = self.augmentations(inputs)
        size = inputs.image.shape[:2]
        record["image"] = torch.as_tensor(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        annotations = [
            utils.transform_instance_annotations(annotation, transforms, size)
            for annotation in record.pop("annotations", [])
            if not annotation.get("iscrowd", 0)
        ]
        for annotation in annotations:
            annotation.pop("segmentation", None)  # masks come from SAM
        record["instances"] = utils.filter_empty_instances(utils.annotations_to_instances(annotations, size))
        return record

    def _read(self, record: dict[str, Any]) -> np.ndarray:
        try:
            image = read_image(record["file_name"], self.image_format)
            utils.check_image_size(record, image)
        except (OSError, ValueError, utils.SizeMismatchError) as error:
            raise ValueError(f"{error} (image id {record.get('image_id')})") from error
        return image
