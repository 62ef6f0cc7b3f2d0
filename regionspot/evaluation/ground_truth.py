"""Annotations as arrays, for evaluation."""

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from regionspot.data.datasets.json_file import AnnotationEntry, Id, ImageEntry, JsonFile
from regionspot.evaluation.results import Results
from regionspot.evaluation.rle import check_rles, compress_rle, encode_polygons, sizes_of

FREQUENCIES = ("r", "c", "f")


class _Image(ImageEntry, gc=False):
    neg_category_ids: list[Id] | msgspec.UnsetType = msgspec.UNSET  # type: ignore[assignment]
    not_exhaustive_category_ids: list[Id] | msgspec.UnsetType = msgspec.UNSET


class _Annotation(AnnotationEntry, gc=False):
    area: float | None = None
    ignore: int | float | bool | None = None


class _Outline(msgspec.Struct, gc=False):
    segmentation: Any = None


class GroundTruth:
    """The annotations of a data set in COCO or LVIS format.

    Attributes:
        path: the annotation file.
        image_ids: (I,) int64, ascending.
        sizes: (I, 2) int64 height and width, pixels.
        category_ids: (K,) int64, ascending.
        class_names: (K,).
        frequencies: (K,) "r", "c" or "f"; None where the file does not say.
        images: (G,) int64 into ``image_ids``; annotations are in the file's order.
        categories: (G,) int64 into ``category_ids``.
        boxes: (G, 4) float64 XYWH, pixels.
        areas: (G,) float64, pixels.
        ignore: (G,) bool; ``iscrowd`` is no part of it.
        crowd: (G,) bool, ``iscrowd``, which COCO's rules know and LVIS's do not.
        unnumbered: (G,) bool: the annotation's id is 0, which ``lvis`` and ``pycocotools`` take for
            "not matched".
        negatives: sorted int64 pairs ``category * I + image`` that are verified to be absent.
        not_exhaustive: such pairs where not every object is annotated.
        is_lvis: every category has a frequency and every image ``neg_category_ids``.
    """

    def __init__(self, path: str | Path) -> None:
        """
        Raises: see ``read_ground_truth``.
        """
        self.path = Path(path)
        try:
            self._file = JsonFile(path)
            self._read_categories()
            self._read_images()
            self._read_annotations()
        except (UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"annotations {path}: not readable JSON ({error})") from error
        self._masks: dict[int, dict] = {}

    @property
    def is_lvis(self) -> bool:
        return bool(self._has_negatives and all(f is not None for f in self.frequencies))

    def require_lvis(self) -> None:
        """
        Raises:
            ValueError: the file lacks what LVIS's protocol needs.
        """
        for category, frequency in zip(self.category_ids, self.frequencies):
            if frequency not in FREQUENCIES:
                raise ValueError(
                    f"annotations {self.path}: LVIS evaluation needs frequency 'r', 'c' or 'f' of every category, got "
                    f"{frequency!r} of category {category}; for annotations without them use protocol coco"
                )
        for has, key in (
            (self._has_negatives, "neg_category_ids"),
            (self._has_not_exhaustive, "not_exhaustive_category_ids"),
        ):
            if not has:
                raise ValueError(
                    f"annotations {self.path}: LVIS evaluation needs {key} of every image (an empty list where there "
                    "are none); for annotations without them use protocol coco"
                )

    def positions(self, results: Results) -> tuple[np.ndarray, np.ndarray]:
        """Return (D,) int64 into ``image_ids`` and (D,) int64 into ``category_ids`` of detections.

        Raises:
            ValueError: an image or category that the annotations do not have.
        """
        columns = (
            ("image", results.image_ids, self.image_ids, "are the predictions of another data set or split?"),
            ("category", results.category_ids, self.category_ids, "predictions need the ids of the annotation file"),
        )
        found = []
        for what, ids, known, remedy in columns:
            position, wrong = _look_up(known, ids)
            if wrong.any():
                index = int(wrong.argmax())
                raise ValueError(
                    f"{results.name}: entry {index} has {what} id {ids[index]}, which annotations {self.path} do not "
                    f"have ({int(wrong.sum())} of {len(ids)} entries, {len(np.unique(ids[wrong]))} ids); {remedy}"
                )
            found.append(position)
        return found[0], found[1]

    def check_masks(self, results: Results, images: np.ndarray) -> None:
        """
        Args:
            results: detections.
            images: (D,) int64 into ``image_ids``, of each.

        Raises:
            ValueError: a detection has no mask, or one of another size than its image.
        """
        regions, rles = results.require_masks()
        sizes = sizes_of(rles)
        wrong = (sizes[regions] != self.sizes[images]).any(axis=1)
        if wrong.any():
            index = int(wrong.argmax())
            raise ValueError(
                f"{results.name}: entry {index}: expected a mask of its image's height and width "
                f"{self.sizes[images[index]].tolist()}, got {sizes[regions[index]].tolist()}; "
                "masks belong at the size of the original image"
            )

    def masks(self, annotations: np.ndarray) -> list[dict]:
        """Return compressed RLEs of annotations, which are decoded when they are first asked for.

        Raises:
            ValueError: a segmentation is missing, damaged or of another size than its image.
        """
        raws = self._file.parts["annotations"]
        for index in annotations.tolist():
            if index not in self._masks:
                self._masks[index] = self._decode_mask(index, raws[index])
        return [self._masks[index] for index in annotations.tolist()]

    def _decode_mask(self, index: int, raw: msgspec.Raw) -> dict:
        say = f"annotations {self.path}: annotations[{index}]"
        size = self.sizes[self.images[index]]
        try:
            outline = msgspec.json.decode(raw, type=_Outline).segmentation
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{say}: segmentation is not readable ({error})") from error
        if not isinstance(outline, dict):
            return encode_polygons(outline, tuple(size.tolist()), say)
        rle = compress_rle(outline, say) if isinstance(outline.get("counts"), list) else outline
        check_rles([rle], lambda _: say, size[None])
        return rle

    def _read_categories(self) -> None:
        entries = self._file.categories()
        self.category_ids = np.array([entry.id for entry in entries], np.int64)
        self.class_names = [entry.class_name for entry in entries]
        self.frequencies = [entry.frequency for entry in entries]

    def _read_images(self) -> None:
        entries = [entry for _, piece in self._file.decode("images", _Image) for entry in piece]
        entries.sort(key=lambda entry: entry.id)
        self.image_ids = np.array([entry.id for entry in entries], np.int64)
        self.sizes = np.array([(entry.height, entry.width) for entry in entries], np.int64).reshape(-1, 2)
        self._file.refuse_duplicates("images", self.image_ids)
        self.negatives, self._has_negatives = self._pairs([entry.neg_category_ids for entry in entries])
        self.not_exhaustive, self._has_not_exhaustive = self._pairs(
            [entry.not_exhaustive_category_ids for entry in entries]
        )

    def _pairs(self, lists: list) -> tuple[np.ndarray, bool]:
        """Return the pairs, without categories that are not in the file, and whether all images have a list."""
        has = [not isinstance(ids, msgspec.UnsetType) for ids in lists]
        present = [ids if has_one else [] for ids, has_one in zip(lists, has)]
        ids = np.array([i for part in present for i in part], np.int64)
        images = np.repeat(np.arange(len(lists)), [len(part) for part in present])
        categories, wrong = _look_up(self.category_ids, ids)
        return np.unique(categories[~wrong] * len(lists) + images[~wrong]), all(has) and bool(lists)

    def _read_annotations(self) -> None:
        number = len(self._file.parts["annotations"])
        self.images, self.categories = np.empty(number, np.int64), np.empty(number, np.int64)
        self.boxes, self.areas = np.empty((number, 4)), np.empty(number)
        self.ignore, self.crowd, self.unnumbered = (np.zeros(number, bool) for _ in range(3))
        ids: list[int | str] = []
        for start, entries in self._file.decode("annotations", _Annotation):
            part = slice(start, start + len(entries))
            for index, entry in enumerate(entries, start):
                if entry.bbox is None:
                    raise ValueError(
                        f"annotations {self.path}: annotations[{index}] has no bbox; evaluation needs bbox "
                        "[x, y, width, height] of every annotation, in pixels"
                    )
            self.images[part] = self._find(start, [entry.image_id for entry in entries], "image", self.image_ids)
            known = self.category_ids
            self.categories[part] = self._find(start, [entry.category_id for entry in entries], "category", known)
            self.boxes[part] = [entry.bbox for entry in entries]
            box_areas = self.boxes[part, 2] * self.boxes[part, 3]  # where no area is given
            self.areas[part] = [area if entry.area is None else entry.area for entry, area in zip(entries, box_areas)]
            self.ignore[part] = [bool(entry.ignore) for entry in entries]
            self.crowd[part] = [bool(entry.iscrowd) for entry in entries]
            self.unnumbered[part] = [entry.id == 0 and entry.id is not None for entry in entries]
            ids += [entry.id for entry in entries if entry.id is not None]
        if len(set(ids)) < len(ids):
            twice = Counter(ids).most_common(1)[0]
            raise ValueError(
                f"annotations {self.path}: annotations: id {twice[0]} occurs {twice[1]} times; expected unique ids"
            )

    def _find(self, start: int, ids: list[int], what: str, known: np.ndarray) -> np.ndarray:
        position, wrong = _look_up(known, np.array(ids, np.int64))
        if wrong.any():
            index = int(wrong.argmax())
            raise ValueError(
                f"annotations {self.path}: annotations[{start + index}]: {what} id {ids[index]} is not in the file"
            )
        return position


def _look_up(known: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where in the ascending ``known`` each id is, and (N,) bool: it is not there."""
    position = np.searchsorted(known, ids)
    return position, (np.append(known, 0)[position] != ids) | (position == len(known))


def read_ground_truth(path: str | Path) -> GroundTruth:
    """Read annotations in COCO or LVIS format; polygons are read when masks are evaluated.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not COCO or LVIS JSON; a key is missing or of a wrong type, an id is there twice or unknown. It
            names the file and the place.
    """
    return GroundTruth(path)
