"""Proposals in JSON of any size: decoded piece by piece into arrays, never as a whole."""

import mmap
import re
from array import array
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from regionspot.data.proposals.arrays import ProposalArrays, gather_images, gather_rows

PIECE_BYTES = 1 << 23  # of a list of results that are Python objects at one time
_RAWS = 1 << 14  # entries, the same

_BETWEEN_ENTRIES = re.compile(rb"\}\s*(,)\s*(?=\{)")
# NaN and Infinity are not JSON, but Python writes them. Numbers of the same length that are no coordinates take their
# place (see arrays.LIMIT), in a private copy of the pages that hold them.
_NOT_JSON = re.compile(rb"(?<=[\s\[,:])(?:NaN|-?Infinity)(?=[\s,\]}])")

_Box = tuple[float, float, float, float]
_Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _ImageEntry(msgspec.Struct, gc=False):
    """An image of the authors' form; boxes are XYXY."""

    boxes: list[_Box]
    scores: list[float] | None = None
    labels: list[_Id] | None = None


class _Rle(msgspec.Struct, gc=False):
    size: Annotated[list[_Id], msgspec.Meta(min_length=2, max_length=2)]
    counts: str


class _Result(msgspec.Struct, gc=False):
    """An entry of COCO results; ``bbox`` is XYWH."""

    image_id: _Id
    bbox: _Box
    score: float | None = None
    category_id: _Id | None = None


class _MaskResult(_Result, gc=False):
    segmentation: _Rle | None = None


def read_json(path: Path, with_masks: bool = False) -> tuple[str, ProposalArrays]:
    """Read the authors' ``{image_id: {boxes, scores, labels}}``, or a list of COCO results.

    Args:
        path: the file.
        with_masks: keep the RLEs of COCO results.

    Returns:
        The form's name, and the proposals.

    Raises:
        ValueError: not JSON, or an entry is not as it should be; it names the place.
    """
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        try:
            return _read(path, content, with_masks)
        except msgspec.DecodeError as error:
            if isinstance(error, msgspec.ValidationError) or not _replace_what_is_not_json(content):
                raise
            return _read(path, content, with_masks)
    except RecursionError as error:
        raise ValueError(f"proposals {path}: the JSON is nested too deep to be proposals") from error
    except msgspec.ValidationError as error:
        raise ValueError(f"proposals {path}: {_say(error)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"proposals {path}: not valid JSON ({error}); is the file cut short?") from error


def _read(path: Path, content: mmap.mmap, with_masks: bool) -> tuple[str, ProposalArrays]:
    view = memoryview(content)[3 if content[:3] == b"\xef\xbb\xbf" else 0 :]
    if re.match(rb"\s*\{", view):
        return "glip", _read_images(path, view)
    return "coco", _read_results(path, view, with_masks)


def _replace_what_is_not_json(content: mmap.mmap) -> bool:
    found = False
    for match in _NOT_JSON.finditer(content):
        content[match.start() : match.end()] = (b"-9e9" if match[0][:1] == b"-" else b"9e9").ljust(len(match[0]))
        found = True
    return found


class _Columns:
    """Boxes, scores and labels that grow in place, and whether the file has scores and labels at all."""

    def __init__(self) -> None:
        self.boxes, self.scores, self.labels = array("f"), array("d"), array("q")

    def add(self, boxes: np.ndarray, scores: Any, labels: Any) -> None:
        with np.errstate(over="ignore"):  # to infinity, which is left out later
            self.boxes.frombytes(boxes.astype(np.float32).tobytes())
        self.scores.extend(scores)
        self.labels.extend(labels)

    def arrays(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        boxes = np.frombuffer(self.boxes, np.float32).reshape(-1, 4)
        scores = np.frombuffer(self.scores, np.float64) if self.scores else None
        return boxes, scores, np.frombuffer(self.labels, np.int64) if self.labels else None


def _read_images(path: Path, view: memoryview) -> ProposalArrays:
    entries = msgspec.json.decode(view, type=dict[str, msgspec.Raw])
    if "annotations" in entries:
        raise ValueError(
            f"proposals {path}: expected {{image_id: {{boxes, scores}}}} or a list of COCO results, got annotations; "
            "annotated boxes are recognized without a proposal file"
        )
    decoder = msgspec.json.Decoder(_ImageEntry)
    image_ids, lengths, columns = array("q"), array("q"), _Columns()
    for key, raw in entries.items():
        image_ids.append(_image_id(path, key))
        try:
            entry = decoder.decode(raw)
        except msgspec.ValidationError as error:
            raise ValueError(f"proposals {path}: image {key}: {_say(error)}") from error
        number, so_far = len(entry.boxes), len(columns.boxes) // 4
        lengths.append(number)
        values = np.fromiter(chain.from_iterable(entry.boxes), np.float64, 4 * number)
        columns.add(values, entry.scores or (), entry.labels or ())
        for name, there, total in (
            ("scores", entry.scores, len(columns.scores)),
            ("labels", entry.labels, len(columns.labels)),
        ):
            if (there is not None and len(there) != number) or total not in (0, so_far + number):
                raise ValueError(
                    f"proposals {path}: image {key}: expected as many {name} as boxes, in all images or in none; "
                    f"got {number} boxes and {'no' if there is None else len(there)} {name}"
                )
    return gather_images(path, np.array(image_ids), np.array(lengths), *columns.arrays())


def _image_id(path: Path, key: str) -> int:
    if re.fullmatch(r"-?[0-9]{1,18}", key):
        return int(key)
    raise ValueError(
        f"proposals {path}: expected image ids (integers) as keys, got {key[:40]!r}; the forms that are read are "
        "{image_id: {boxes, scores}}, a list of COCO results, Detectron2's pickle and safetensors"
    )


def _read_results(path: Path, view: memoryview, with_masks: bool) -> ProposalArrays:
    image_ids, columns = array("q"), _Columns()
    rles: list[dict[str, Any] | None] = []
    for first, entries in _pieces(view, _MaskResult if with_masks else _Result):
        number = len(entries)
        image_ids.extend(entry.image_id for entry in entries)
        boxes = np.fromiter(chain.from_iterable(entry.bbox for entry in entries), np.float64, 4 * number)
        boxes = boxes.reshape(-1, 4)
        with np.errstate(over="ignore"):
            boxes[:, 2:] += boxes[:, :2]
        scores = [entry.score for entry in entries if entry.score is not None]
        labels = [entry.category_id for entry in entries if entry.category_id is not None]
        columns.add(boxes, scores, labels)
        for name, total in (("score", len(columns.scores)), ("category_id", len(columns.labels))):
            if total not in (0, len(image_ids)):
                raise ValueError(
                    f"proposals {path}: entries {first} to {first + number - 1}: expected a {name} in all entries or "
                    f"in none; {len(image_ids) - total} of the first {len(image_ids)} have none"
                )
        if with_masks:
            rles.extend(entry.segmentation and msgspec.to_builtins(entry.segmentation) for entry in entries)
    return gather_rows(np.frombuffer(image_ids, np.int64), *columns.arrays(), rles if any(rles) else None)


def _pieces(view: memoryview, entry_type: Any) -> Iterator[tuple[int, list[Any]]]:
    """Yield (index of the first, entries) for each piece of a list.

    A piece is cut where an entry seems to end. If what is before decodes as a list, one did end there; if not (the
    place is inside an entry, or the file is damaged), the list is taken apart by the decoder, which takes more memory.
    """
    decoder = msgspec.json.Decoder(list[entry_type])
    head = re.match(rb"\s*\[", view)
    number, start = 0, head.end() if head else 0
    while stop := _last_end(view, start):
        try:
            entries = decoder.decode(b"".join((b"[", view[start:stop], b"]" if stop < len(view) else b"")))
        except msgspec.ValidationError as error:
            raise msgspec.ValidationError(_move(str(error), number)) from error
        except msgspec.DecodeError:
            break
        yield number, entries
        if stop == len(view):
            return
        number, start = number + len(entries), stop + 1
    raws = msgspec.json.decode(view, type=list[msgspec.Raw])
    for first in range(number, len(raws), _RAWS):
        try:
            yield first, decoder.decode(b"[%b]" % b",".join(raws[first : first + _RAWS]))
        except msgspec.ValidationError as error:
            raise msgspec.ValidationError(_move(str(error), first)) from error


def _last_end(view: memoryview, start: int) -> int:
    """Return where the last comma between entries is in a piece from ``start`` on, 0 for nowhere.

    It is the end of ``view`` if what is left is no more than a piece.
    """
    if len(view) - start <= PIECE_BYTES:
        return len(view)
    piece = bytes(view[start : start + PIECE_BYTES])
    for width in (1 << 16, PIECE_BYTES):
        ends = [match.start(1) for match in _BETWEEN_ENTRIES.finditer(piece, max(0, len(piece) - width))]
        if ends:
            return start + ends[-1]
    return 0


def _move(message: str, first: int) -> str:
    """Return msgspec's message about a piece with the index of the entry in the whole list."""
    return re.sub(r"`\$\[(\d+)\]", lambda found: f"`$[{first + int(found[1])}]", message)


def _say(error: msgspec.ValidationError) -> str:
    """Return msgspec's words with the place first: "[70000].bbox: expected ..."."""
    message, _, place = str(error).partition(" - at ")
    place = place.strip("`").removeprefix("$").removeprefix(".")
    return f"{place + ': ' if place else ''}{message[0].lower()}{message[1:]}"
