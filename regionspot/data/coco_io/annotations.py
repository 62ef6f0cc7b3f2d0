"""Annotations in COCO or LVIS format, read into arrays."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from regionspot.data.coco_io.json_file import Box, Entry, Id, JsonFile, bbox_array

Side = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class Category(msgspec.Struct, gc=False):
    """The keys of an entry of ``categories`` that are read."""

    id: Id
    name: str
    frequency: str | None = None
    synonyms: list[str] | None = None

    @property
    def class_name(self) -> str:
        """The first of LVIS's synonyms, as in Detectron2's metadata; else the name."""
        # LVIS v1 has one category whose name is not its first synonym.
        return self.synonyms[0] if self.synonyms else self.name


class _Image(msgspec.Struct, gc=False):
    id: Id
    height: Side
    width: Side
    file_name: str | None = None
    coco_url: str | None = None
    neg_category_ids: list[Id] | msgspec.UnsetType = msgspec.UNSET
    not_exhaustive_category_ids: list[Id] | msgspec.UnsetType = msgspec.UNSET

    def local_name(self) -> str:
        """Return the file name relative to the directory of images, "" if there is none."""
        # LVIS's entries have no file_name, or (in the file of minival) one without the directory of COCO's split: its
        # images are COCO's, whose URLs end in "val2017/000000000139.jpg".
        name, is_lvis = self.file_name or "", self.neg_category_ids is not msgspec.UNSET
        if self.coco_url and (not name or is_lvis and "/" not in name):
            return "/".join(self.coco_url.split("/")[-2:])
        return name


class _Annotation(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id
    bbox: Box | None = None
    iscrowd: int | bool = 0
    id: int | str | None = None


class _EvaluatedAnnotation(_Annotation, gc=False):
    area: float | None = None
    ignore: int | float | bool | None = None


class _Sections(msgspec.Struct):
    images: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET
    annotations: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET
    categories: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET


# Sections that a type lacks are skipped by the decoder, at no cost in memory.
class _CategorySection(msgspec.Struct):
    categories: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True)
class CategoryLists:
    """A list of category ids for each image, such as ``neg_category_ids``, as P pairs."""

    images: np.ndarray  # (P,) int64, rows of the images
    category_ids: np.ndarray  # (P,) int64, which may be unknown
    complete: bool  # there are images, and each has a list


@dataclass(frozen=True)
class Images:
    """``images`` of a file as columns, in the file's order."""

    ids: np.ndarray  # (I,) int64
    heights: np.ndarray  # (I,) int32, pixels
    widths: np.ndarray  # (I,) int32, pixels
    names: np.ndarray  # uint8: all file names in UTF-8, concatenated; some may be empty
    name_ends: np.ndarray  # (I + 1,) int64
    negatives: CategoryLists  # verified to be absent
    not_exhaustive: CategoryLists  # not every object is annotated


@dataclass(frozen=True)
class Annotations:
    """``annotations`` of a file as columns, in the file's order; the last three are empty except for evaluation."""

    images: np.ndarray  # (M,) int32, rows of the images
    labels: np.ndarray  # (M,) int32, positions of the categories in the order of their ids
    boxes: np.ndarray  # (M, 4) float32, or float64 for evaluation, XYWH, pixels of the original image, finite
    crowd: np.ndarray  # (M,) bool, ``iscrowd``
    areas: np.ndarray  # (M,) float64, pixels; those of the boxes where the file has none
    ignore: np.ndarray  # (M,) bool; without ``iscrowd``
    has_id_zero: np.ndarray  # (M,) bool


class AnnotationFile(JsonFile):
    """A file of annotations, whose entries stay on the disk until they are decoded.

    Category ids may be any integers, and ``iscrowd`` may be missing. Reading a section raises a ``ValueError`` that
    names the entry if it lacks a key, or has a value of a wrong type or an id that is unknown or occurs twice.

    Attributes:
        sections: the undecoded entries of "images", "annotations" and "categories".
    """

    def __init__(self, path: str | Path, only_categories: bool = False) -> None:
        """Open a file, without the other sections if only categories are needed.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, or ``images``, ``annotations`` or ``categories`` is missing or not a list.
        """
        super().__init__(path, "annotations")
        sections_type = _CategorySection if only_categories else _Sections
        sections = self.decode(sections_type, place="expected COCO or LVIS JSON")
        self.sections: dict[str, list[msgspec.Raw]] = msgspec.structs.asdict(sections)
        missing = [name for name, raws in self.sections.items() if raws is msgspec.UNSET]
        if missing:
            raise ValueError(f"{self.name}: expected COCO or LVIS JSON, but {', '.join(missing)} is missing")

    def section(self, name: str, entry_type: type[Entry]) -> Iterator[tuple[int, list[Entry]]]:
        """Yield (index of the first, entries) for each chunk of a section."""
        return self.chunks_of(self.sections[name], entry_type, name + "[{}]")

    @cached_property
    def categories(self) -> list[Category]:
        """The categories in the order of their ids."""
        entries = [entry for _, chunk in self.section("categories", Category) for entry in chunk]
        entries.sort(key=lambda entry: entry.id)
        self._refuse_duplicates("categories", np.array([entry.id for entry in entries], np.int64))
        return entries

    @cached_property
    def images(self) -> Images:
        """The images in the file's order."""
        num_images = len(self.sections["images"])
        ids = np.empty(num_images, np.int64)
        sizes = np.empty((2, num_images), np.int32)
        # Names are bytes in one block: millions of Python strings would take ten times the memory.
        names, name_ends = bytearray(), np.zeros(num_images + 1, np.int64)
        lists: dict[str, list[list[int] | msgspec.UnsetType]] = {"neg": [], "not_exhaustive": []}
        for start, entries in self.section("images", _Image):
            rows = slice(start, start + len(entries))
            ids[rows] = [entry.id for entry in entries]
            sizes[:, rows] = [[entry.height for entry in entries], [entry.width for entry in entries]]
            for row, entry in enumerate(entries, start + 1):
                names += entry.local_name().encode()
                name_ends[row] = len(names)
            lists["neg"] += [entry.neg_category_ids for entry in entries]
            lists["not_exhaustive"] += [entry.not_exhaustive_category_ids for entry in entries]
        self._refuse_duplicates("images", ids)
        negatives, not_exhaustive = map(_category_lists, lists.values())
        blob = np.frombuffer(bytes(names), np.uint8)
        return Images(ids, sizes[0], sizes[1], blob, name_ends, negatives, not_exhaustive)

    @property
    def is_lvis(self) -> bool:
        """Whether all categories have a frequency and all images ``neg_category_ids``."""
        # Both are needed for LVIS AP; COCO's files have neither.
        return self.images.negatives.complete and all(c.frequency is not None for c in self.categories)

    def annotations(self, for_evaluation: bool = False) -> Annotations:
        """Read the annotations; for evaluation with all columns, boxes in float64, and a check that ids are unique."""
        num_annotations = len(self.sections["annotations"])
        num_evaluated = num_annotations if for_evaluation else 0
        columns = Annotations(
            images=np.empty(num_annotations, np.int32),
            labels=np.empty(num_annotations, np.int32),
            # lvis and pycocotools compute IoUs in float64; float32 halves what training holds in memory
            boxes=np.empty((num_annotations, 4), np.float64 if for_evaluation else np.float32),
            crowd=np.empty(num_annotations, bool),
            areas=np.empty(num_evaluated),
            ignore=np.empty(num_evaluated, bool),
            has_id_zero=np.empty(num_evaluated, bool),
        )
        category_ids = np.array([category.id for category in self.categories], np.int64)
        # Ids are looked up in sorted arrays: a dict of millions of ids takes several times the memory.
        order = np.argsort(self.images.ids, kind="stable")
        image_ids, ids = self.images.ids[order], []
        entry_type: Any = _EvaluatedAnnotation if for_evaluation else _Annotation
        # Columns are filled in place, chunk by chunk: the peak is one chunk of objects above the arrays.
        for start, entries in self.section("annotations", entry_type):
            rows = slice(start, start + len(entries))
            columns.labels[rows] = self._positions(start, entries, "category", category_ids)
            columns.images[rows] = order[self._positions(start, entries, "image", image_ids)]
            columns.crowd[rows] = [bool(entry.iscrowd) for entry in entries]
            columns.boxes[rows] = boxes = self._boxes(start, entries, columns.boxes.dtype)
            if for_evaluation:
                box_areas = (boxes[:, 2] * boxes[:, 3]).tolist()  # where the file has no area
                columns.areas[rows] = [x if e.area is None else e.area for e, x in zip(entries, box_areas)]
                columns.ignore[rows] = [bool(entry.ignore) for entry in entries]
                # pycocotools takes a match with annotation 0 for no match: its numbers depend on this id
                columns.has_id_zero[rows] = [entry.id == 0 for entry in entries]
                ids += [entry.id for entry in entries if entry.id is not None]
        # Detections are matched by id in lvis and pycocotools, where a repeated id hides an annotation.
        if len(set(ids)) < len(ids):
            repeated, count = Counter(ids).most_common(1)[0]
            raise ValueError(f"{self.name}: annotations: id {repeated} occurs {count} times; expected unique ids")
        return columns

    def _boxes(self, start: int, entries: list, dtype: np.dtype) -> np.ndarray:
        """Return (n, 4) finite boxes of ``dtype``."""
        missing = [index for index, entry in enumerate(entries, start) if entry.bbox is None]
        if missing:
            raise ValueError(
                f"{self.name}: annotations[{missing[0]}] has no bbox; expected [x, y, width, height] in pixels"
            )
        with np.errstate(over="ignore"):  # to infinity, which is refused
            boxes = bbox_array(entries).astype(dtype)
        is_finite = np.isfinite(boxes).all(axis=1)
        if not is_finite.all():
            index = int(is_finite.argmin())
            raise ValueError(
                f"{self.name}: annotations[{start + index}].bbox: expected four finite numbers, "
                f"got {list(entries[index].bbox)}"
            )
        return boxes

    def _positions(self, start: int, entries: list, kind: str, known_ids: np.ndarray) -> np.ndarray:
        """Return the positions of the entries' ``kind`` ids ("image", "category") in the ascending ``known_ids``."""
        ids = np.fromiter((getattr(entry, f"{kind}_id") for entry in entries), np.int64, len(entries))
        positions, unknown = look_up(known_ids, ids)
        if unknown.any():
            index = int(unknown.argmax())
            section = "categories" if kind == "category" else "images"
            raise ValueError(
                f"{self.name}: annotations[{start + index}]: annotation {entries[index].id} has {kind} id "
                f"{ids[index]}, which is not in '{section}'"
            )
        return positions

    def _refuse_duplicates(self, section: str, ids: np.ndarray) -> None:
        values, counts = np.unique(ids, return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"{self.name}: {section}: id {values[counts.argmax()]} occurs {counts.max()} times; expected once each"
            )


def look_up(known_ids: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions (N,) of ids in the ascending ``known_ids``, and (N,) bool: the id is unknown."""
    positions = np.searchsorted(known_ids, ids)
    # An id above all known ones has the position len(known_ids), where the appended 0 keeps indexing valid.
    return positions, (np.append(known_ids, 0)[positions] != ids) | (positions == len(known_ids))


def _category_lists(lists: list[list[int] | msgspec.UnsetType]) -> CategoryLists:
    present = [[] if isinstance(ids, msgspec.UnsetType) else ids for ids in lists]
    return CategoryLists(
        images=np.repeat(np.arange(len(lists)), np.fromiter(map(len, present), np.int64)),
        category_ids=np.fromiter(chain.from_iterable(present), np.int64),
        complete=len(lists) > 0 and msgspec.UNSET not in lists,
    )
