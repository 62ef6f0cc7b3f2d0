"""The images and boxes that an index is built of: files and directories, or an annotated data set."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from regionspot.data.dataset_mapper import read_annotations
from regionspot.prediction.regions import RegionSource, label_directory, open_region_source
from regionspot.prediction.sources import list_images
from regionspot.structures import has_area
from regionspot.utils.fingerprint import fingerprint_of


@dataclass(frozen=True)
class ImageRegions:
    """An image, and its regions if they are known.

    Attributes:
        name: of the image, relative to the root of its ``ImageSet``.
        path: of its file.
        image_id: of an annotation file, or the image's number.
        boxes: (N, 4) float, XYXY, original pixels; None for those that SAM or a detector finds.
        proposal_scores: (N,) in [0, 1], or None.
        keys: (N,) int64, what the regions are called in their source; None for none.
        size: (height, width) of the image that the boxes are of; None if it is not known.
    """

    name: str
    path: Path
    image_id: int
    boxes: np.ndarray | None = None
    proposal_scores: np.ndarray | None = None
    keys: np.ndarray | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order.

    Attributes:
        images: ``ImageRegions``, which may be made when they are asked for.
        root: the directory that names are relative to.
        fingerprint: of the names and boxes, which tells whether an index is of these images.
        has_boxes: whether boxes are known of all images.
        regions: returns the boxes of an image that has none itself, when its size is known; None without.
    """

    images: Sequence[ImageRegions]
    root: Path
    fingerprint: str
    has_boxes: bool
    regions: RegionSource | None = None


def file_images(inputs: Sequence[str], regions: str = "") -> ImageSet:
    """Return the images of files, directories, patterns and lists, as ``prediction.sources.list_images`` finds them.

    Args:
        inputs: see ``list_images``; no videos.
        regions: a file of boxes, in any format of ``open_region_source``; "" for boxes that are to be found.

    Raises:
        FileNotFoundError: no such file, or no image among them.
        ValueError: a video, or a directory that cannot be read.
    """
    records = list_images(inputs)
    if records.skipped:
        raise ValueError(f"--input {records.skipped[0][1]}")
    for record in records:
        if record.frame >= 0:
            raise ValueError(f"--input {record.path}: expected images; regionspot predict takes videos, too")
    paths = list(dict.fromkeys(Path(record.path).absolute() for record in records))
    root = Path(os.path.commonpath([path.parent for path in paths]))
    names = [path.relative_to(root).as_posix() for path in paths]
    images = [ImageRegions(name, path, number) for number, (name, path) in enumerate(zip(names, paths))]
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape"))
    if not regions:
        return ImageSet(images, root, digest.hexdigest(), has_boxes=False)
    source = open_region_source(regions, "")
    digest.update(fingerprint_of(label_directory(regions)).encode())
    return ImageSet(images, root, digest.hexdigest(), has_boxes=True, regions=source)


def dataset_images(name: str, with_boxes: bool = True) -> ImageSet:
    """Return the images of a registered data set, with its annotated boxes that are no crowds and have area.

    The ``keys`` of regions are the positions of their annotations among those of their image.
    """
    records = DatasetCatalog.get(name)
    root = Path(MetadataCatalog.get(name).get("image_root") or ".").absolute()
    images = _DatasetImages(records, root, with_boxes)
    return ImageSet(images, root, images.fingerprint(), with_boxes)


class _DatasetImages(Sequence):
    """Records of a data set as ``ImageRegions``, made when they are asked for."""

    def __init__(self, records: Any, root: Path, with_boxes: bool) -> None:
        self.records, self.root, self.with_boxes = records, root, with_boxes

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        record = self.records[index]
        boxes = keys = size = None
        if self.with_boxes:
            size = (record["height"], record["width"])
            boxes, _ = read_annotations(record, with_crowds=True)
            crowd = np.array([bool(x.get("iscrowd", 0)) for x in record["annotations"]], bool)
            keys = np.flatnonzero(~crowd & has_area(boxes, size))
            boxes = boxes[keys]
        path = Path(record["file_name"]).absolute()
        return ImageRegions(self._name(record), path, int(record["image_id"]), boxes, None, keys, size)

    def _name(self, record: dict[str, Any]) -> str:
        path = Path(record["file_name"]).absolute()
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else str(path)

    def fingerprint(self) -> str:
        """Return the SHA-256 of the images and their boxes; which classes these have does not matter to an index."""
        digest = hashlib.sha256()
        for record in self.records:
            annotations = record.get("annotations", ()) if self.with_boxes else ()
            size = (record.get("height"), record.get("width"))
            digest.update(json.dumps([record["image_id"], self._name(record), *size, len(annotations)]).encode())
            numbers = [(*x["bbox"], x["bbox_mode"], x.get("iscrowd", 0)) for x in annotations]
            digest.update(np.array(numbers, np.float32).tobytes())
        return digest.hexdigest()
