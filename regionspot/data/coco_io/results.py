"""Detections as arrays, and their files: COCO's and LVIS's JSON, or the same entries one a line."""

from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from regionspot.data.coco_io.json_file import (
    BYTE_ORDER_MARK,
    Box,
    Id,
    InvalidJsonError,
    JsonFile,
    bbox_array,
    describe_error,
    write_list,
)
from regionspot.utils.files import atomic_path
from regionspot.utils.rle import PackedRles, check_rles, mask_areas, mask_boxes, parse_rle

_BLOCK = 1 << 22  # bytes of lines that are decoded at a time
_ENTRIES = 1 << 14  # detections that are converted to Python objects at a time
_HINT = "; an entry has image_id, category_id, score and bbox [x, y, width, height]"


@dataclass(eq=False)
class Results:
    """Detections of a data set, in the order of their file; where scores are equal, the order decides.

    Attributes:
        image_ids: (D,) int64, of the annotation file.
        category_ids: (D,) int64, of the annotation file.
        scores: (D,) float64, any finite numbers.
        boxes: (D, 4) float64 XYWH, original pixels.
        regions: (D,) int64 into ``rles``, -1 for a detection without a mask; None if there are no masks.
        rles: masks as COCO's compressed RLE, ``{"size": [height, width], "counts": str or bytes}``. Detections of
            one box share one.
        name: of the detections, for messages.
        has_mask_boxes: the file has no boxes; ``boxes`` becomes those around the masks. The areas of detections are
            then those of their masks, for boxes too, as in ``lvis`` and ``pycocotools``.
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    regions: np.ndarray | None = None
    rles: Sequence[dict] | None = None
    name: str = "predictions"
    has_mask_boxes: bool = False

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: arrays of different lengths, scores or boxes that are not finite, a negative width or height,
                unknown regions, damaged RLEs.
        """
        # Regions before boxes: boxes may be those around the masks.
        self.image_ids = self._integers("image_ids", self.image_ids)
        self.category_ids = self._integers("category_ids", self.category_ids)
        self.scores = np.asarray(self.scores, np.float64)
        if (self.regions is None) != (self.rles is None):
            raise ValueError(f"{self.name}: expected both regions and rles, or neither")
        if self.regions is not None and self.rles is not None:
            self.regions = self._integers("regions", self.regions)
            if self.regions.shape != self.image_ids.shape:
                raise ValueError(f"{self.name}: expected regions of shape ({len(self)},), got {self.regions.shape}")
            is_unknown = (self.regions < -1) | (self.regions >= len(self.rles))
            self._refuse(is_unknown, f"expected a region in [-1, {len(self.rles)})", self.regions)
            self.rles = check_rles(self.rles, self._describe_mask)
        if self.has_mask_boxes:
            regions, rles = self.require_masks()
            self.boxes = mask_boxes(rles)[regions]
        self._check_boxes()

    def __len__(self) -> int:
        return len(self.image_ids)

    @cached_property
    def mask_areas(self) -> np.ndarray:
        """(len(rles),) float64, pixels."""
        return mask_areas(self.rles or [])

    def areas(self, task: str, segm_areas: str = "masks") -> np.ndarray:
        """Return the areas (D,) that decide whether detections are small, medium or large, float64 pixels.

        Args:
            task: "bbox" or "segm".
            segm_areas: "masks", as in Detectron2; or "boxes", as in ``lvis`` itself for a file that has both.
        """
        if self.regions is not None and (self.has_mask_boxes or (task == "segm" and segm_areas == "masks")):
            return self.mask_areas[self.regions]
        with np.errstate(over="ignore"):  # sides of 1e200 are finite, their product is not
            return self.boxes[:, 2] * self.boxes[:, 3]

    def require_masks(self) -> tuple[np.ndarray, PackedRles]:
        """Return regions and rles, or raise a ``ValueError`` if a detection has no mask."""
        if self.regions is None:
            if len(self):
                raise ValueError(f"{self.name}: task segm needs masks, but no entry has a segmentation; use task bbox")
            return np.zeros(0, np.int64), PackedRles()
        if (missing := self.regions < 0).any():
            raise ValueError(
                f"{self.name}: entry {int(missing.argmax())} has no segmentation while others have; "
                "task segm needs one of each, use task bbox"
            )
        assert isinstance(self.rles, PackedRles)
        return self.regions, self.rles

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yield the detections as COCO writes them."""
        columns = (self.image_ids, self.category_ids, self.boxes, self.scores)
        keys = ("image_id", "category_id", "bbox", "score")
        for start in range(0, len(self), _ENTRIES):
            rows = slice(start, start + _ENTRIES)
            # tolist() converts to Python numbers, which the encoder takes, much faster than item by item
            for index, values in enumerate(zip(*(column[rows].tolist() for column in columns)), start):
                entry = dict(zip(keys, values))
                if self.regions is not None and self.rles is not None:
                    rle = self.rles[self.regions[index]]
                    entry["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode()}
                yield entry

    def _check_boxes(self) -> None:
        self.boxes = np.asarray(self.boxes, np.float64)
        # An empty list has the shape (0,).
        if not len(self.boxes):
            self.boxes = self.boxes.reshape(0, 4)
        shapes = [self.image_ids.shape, self.category_ids.shape, self.scores.shape, self.boxes.shape]
        if shapes != [(len(self),), (len(self),), (len(self),), (len(self), 4)]:
            raise ValueError(
                f"{self.name}: expected image_ids, category_ids, scores of shape (D,) and boxes (D, 4), got {shapes}"
            )
        self._refuse(~np.isfinite(self.scores), "expected a finite score", self.scores)
        self._refuse(~np.isfinite(self.boxes).all(axis=1), "expected a bbox of finite numbers", self.boxes)
        negative = self.boxes[:, 2:].min(axis=1) < 0
        self._refuse(negative, "expected bbox as [x, y, width, height] with width and height >= 0", self.boxes)

    def _describe_mask(self, region: int) -> str:
        """Return the first detection with a mask, for messages."""
        has_mask = self.regions == region
        return f"{self.name}: " + (f"entry {int(np.argmax(has_mask))}" if np.any(has_mask) else f"rles[{region}]")

    def _integers(self, key: str, values: Any) -> np.ndarray:
        array = np.asarray(values)
        # an empty list is float64, and floats would be cut to integers without an error
        if array.size and array.dtype.kind not in "iu":
            raise ValueError(f"{self.name}: expected {key} to be integers, got {array.dtype}")
        return array.astype(np.int64)

    def _refuse(self, is_invalid: np.ndarray, expected: str, values: np.ndarray) -> None:
        if is_invalid.any():
            index = int(is_invalid.argmax())
            raise ValueError(
                f"{self.name}: entry {index}: {expected}, got {values[index].tolist()} "
                f"({int(is_invalid.sum())} such of {len(is_invalid)})"
            )


class _Entry(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id
    score: float
    bbox: Box | None = None
    segmentation: msgspec.Raw = msgspec.Raw(b"null")


def write_results(path: str | Path, results: Results) -> None:
    """Write detections as COCO's results; the file appears whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        write_list(file, results.entries())


def read_results(path: str | Path) -> Results:
    """Read detections from a file, a chunk at a time.

    The file is a JSON list of ``{"image_id", "category_id", "score", "bbox": [x, y, width, height], "segmentation"}``,
    or JSON lines of such entries. ``segmentation`` (RLE) is optional; entries that have it may lack ``bbox``, which is
    then the box around the mask. Equal masks of consecutive entries of an image are stored once.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty or truncated file, not JSON, or an entry that is not a detection. It names the entry,
            counted from 0.
    """
    file = JsonFile(path, "predictions", hint=_HINT)
    head = bytes(file.buffer[:4096]).lstrip()[:1]
    if head not in (b"[", b"{"):
        raise ValueError(f"{file.name}: expected a JSON list of results or JSON lines, got {bytes(file.buffer[:40])!r}")
    # Arrays of the standard library grow in place: lists of chunks would take twice the memory when they are joined.
    image_ids, category_ids, scores, boxes, regions = array("q"), array("q"), array("d"), array("d"), array("q")
    masks, has_boxes = _Masks(file.name), True
    for first, entries in file.chunks(_Entry) if head == b"[" else _chunks_of_lines(file):
        if first == 0 and entries:
            has_boxes = entries[0].bbox is not None
        chunk_regions = [masks.add(index, entry) for index, entry in enumerate(entries, first)]
        _check_boxes_or_masks(file.name, first, entries, chunk_regions, has_boxes)
        image_ids.extend(entry.image_id for entry in entries)
        category_ids.extend(entry.category_id for entry in entries)
        scores.extend(entry.score for entry in entries)
        boxes.frombytes(bbox_array(entries).tobytes() if has_boxes else b"")
        regions.extend(chunk_regions)
    return Results(
        np.asarray(image_ids),
        np.asarray(category_ids),
        np.asarray(scores),
        np.asarray(boxes).reshape(-1, 4),  # (D, 4), or (0, 4) for boxes around the masks
        regions=np.asarray(regions) if len(masks.rles) else None,
        rles=masks.rles if len(masks.rles) else None,
        name=file.name,
        has_mask_boxes=not has_boxes,
    )


def _check_boxes_or_masks(name: str, first: int, entries: list[_Entry], regions: list[int], has_boxes: bool) -> None:
    for index, (entry, region) in enumerate(zip(entries, regions), first):
        if (entry.bbox is not None) != has_boxes or (entry.bbox is None and region < 0):
            raise ValueError(
                f"{name}: entry {index} has {'no' if entry.bbox is None else 'a'} bbox; "
                "expected [x, y, width, height] in every entry, or a segmentation in every entry and no bbox at all"
            )


def _chunks_of_lines(file: JsonFile) -> Iterator[tuple[int, list[_Entry]]]:
    # Empty lines are no entries: a line's number is not its entry's index.
    decoder, num_entries, num_lines = msgspec.json.Decoder(_Entry), 0, 0
    with file.path.open("rb") as stream:
        if stream.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
            stream.seek(0)
        while lines := stream.readlines(_BLOCK):
            try:
                entries = decoder.decode_lines(b"".join(lines))
            except msgspec.ValidationError as error:
                if b'"annotations"' in lines[0] and b'"images"' in lines[0]:
                    raise ValueError(f"{file.name}: expected results, got an annotation file") from error
                raise ValueError(f"{file.name}: {describe_error(error, 'entry {}', num_entries)}{_HINT}") from error
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                line = num_lines + _first_invalid_line(lines) + 1
                raise InvalidJsonError(
                    f"{file.name}: line {line} is not valid JSON ({error}); expected a list of results or one entry a "
                    "line. Was the run that wrote it interrupted?"
                ) from error
            yield num_entries, entries
            num_entries, num_lines = num_entries + len(entries), num_lines + len(lines)


def _first_invalid_line(lines: list[bytes]) -> int:
    for index, line in enumerate(lines):
        try:
            msgspec.json.decode(line if line.strip() else b"0")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return index
    return 0


class _Masks:
    """Packs the segmentations of entries; equal ones of consecutive entries of an image are packed once."""

    def __init__(self, name: str) -> None:
        self.name, self.rles = name, PackedRles()
        self._image_id: int | None = None
        self._regions: dict[bytes, int] = {}  # by the bytes of each segmentation of the current image

    def add(self, index: int, entry: _Entry) -> int:
        """Return the position of an entry's mask in ``rles``, -1 for none."""
        text = bytes(entry.segmentation)
        if text == b"null":
            return -1
        if entry.image_id != self._image_id:
            self._image_id, self._regions = entry.image_id, {}
        # A box of several classes repeats its mask, byte for byte: comparing bytes is faster than decoding.
        if text not in self._regions:
            rle: Any = text
            with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                rle = msgspec.json.decode(text)
            try:
                self.rles.append(*parse_rle(rle))
            except ValueError as error:
                raise ValueError(f"{self.name}: entry {index}: {error}") from error
            self._regions[text] = len(self.rles) - 1
        return self._regions[text]
