"""Data sets of COCO or LVIS JSON, with class names and ids from the file itself."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from torch.utils.data import Dataset

from regionspot.data.coco_io import AnnotationFile
from regionspot.data.datasets.categories import category_ids
from regionspot.structures import has_area

_CHUNK = 1 << 20  # boxes that are processed at a time, to bound memory


class JsonDataset(Dataset):
    """Detectron2's standard records of an annotation file, built on demand from arrays.

    25 M boxes of 2.5 M images take 0.8 GB, which forked loader processes share. Category ids may be any integers:
    sorted, they become the classes 0, 1, 2, ...

    Attributes:
        image_ids: (I,) int64.
        heights, widths: (I,) int32, pixels.
        offsets: (I + 1,) int64; annotations ``offsets[i]:offsets[i + 1]`` are those of image ``i``, in file order.
        boxes: (M, 4) float32 XYWH in the original image's pixels, as in the file.
        labels: (M,) int32 contiguous classes.
        crowd: (M,) bool.
        num_regions: (I,) int32, the number of each image's annotations that are not crowds and have area inside it.
        num_crowd: number of crowds in all images.
        num_degenerate: number of other annotations that have no area inside their image.
        class_names: by contiguous class.
        id_mapping: category id of the file -> contiguous class, in the order of the ids.
        evaluator_type: "lvis" if all categories have a frequency and all images ``neg_category_ids``, else "coco".
    """

    def __init__(self, json_file: str | Path, image_root: str | Path, *, keep_parts: int | None = None) -> None:
        """Read a file; for the arguments see ``register_json_dataset``.

        Raises:
            FileNotFoundError: no such annotation file.
            ValueError: not COCO or LVIS JSON, or an invalid entry; it names the place.
        """
        file = AnnotationFile(json_file)
        images, annotations = file.images, file.annotations()
        self.image_root, self.keep_parts = str(image_root), keep_parts
        self.image_ids, self.heights, self.widths = images.ids, images.heights, images.widths
        # File names stay bytes in one array: forked workers would copy Python strings when they count references.
        self._names, self._name_ends = images.names, images.name_ends
        unnamed = np.diff(images.name_ends) == 0
        if unnamed.any():
            raise ValueError(f"{file.name}: image {images.ids[unnamed.argmax()]} has neither file_name nor coco_url")
        self.class_names = [category.class_name for category in file.categories]
        self.id_mapping = {category.id: label for label, category in enumerate(file.categories)}
        self.evaluator_type = "lvis" if file.is_lvis else "coco"

        rows = annotations.images
        self.boxes, self.labels, self.crowd = annotations.boxes, annotations.labels, annotations.crowd
        if (np.diff(rows) < 0).any():  # most files are sorted by image already
            order = np.argsort(rows, kind="stable")
            rows, self.boxes = rows[order], self.boxes[order]
            self.labels, self.crowd = self.labels[order], self.crowd[order]
        num_images = len(self.image_ids)
        self.offsets = np.concatenate([[0], np.bincount(rows, minlength=num_images).cumsum()]).astype(np.int64)

        # Clipped to the image: official files have boxes that are wholly outside.
        is_region = self._has_area(rows) & ~self.crowd
        self.num_regions = np.bincount(rows[is_region], minlength=num_images).astype(np.int32)
        self.num_crowd = int(self.crowd.sum())
        self.num_degenerate = len(rows) - self.num_crowd - int(is_region.sum())

    def _has_area(self, rows: np.ndarray) -> np.ndarray:
        """Return (M,) bool: the box, clipped to its image, is not empty."""
        result = np.empty(len(rows), bool)
        for start in range(0, len(rows), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            boxes = self.boxes[chunk].copy()
            # XYXY, added in float32 as BoxMode.convert does with the record's box
            boxes[:, 2:] += boxes[:, :2]
            sizes = np.stack([self.heights[rows[chunk]], self.widths[rows[chunk]]], axis=1)
            result[chunk] = has_area(boxes, sizes)
        return result

    def __len__(self) -> int:
        return len(self.image_ids)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def file_name(self, index: int) -> str:
        """Return the path of the ``index``-th image."""
        name = self._names[self._name_ends[index] : self._name_ends[index + 1]].tobytes().decode()
        if self.keep_parts is not None:
            name = "/".join(name.split("/")[-self.keep_parts :])
        return str(Path(self.image_root, name))

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]  # negative indices count from the end; raises IndexError
        rows = slice(self.offsets[index], self.offsets[index + 1])
        # tolist(): Detectron2's records have Python numbers, which are also pickled in less space
        columns = (self.boxes[rows].tolist(), self.labels[rows].tolist(), self.crowd[rows].tolist())
        return {
            "file_name": self.file_name(index),
            "image_id": int(self.image_ids[index]),
            "height": int(self.heights[index]),
            "width": int(self.widths[index]),
            "annotations": [
                {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": label, "iscrowd": int(crowd)}
                for box, label, crowd in zip(*columns)
            ],
        }


def load_json_dataset(
    name: str, json_file: str | Path, image_root: str | Path, *, keep_parts: int | None = None
) -> JsonDataset:
    """Read a data set, and set class names, id mapping and, if it has none, the evaluator in its metadata."""
    dataset = JsonDataset(json_file, image_root, keep_parts=keep_parts)
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes"):
        category_ids(name)  # its error names the first class that differs, which Detectron2's assertion does not
    metadata.set(thing_classes=dataset.class_names, thing_dataset_id_to_contiguous_id=dataset.id_mapping)
    if metadata.get("evaluator_type") is None:
        metadata.set(evaluator_type=dataset.evaluator_type)
    return dataset
