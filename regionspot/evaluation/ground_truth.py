"""Annotations as arrays, for evaluation."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from regionspot.data.coco_io import AnnotationFile, Results, look_up
from regionspot.utils.rle import check_rles, encode_polygons, parse_rle

FREQUENCIES = ("r", "c", "f")


class _Segmentation(msgspec.Struct, gc=False):
    segmentation: Any = None


class GroundTruth:
    """The annotations of a data set in COCO or LVIS format; polygons are decoded when masks are evaluated.

    Attributes:
        path: the annotation file.
        image_ids: (I,) int64, ascending.
        sizes: (I, 2) int64 height and width, pixels.
        category_ids: (K,) int64, ascending.
        class_names: (K,).
        frequencies: (K,) "r", "c" or "f"; None where the file has none.
        images: (G,) int64 into ``image_ids``; annotations are in the file's order.
        categories: (G,) int64 into ``category_ids``.
        boxes: (G, 4) float64 XYWH, pixels.
        areas: (G,) float64, pixels.
        ignore: (G,) bool, the file's ``ignore``, which LVIS's rules follow.
        crowd: (G,) bool, ``iscrowd``, which COCO's rules follow.
        has_id_zero: (G,) bool: ``lvis`` and ``pycocotools`` take the annotation's id 0 for "not matched".
        negatives: sorted int64 pairs ``category * I + image`` that are verified to be absent.
        not_exhaustive: such pairs where not every object is annotated.
        is_lvis: every category has a frequency and every image ``neg_category_ids``.
    """

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            FileNotFoundError: no such file.
            ValueError: not COCO or LVIS JSON; a key is missing or has a wrong type, an id is repeated or unknown. It
                names the file and the place.
        """
        self.path, self._file = Path(path), AnnotationFile(path)
        categories, images = self._file.categories, self._file.images
        annotations = self._file.annotations(for_evaluation=True)
        self.category_ids = np.array([category.id for category in categories], np.int64)
        self.class_names = [category.class_name for category in categories]
        self.frequencies = [category.frequency for category in categories]

        order = np.argsort(images.ids)
        rank = np.argsort(order)  # the inverse permutation: from the file's order to that of ascending ids
        self.image_ids = images.ids[order]
        self.sizes = np.stack([images.heights, images.widths], axis=1)[order].astype(np.int64)
        self._image_order = order
        self._lists = {"neg_category_ids": images.negatives, "not_exhaustive_category_ids": images.not_exhaustive}
        # Federated annotation: an image lists categories that are absent, and categories annotated incompletely.
        pairs = []
        for lists in self._lists.values():
            positions, unknown = look_up(self.category_ids, lists.category_ids)
            pairs.append(np.unique((positions * len(order) + rank[lists.images])[~unknown]))
        self.negatives, self.not_exhaustive = pairs
        self.is_lvis = self._file.is_lvis

        self.images = rank[annotations.images]
        self.categories = annotations.labels.astype(np.int64)
        self.boxes, self.areas = annotations.boxes, annotations.areas
        self.ignore, self.crowd = annotations.ignore, annotations.crowd
        self.has_id_zero = annotations.has_id_zero
        self._masks: dict[int, dict] = {}

    def file_name(self, image: int) -> str:
        """Return the file name of an image, by its position in ``image_ids``; "" if the file has none."""
        images, row = self._file.images, int(self._image_order[image])
        return images.names[images.name_ends[row] : images.name_ends[row + 1]].tobytes().decode()

    def require_lvis(self) -> None:
        """Refuse a file that lacks what LVIS's protocol needs."""
        for category, frequency in zip(self.category_ids, self.frequencies):
            if frequency not in FREQUENCIES:
                raise ValueError(
                    f"annotations {self.path}: LVIS evaluation needs frequency 'r', 'c' or 'f' of every category, got "
                    f"{frequency!r} of category {category}; for annotations without them use protocol coco"
                )
        for key, lists in self._lists.items():
            if not lists.complete:
                raise ValueError(
                    f"annotations {self.path}: LVIS evaluation needs {key} of every image (an empty list where there "
                    "are none); for annotations without them use protocol coco"
                )

    def locate(self, results: Results) -> tuple[np.ndarray, np.ndarray]:
        """Return (D,) int64 into ``image_ids`` and (D,) int64 into ``category_ids`` of detections.

        Raises:
            ValueError: an image or category that the annotations do not have.
        """
        columns = (
            ("image", results.image_ids, self.image_ids, "are the predictions of another data set or split?"),
            ("category", results.category_ids, self.category_ids, "predictions need the ids of the annotation file"),
        )
        located = []
        for kind, ids, known_ids, remedy in columns:
            positions, unknown = look_up(known_ids, ids)
            if unknown.any():
                index = int(unknown.argmax())
                raise ValueError(
                    f"{results.name}: entry {index} has {kind} id {ids[index]}, which annotations {self.path} do not "
                    f"have ({int(unknown.sum())} of {len(ids)} entries, {len(np.unique(ids[unknown]))} ids); {remedy}"
                )
            located.append(positions)
        return located[0], located[1]

    def check_masks(self, results: Results, images: np.ndarray) -> None:
        """Refuse detections in ``images`` (D,) without a mask, or with one of another size than their image."""
        regions, rles = results.require_masks()
        sizes = rles.sizes()
        wrong = (sizes[regions] != self.sizes[images]).any(axis=1)
        if wrong.any():
            index = int(wrong.argmax())
            raise ValueError(
                f"{results.name}: entry {index}: expected a mask of its image's height and width "
                f"{self.sizes[images[index]].tolist()}, got {sizes[regions[index]].tolist()}; "
                "masks belong at the size of the original image"
            )

    def masks(self, annotations: np.ndarray) -> list[dict]:
        """Return compressed RLEs of annotations, each decoded once; a ValueError names a damaged one."""
        for index in annotations.tolist():
            if index not in self._masks:
                self._masks[index] = self._decode_mask(index)
        return [self._masks[index] for index in annotations.tolist()]

    def _decode_mask(self, index: int) -> dict:
        place, size = f"annotations[{index}]", self.sizes[self.images[index]]
        raw = self._file.sections["annotations"][index]
        segmentation = self._file.decode(_Segmentation, raw, place).segmentation
        try:
            if not isinstance(segmentation, dict):
                return encode_polygons(segmentation, tuple(size.tolist()))
            size_and_counts = parse_rle(segmentation)
        except ValueError as error:
            raise ValueError(f"{self._file.name}: {place}: {error}") from error
        rle = dict(zip(("size", "counts"), size_and_counts))
        check_rles([rle], lambda _: f"{self._file.name}: {place}", size[None])
        return rle
