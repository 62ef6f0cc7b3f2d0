"""Proposals in JSON of any size, decoded in chunks into arrays: the authors' format and COCO results."""

import re
from array import array
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from regionspot.data.coco_io import InvalidJsonError, JsonFile
from regionspot.data.coco_io.json_file import Box, Id, bbox_array
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
    """Return the name of the format, "glip" or "coco", and the proposals; with the RLEs of COCO results if asked to.

    Raises:
        ValueError: not JSON, or an invalid entry; it names the place.
    """
    # Strict JSON first; the few files with NaN are changed in memory and read again.
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
    """Overwrite NaN and Infinity by numbers that are too large for coordinates (``arrays.LIMIT``)."""
    replaced = False
    for match in _NOT_JSON.finditer(buffer):
        # of the same length, so that nothing moves
        buffer[match.start() : match.end()] = (b"-9e9" if match[0][:1] == b"-" else b"9e9").ljust(len(match[0]))
        replaced = True
    return replaced


def _read_images(file: JsonFile) -> ProposalArrays:
    # One object of all images: its entries stay bytes until their turn.
    entries = file.decode(dict[str, msgspec.Raw])
    if "annotations" in entries:
        raise ValueError(
            f"{file.name}: expected {{image_id: {{boxes, scores}}}} or a list of COCO results, got annotations; "
            "annotated boxes are recognized without a proposal file"
        )
    decoder = msgspec.json.Decoder(_ImageEntry)
    image_ids, lengths = array("q"), array("q")
    boxes, scores, labels = array("f"), array("d"), array("q")
    for key, raw in entries.items():
        if not re.fullmatch(r"-?[0-9]{1,18}", key):
            raise ValueError(
                f"{file.name}: expected image ids (integers) as keys, got {key[:40]!r}; the formats that are read are "
                "{image_id: {boxes, scores}}, a list of COCO results, Detectron2's pickle and safetensors"
            )
        entry = file.decode(decoder, raw, f"image {key}")
        num_boxes = len(entry.boxes)
        image_ids.append(int(key))
        lengths.append(num_boxes)
        boxes.extend(chain.from_iterable(entry.boxes))
        scores.extend(entry.scores or ())
        labels.extend(entry.labels or ())
        for name, values, column in (("scores", entry.scores, scores), ("labels", entry.labels, labels)):
            if (values is not None and len(values) != num_boxes) or len(column) not in (0, len(boxes) // 4):
                raise ValueError(
                    f"{file.name}: image {key}: expected as many {name} as boxes, in all images or in none; "
                    f"got {num_boxes} boxes and {'no' if values is None else len(values)} {name}"
                )
    return gather_images(file.path, np.asarray(image_ids), np.asarray(lengths), *_as_columns(boxes, scores, labels))


def _read_results(file: JsonFile, with_masks: bool) -> ProposalArrays:
    image_ids = array("q")
    rles: list[dict[str, Any] | None] = []
    boxes, scores, labels = array("f"), array("d"), array("q")
    entry_type: Any = _MaskResult if with_masks else _Result
    for first, entries in file.chunks(entry_type):
        image_ids.extend(entry.image_id for entry in entries)
        xyxy = bbox_array(entries)  # (n, 4), XYWH in the file
        with np.errstate(over="ignore"):  # infinite boxes are dropped later
            xyxy[:, 2:] += xyxy[:, :2]  # in float64: rounded once
            boxes.frombytes(xyxy.astype(np.float32).tobytes())
        scores.extend(entry.score for entry in entries if entry.score is not None)
        labels.extend(entry.category_id for entry in entries if entry.category_id is not None)
        for name, column in (("score", scores), ("category_id", labels)):
            if len(column) not in (0, len(image_ids)):
                raise ValueError(
                    f"{file.name}: entries {first} to {len(image_ids) - 1}: expected a {name} in all entries or in "
                    f"none; {len(image_ids) - len(column)} of the first {len(image_ids)} have none"
                )
        if with_masks:
            rles.extend(entry.segmentation and msgspec.to_builtins(entry.segmentation) for entry in entries)
    return gather_rows(np.asarray(image_ids), *_as_columns(boxes, scores, labels), rles if any(rles) else None)


def _as_columns(boxes: array, scores: array, labels: array) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Return boxes (N, 4), scores (N,) and labels (N,), which share the memory; None for empty ones."""
    return (
        np.asarray(boxes).reshape(-1, 4),
        np.asarray(scores) if scores else None,
        np.asarray(labels) if labels else None,
    )
