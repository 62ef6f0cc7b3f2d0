"""Proposals in JSON of any size, decoded in chunks into arrays: the authors' format and COCO results."""

import re
from array import array
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from regionspot.data.coco_io import InvalidJsonError, JsonFile
from regionspot.data.coco_io.json_file import Box, Id
from regionspot.data.proposals.arrays import ProposalArrays, gather_images, gather_rows

# NaN and Infinity are not JSON, but Python writes them.
_NOT_JSON = re.compile(rb"(?<=[\s\[,:])(?:NaN|-?Infinity)(?=[\s,\]}])")


class _ImageEntry(msgspec.Struct, gc=False):
    """An image of the authors' format; boxes are XYXY."""

    boxes: list[Box]
    scores: list[float] | None = None
    labels: list[Id] | None = None


class _Rle(msgspec.Struct, gc=False):
    size: Annotated[list[Id], msgspec.Meta(min_length=2, max_length=2)]
    counts: str


class _Result(msgspec.Struct, gc=False):
    """An entry of COCO results; ``bbox`` is XYWH."""

    image_id: Id
    bbox: Box
    score: float | None = None
    category_id: Id | None = None


class _MaskResult(_Result, gc=False):
    segmentation: _Rle | None = None


def read_json(path: Path, with_masks: bool = False) -> tuple[str, ProposalArrays]:
    """Read the authors' ``{image_id: {boxes, scores, labels}}``, or a list of COCO results.

    Args:
        path: the file.
        with_masks: keep the RLEs of COCO results.

    Returns:
        The format's name, and the proposals.

    Raises:
        ValueError: not JSON, or an entry is not as it should be; it names the place.
    """
    file = JsonFile(path, "proposals", writable=True)
    try:
        return _read(file, with_masks)
    except InvalidJsonError:
        if not _replace_non_finite(file.buffer):
            raise
        return _read(file, with_masks)


def _read(file: JsonFile, with_masks: bool) -> tuple[str, ProposalArrays]:
    if re.match(rb"\s*\{", file.buffer):
        return "glip", _read_images(file)
    return "coco", _read_results(file, with_masks)


def _replace_non_finite(buffer: memoryview) -> bool:
    """Write numbers of the same length, too large for coordinates (``arrays.LIMIT``), over NaN and Infinity."""
    replaced = False
    for match in _NOT_JSON.finditer(buffer):
        buffer[match.start() : match.end()] = (b"-9e9" if match[0][:1] == b"-" else b"9e9").ljust(len(match[0]))
        replaced = True
    return replaced


class _Columns:
    """Boxes (XYXY), scores and labels that grow in place; a file has scores of all boxes or of none, and labels."""

    def __init__(self) -> None:
        self.boxes, self.scores, self.labels = array("f"), array("d"), array("q")

    def __len__(self) -> int:
        return len(self.boxes) // 4

    def add(self, boxes: np.ndarray, scores: Iterable[float], labels: Iterable[int]) -> None:
        with np.errstate(over="ignore"):  # infinite boxes are left out later
            self.boxes.frombytes(boxes.astype(np.float32).tobytes())
        self.scores.extend(scores)
        self.labels.extend(labels)

    def arrays(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        boxes = np.frombuffer(self.boxes, np.float32).reshape(-1, 4)
        scores = np.frombuffer(self.scores, np.float64) if self.scores else None
        return boxes, scores, np.frombuffer(self.labels, np.int64) if self.labels else None


def _read_images(file: JsonFile) -> ProposalArrays:
    entries = file.decode(dict[str, msgspec.Raw])
    if "annotations" in entries:
        raise ValueError(
            f"{file.name}: expected {{image_id: {{boxes, scores}}}} or a list of COCO results, got annotations; "
            "annotated boxes are recognized without a proposal file"
        )
    decoder = msgspec.json.Decoder(_ImageEntry)
    image_ids, lengths, columns = array("q"), array("q"), _Columns()
    for key, raw in entries.items():
        if not re.fullmatch(r"-?[0-9]{1,18}", key):
            raise ValueError(
                f"{file.name}: expected image ids (integers) as keys, got {key[:40]!r}; the formats that are read are "
                "{image_id: {boxes, scores}}, a list of COCO results, Detectron2's pickle and safetensors"
            )
        image_ids.append(int(key))
        entry = file.decode(decoder, raw, f"image {key}")
        num_boxes = len(entry.boxes)
        lengths.append(num_boxes)
        boxes = np.fromiter(chain.from_iterable(entry.boxes), np.float64, 4 * num_boxes)
        columns.add(boxes, entry.scores or (), entry.labels or ())
        for name, values, total in (
            ("scores", entry.scores, len(columns.scores)),
            ("labels", entry.labels, len(columns.labels)),
        ):
            if (values is not None and len(values) != num_boxes) or total not in (0, len(columns)):
                raise ValueError(
                    f"{file.name}: image {key}: expected as many {name} as boxes, in all images or in none; "
                    f"got {num_boxes} boxes and {'no' if values is None else len(values)} {name}"
                )
    return gather_images(file.path, np.array(image_ids), np.array(lengths), *columns.arrays())


def _read_results(file: JsonFile, with_masks: bool) -> ProposalArrays:
    image_ids, columns = array("q"), _Columns()
    rles: list[dict[str, Any] | None] = []
    entry_type: Any = _MaskResult if with_masks else _Result
    for first, entries in file.chunks(entry_type):
        image_ids.extend(entry.image_id for entry in entries)
        boxes = np.fromiter(chain.from_iterable(entry.bbox for entry in entries), np.float64, 4 * len(entries))
        boxes = boxes.reshape(-1, 4)
        with np.errstate(over="ignore"):
            boxes[:, 2:] += boxes[:, :2]
        scores = [entry.score for entry in entries if entry.score is not None]
        columns.add(boxes, scores, (entry.category_id for entry in entries if entry.category_id is not None))
        for name, total in (("score", len(columns.scores)), ("category_id", len(columns.labels))):
            if total not in (0, len(columns)):
                raise ValueError(
                    f"{file.name}: entries {first} to {len(columns) - 1}: expected a {name} in all entries or in none; "
                    f"{len(columns) - total} of the first {len(columns)} have none"
                )
        if with_masks:
            rles.extend(entry.segmentation and msgspec.to_builtins(entry.segmentation) for entry in entries)
    return gather_rows(np.frombuffer(image_ids, np.int64), *columns.arrays(), rles if any(rles) else None)
