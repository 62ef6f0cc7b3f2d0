"""Data sets whose annotations are COCO or LVIS JSON, with class names and ids taken from the file itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from torch.utils.data import Dataset

from regionspot.data.datasets.categories import category_ids
from regionspot.data.datasets.json_file import AnnotationEntry, CategoryEntry, ImageEntry, JsonFile

_MIN_SIDE = 1e-5  # pixels; Detectron2's filter of empty boxes drops those below


@dataclass(frozen=True)
class _Images:
    """``images`` of a file as columns, in the file's order."""

    ids: np.ndarray  # (I,) int64
    heights: np.ndarray  # (I,) int32
    widths: np.ndarray  # (I,) int32
    names: np.ndarray  # uint8: all file names in UTF-8, one after the other
    name_ends: np.ndarray  # (I + 1,) int64


@dataclass(frozen=True)
class _Annotations:
    """``annotations`` of a file as columns, in the file's order."""

    rows: np.ndarray  # (M,) int32 into the images
    boxes: np.ndarray  # (M, 4) float32 XYWH
    labels: np.ndarray  # (M,) int32
    crowd: np.ndarray  # (M,) bool


class JsonDataset(Dataset):
    """The records of an annotation file, made on demand from arrays: 25 M boxes of 2.5 M images take 0.8 GB.

    Loader processes that are forked share the arrays, which nobody writes to. Item ``i`` is Detectron2's standard
    record of the file's ``i``-th image: ``file_name``, ``image_id``, ``height``, ``width`` and ``annotations`` with
    ``bbox``, ``bbox_mode``, ``category_id`` (contiguous) and ``iscrowd``.

    Attributes:
        image_ids: (I,) int64.
        heights, widths: (I,) int32, pixels.
        offsets: (I + 1,) int64; annotations ``offsets[i]:offsets[i + 1]`` are those of image ``i``, in file order.
        boxes: (M, 4) float32 XYWH in the original image's pixels, as in the file. XYXY is ``xy, xy + wh`` added in
            float32, which is what ``BoxMode.convert`` does with a record's ``bbox``.
        labels: (M,) int32 contiguous classes.
        crowd: (M,) bool.
        num_regions: (I,) int32, for each image its annotations that are no crowd and have area inside the image.
        num_crowd: of all images.
        num_degenerate: annotations of all images that are no crowd and have no area inside their image.
        class_names: by contiguous class.
        id_mapping: category id of the file -> contiguous class, in the order of the ids.
        evaluator_type: "lvis" if all categories have a frequency and all images ``neg_category_ids``, else "coco".
    """

    def __init__(
        self,
        images: _Images,
        annotations: _Annotations,
        categories: list[CategoryEntry],
        image_root: str | Path,
        evaluator_type: str = "coco",
    ) -> None:
        self.image_root = str(image_root)
        self.image_ids, self.heights, self.widths = images.ids, images.heights, images.widths
        self._names, self._name_ends = images.names, images.name_ends
        self.class_names = [category.class_name for category in categories]
        self.id_mapping = {category.id: label for label, category in enumerate(categories)}
        self.evaluator_type = evaluator_type

        rows = annotations.rows
        self.boxes, self.labels, self.crowd = annotations.boxes, annotations.labels, annotations.crowd
        if (np.diff(rows) < 0).any():
            order = np.argsort(rows, kind="stable")
            rows, self.boxes = rows[order], self.boxes[order]
            self.labels, self.crowd = self.labels[order], self.crowd[order]
        number = len(self.image_ids)
        self.offsets = np.concatenate([[0], np.bincount(rows, minlength=number).cumsum()]).astype(np.int64)

        regions = self._has_area(rows) & ~self.crowd
        self.num_regions = np.bincount(rows[regions], minlength=number).astype(np.int32)
        self.num_crowd = int(self.crowd.sum())
        self.num_degenerate = len(regions) - self.num_crowd - int(regions.sum())

    def _has_area(self, rows: np.ndarray, piece: int = 1 << 20) -> np.ndarray:
        """Return (M,) bool: the box, cut to its image, is not empty. In pieces, for the memory's sake."""
        result = np.empty(len(rows), bool)
        for start in range(0, len(rows), piece):
            part = slice(start, start + piece)
            sizes = np.stack([self.widths[rows[part]], self.heights[rows[part]]], axis=1).astype(np.float32)
            low = self.boxes[part, :2]
            high = low + self.boxes[part, 2:]
            result[part] = (np.clip(high, 0, sizes) - np.clip(low, 0, sizes) > _MIN_SIDE).all(axis=1)
        return result

    def __len__(self) -> int:
        return len(self.image_ids)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def file_name(self, index: int) -> str:
        """Return the path of the ``index``-th image."""
        name = self._names[self._name_ends[index] : self._name_ends[index + 1]].tobytes().decode()
        return str(Path(self.image_root, name))

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]  # negative ones count from the end; IndexError
        part = slice(self.offsets[index], self.offsets[index + 1])
        columns = (self.boxes[part].tolist(), self.labels[part].tolist(), self.crowd[part].tolist())
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
    """Read a data set and set class names, id mapping and, where none is set yet, the evaluator of its metadata.

    Args, Raises: see ``read_json_dataset``.
    """
    dataset = read_json_dataset(json_file, image_root, keep_parts=keep_parts)
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes"):
        category_ids(name)  # says which name is another one; Detectron2 asserts that none is
    metadata.set(thing_classes=dataset.class_names, thing_dataset_id_to_contiguous_id=dataset.id_mapping)
    if metadata.get("evaluator_type") is None:
        metadata.set(evaluator_type=dataset.evaluator_type)
    return dataset


def read_json_dataset(json_file: str | Path, image_root: str | Path, *, keep_parts: int | None = None) -> JsonDataset:
    """Read annotations in COCO or LVIS format.

    Category ids may be any integers: sorted, they become 0, 1, 2, ... ``iscrowd`` may be missing. LVIS's images name
    no files: they are COCO's, and the last two parts of their address are split and file.

    Args:
        json_file: the annotations.
        image_root: directory that the file names are relative to.
        keep_parts: how many parts of each file name count, from its end; None for all.

    Raises:
        FileNotFoundError: no such annotation file.
        ValueError: not COCO or LVIS JSON; a key is missing or of a wrong type, an id is there twice or unknown, a
            box is not four finite numbers. It names the file and the place.
    """
    file = JsonFile(json_file)
    categories = file.categories()
    category_ids = np.array([category.id for category in categories], np.int64)
    images, all_negatives = _read_images(file, keep_parts)
    annotations = _read_annotations(file, images.ids, category_ids)
    is_lvis = all_negatives and all(category.frequency is not None for category in categories)
    return JsonDataset(images, annotations, categories, image_root, "lvis" if is_lvis else "coco")


def _read_images(file: JsonFile, keep_parts: int | None) -> tuple[_Images, bool]:
    """Return the images, and whether there are any and all have ``neg_category_ids``."""
    number = len(file.parts["images"])
    ids, heights, widths = np.empty(number, np.int64), np.empty(number, np.int32), np.empty(number, np.int32)
    lengths = np.zeros(number + 1, np.int64)
    names = bytearray()
    all_negatives = number > 0
    for start, entries in file.decode("images", ImageEntry):
        part = slice(start, start + len(entries))
        ids[part] = [entry.id for entry in entries]
        heights[part] = [entry.height for entry in entries]
        widths[part] = [entry.width for entry in entries]
        encoded = [_file_name(file, entry, keep_parts).encode() for entry in entries]
        lengths[start + 1 : start + 1 + len(entries)] = [len(name) for name in encoded]
        names += b"".join(encoded)
        all_negatives = all_negatives and all(entry.neg_category_ids is not msgspec.UNSET for entry in entries)
    file.refuse_duplicates("images", ids)
    blob = np.frombuffer(bytes(names), np.uint8)
    return _Images(ids, heights, widths, blob, lengths.cumsum()), all_negatives


def _file_name(file: JsonFile, entry: ImageEntry, keep_parts: int | None) -> str:
    if entry.file_name:
        name = entry.file_name
    elif entry.coco_url:
        name = "/".join(entry.coco_url.split("/")[-2:])
    else:
        raise ValueError(f"annotations {file.path}: image {entry.id} has neither file_name nor coco_url")
    return name if keep_parts is None else "/".join(name.split("/")[-keep_parts:])


def _read_annotations(file: JsonFile, image_ids: np.ndarray, category_ids: np.ndarray) -> _Annotations:
    number = len(file.parts["annotations"])
    rows, labels = np.empty(number, np.int32), np.empty(number, np.int32)
    boxes, crowd = np.empty((number, 4), np.float32), np.empty(number, bool)
    image_order = np.argsort(image_ids, kind="stable")
    sorted_ids = image_ids[image_order]
    for start, entries in file.decode("annotations", AnnotationEntry):
        part = slice(start, start + len(entries))
        labels[part] = _positions(file, start, entries, "category_id", category_ids)
        rows[part] = image_order[_positions(file, start, entries, "image_id", sorted_ids)]
        crowd[part] = [bool(entry.iscrowd) for entry in entries]
        missing = [i for i, entry in enumerate(entries) if entry.bbox is None]
        if missing:
            raise ValueError(f"annotations {file.path}: annotations[{start + missing[0]}] has no bbox; expected XYWH")
        flat = np.fromiter(chain.from_iterable(entry.bbox or () for entry in entries), np.float64, 4 * len(entries))
        with np.errstate(over="ignore"):  # to infinity, which is refused
            boxes[part] = flat.reshape(-1, 4)
        finite = np.isfinite(boxes[part]).all(axis=1)
        if not finite.all():
            index = int(finite.argmin())
            raise ValueError(
                f"annotations {file.path}: annotations[{start + index}].bbox: expected four finite numbers, "
                f"got {list(entries[index].bbox or ())}"
            )
    return _Annotations(rows, boxes, labels, crowd)


def _positions(file: JsonFile, start: int, entries: list[AnnotationEntry], key: str, known: np.ndarray) -> np.ndarray:
    """Return where in the sorted ids ``known`` the entries' ids are, or refuse the first that is not there."""
    ids = np.fromiter((getattr(entry, key) for entry in entries), np.int64, len(entries))
    positions = np.searchsorted(known, ids)
    found = np.zeros(len(ids), bool)
    inside = positions < len(known)
    found[inside] = known[positions[inside]] == ids[inside]
    if not found.all():
        index = int(found.argmin())
        what, where = ("category", "categories") if key == "category_id" else ("image", "images")
        raise ValueError(
            f"annotations {file.path}: annotations[{start + index}]: annotation {entries[index].id} has {what} id "
            f"{ids[index]}, which is not in '{where}'"
        )
    return positions
