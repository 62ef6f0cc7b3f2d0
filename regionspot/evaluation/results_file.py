"""Files of results: COCO's and LVIS's JSON, and the same entries one a line."""

import mmap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np

from regionspot.data.datasets.json_file import Id, describe_error, excerpt, map_file
from regionspot.evaluation.results import Results
from regionspot.evaluation.rle import PackedMasks, boxes_of, check_rles, compress_rle, is_size
from regionspot.utils.files import atomic_path

_PIECE = 1 << 14  # entries that are Python objects at one time
_BLOCK = 1 << 22  # bytes of lines that are decoded at one time


class _Entry(msgspec.Struct, gc=False):
    image_id: Id
    category_id: Id
    score: float
    bbox: tuple[float, float, float, float] | None = None
    segmentation: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Mask(msgspec.Struct, gc=False):
    size: tuple[int, int]
    counts: str | list[int]


def read_results(path: str | Path) -> Results:
    """Read detections from a file, a piece at a time.

    It is a JSON list of ``{"image_id", "category_id", "score", "bbox": [x, y, width, height], "segmentation"}``, or
    JSON lines of such entries, which its first character tells. ``segmentation`` is RLE and may be missing, and
    ``bbox`` may be where there is one; it is then the box around the mask. Equal masks of an image that follow each
    other in the file are kept once.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty or truncated file, not JSON, or an entry that is no detection. It names the entry,
            counted from 0.
    """
    name = f"predictions {path}"
    buffer = map_file(path, "predictions")
    columns = _Columns(name)
    try:
        for entries in _pieces(buffer, name):
            columns.add(entries)
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{name}: not readable JSON ({error})") from error
    return columns.results()


def _pieces(buffer: memoryview, name: str) -> Iterator[list[_Entry]]:
    head = bytes(buffer[:4096]).lstrip()[:1]
    if head == b"[":
        yield from _pieces_of_list(buffer, name)
    elif head == b"{":
        yield from _pieces_of_lines(buffer, name)
    else:
        raise ValueError(f"{name}: expected a JSON list of results or JSON lines, got {bytes(buffer[:40])!r}")


def _pieces_of_list(buffer: memoryview, name: str) -> Iterator[list[_Entry]]:
    try:
        entries = msgspec.json.decode(buffer, type=list[msgspec.Raw])
    except msgspec.DecodeError as error:
        hint = "; was the run that wrote it cut?" if "truncated" in str(error) else excerpt(buffer, error)
        raise ValueError(f"{name}: not valid JSON ({error}{hint})") from error
    decoder = msgspec.json.Decoder(list[_Entry])
    for start in range(0, len(entries), _PIECE):
        _let_go(buffer)
        try:
            yield decoder.decode(b"[%b]" % b",".join(entries[start : start + _PIECE]))
        except msgspec.DecodeError as error:
            raise ValueError(f"{name}: {_explain(error, start)}") from error


def _pieces_of_lines(buffer: memoryview, name: str) -> Iterator[list[_Entry]]:
    decoder = msgspec.json.Decoder(_Entry)
    done, start = 0, 0
    while start < len(buffer):
        end = _end_of_line(buffer, min(start + _BLOCK, len(buffer)))
        block = bytes(buffer[start:end])
        try:
            entries = decoder.decode_lines(block)
        except msgspec.ValidationError as error:
            if b'"annotations"' in block[:_BLOCK] and b'"images"' in block:
                raise ValueError(f"{name}: expected results, got an annotation file") from error
            raise ValueError(f"{name}: {_explain(error, done)}") from error
        except msgspec.DecodeError as error:
            line = _first_wrong_line(block)
            raise ValueError(
                f"{name}: line {bytes(buffer[:start]).count(10) + line + 1} is not valid JSON ({error}); expected a "
                "list of results or one entry a line. Was the run that wrote it cut?"
            ) from error
        yield entries
        done, start = done + len(entries), end
        _let_go(buffer)


def _let_go(buffer: memoryview) -> None:
    """Tell the system that what was read of a mapped file need not stay in memory; it reads it anew if asked."""
    if hasattr(mmap, "MADV_DONTNEED") and isinstance(buffer.obj, mmap.mmap):
        buffer.obj.madvise(mmap.MADV_DONTNEED)


def _end_of_line(buffer: memoryview, position: int) -> int:
    while position < len(buffer):
        found = bytes(buffer[position : position + 65536]).find(b"\n")
        if found >= 0:
            return position + found + 1
        position += 65536
    return len(buffer)


def _first_wrong_line(block: bytes) -> int:
    for index, line in enumerate(block.split(b"\n")):
        try:
            if line.strip():
                msgspec.json.decode(line, type=msgspec.Raw)
        except msgspec.DecodeError:
            return index
    return 0


def _explain(error: msgspec.DecodeError, start: int) -> str:
    """Return msgspec's words with the entry's number first, "entry 17.score: expected `float`, got `str`"."""
    if not isinstance(error, msgspec.ValidationError):
        return f"an entry from {start} on is not valid JSON ({error})"
    text = describe_error(error, "entry", start)
    place, colon, rest = text.partition(":")
    place = place.replace("entry[", "entry ").replace("]", "", 1)
    return f"{place}{colon}{rest}; an entry has image_id, category_id, score and bbox [x, y, width, height]"


class _Columns:
    """Entries become arrays."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.number = 0
        self.pieces: dict[str, list[np.ndarray]] = {key: [] for key in ("image", "category", "score", "box", "region")}
        self.rles = PackedMasks()
        self.has_boxes: bool | None = None
        self.has_masks = False
        self._image: int | None = None
        self._known: dict[bytes, int] = {}  # segmentations of the image at hand, and where they are in rles
        self._decoder = msgspec.json.Decoder(list[_Mask])
        self._size: tuple[int, int] | None = None  # the last one that was right

    def add(self, entries: list[_Entry]) -> None:
        number = len(entries)
        regions = self._regions(entries)
        if self.has_boxes is None and entries:
            self.has_boxes = entries[0].bbox is not None
        for index, entry in enumerate(entries):
            if (entry.bbox is not None) != self.has_boxes or (entry.bbox is None and regions[index] < 0):
                raise ValueError(
                    f"{self.name}: entry {self.number + index} has {'no' if entry.bbox is None else 'a'} bbox; "
                    "expected [x, y, width, height] in every entry, or a segmentation in every entry and no bbox at all"
                )
        if self.has_boxes:
            numbers = (x for entry in entries for x in entry.bbox or ())
            self.pieces["box"].append(np.fromiter(numbers, np.float64, 4 * number).reshape(-1, 4))
        self.pieces["image"].append(np.fromiter((entry.image_id for entry in entries), np.int64, number))
        self.pieces["category"].append(np.fromiter((entry.category_id for entry in entries), np.int64, number))
        self.pieces["score"].append(np.fromiter((entry.score for entry in entries), np.float64, number))
        self.pieces["region"].append(np.array(regions, np.int64))
        self.number += number

    def _regions(self, entries: list[_Entry]) -> list[int]:
        """Return each entry's mask, -1 for none, and add those that are new."""
        regions: list[int] = []
        texts: list[bytes] = []
        users: list[int] = []
        for index, entry in enumerate(entries):
            raw = entry.segmentation
            text = b"null" if isinstance(raw, msgspec.UnsetType) else bytes(raw)
            if text == b"null":
                regions.append(-1)
                continue
            if entry.image_id != self._image:
                self._image, self._known = entry.image_id, {}
            region = self._known.get(text, -1)
            if region < 0:
                region = self._known[text] = len(self.rles) + len(texts)
                texts.append(text)
                users.append(index)
            regions.append(region)
        self.has_masks |= max(regions, default=-1) >= 0
        masks: list[_Mask | None] = [None] * len(texts)  # then one by one, to say which is wrong
        with suppress(msgspec.DecodeError, UnicodeDecodeError):
            masks = [*self._decoder.decode(b"[%b]" % b",".join(texts))]
        for index, text, mask in zip(users, texts, masks):
            self._add_mask(mask, text, f"{self.name}: entry {self.number + index}")
        return regions

    def _add_mask(self, mask: _Mask | None, text: bytes, say: str) -> None:
        if mask is None:
            with suppress(msgspec.DecodeError, UnicodeDecodeError):
                mask = msgspec.json.decode(text, type=_Mask)
        if mask is not None and isinstance(mask.counts, list):
            rle = compress_rle({"size": mask.size, "counts": mask.counts}, say)
            self.rles.append(rle["size"], rle["counts"])
        elif mask is not None and mask.counts and (mask.size == self._size or is_size(mask.size)):
            self._size = mask.size
            self.rles.append(mask.size, str(mask.counts).encode(errors="replace"))
        else:
            raise ValueError(
                f"{say}: expected a mask as compressed RLE, {{'size': [height, width], 'counts': '...'}}, of less than "
                f"2^32 pixels, got {text[:60].decode(errors='replace')!r}"
            )

    def results(self) -> Results:
        def column(key: str, dtype: type = np.int64) -> np.ndarray:
            return np.concatenate(self.pieces.pop(key) or [np.zeros(0, dtype)])

        region = column("region")
        if self.has_boxes is False:
            check_rles(self.rles, lambda i: f"{self.name}: entry {int((region == i).argmax())}")
        return Results(
            image_ids=column("image"),
            category_ids=column("category"),
            scores=column("score", np.float64),
            boxes=boxes_of(self.rles)[region] if self.has_boxes is False else column("box", np.float64).reshape(-1, 4),
            regions=region if self.has_masks else None,
            rles=self.rles if self.has_masks else None,
            name=self.name,
            boxes_of_masks=self.has_boxes is False,
        )


def write_results(results: Results, path: str | Path) -> None:
    """Write detections as COCO's results, a JSON list that appears whole or not at all."""
    encoder = msgspec.json.Encoder()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(b"[")
        for start in range(0, len(results), _PIECE):
            entries = map(encoder.encode, _entries(results, slice(start, start + _PIECE)))
            file.write(b",\n" * (start > 0) + b",\n".join(entries))
        file.write(b"]")


def _entries(results: Results, part: slice) -> Iterator[dict]:
    columns = (results.image_ids, results.category_ids, results.boxes, results.scores)
    keys = ("image_id", "category_id", "bbox", "score")
    for index, values in enumerate(zip(*(column[part].tolist() for column in columns)), part.start):
        entry = dict(zip(keys, values))
        if results.regions is not None and results.rles is not None:
            size, counts = results.rles[results.regions[index]].values()
            entry["segmentation"] = {"size": size, "counts": counts if isinstance(counts, str) else counts.decode()}
        yield entry
