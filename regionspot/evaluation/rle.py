"""COCO's run-length encoded masks: checked before C code reads them, which crashes or hangs on wrong ones."""

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils

BATCH = 255  # masks that are decoded at one time; with NumPy 2 pycocotools 2.0.11 takes no more at once
MAX_PIXELS = 2**32 - 1  # pycocotools counts in 32 bits
_MAX_POLYGON = 1e6  # pixels; pycocotools walks along every side of a polygon
_MAX_DIGITS = 7  # of 5 bits: what a count of 32 bits and its difference to another may need


class PackedMasks(Sequence[dict]):
    """Compressed RLEs that lie in one piece of memory; an item is made when it is asked for."""

    def __init__(self) -> None:
        self._counts = bytearray()
        self._ends = array("q", [0])
        self._sizes = array("q")

    def append(self, size: Sequence[int], counts: bytes) -> None:
        """Add a mask of (height, width) pixels."""
        self._counts += counts
        self._ends.append(len(self._counts))
        self._sizes.extend(size)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        """Return ``{"size": [height, width], "counts": bytes}``, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative ones count from the end; IndexError
        return {"size": self._sizes[2 * index : 2 * index + 2].tolist(), "counts": self.counts(index)}

    def counts(self, index: int) -> bytes:
        """Return what a mask's runs are written as."""
        return bytes(self._counts[self._ends[index] : self._ends[index + 1]])

    @property
    def sizes(self) -> np.ndarray:
        """(N, 2) int64 heights and widths, pixels."""
        return np.array(self._sizes, np.int64).reshape(-1, 2)


def sizes_of(rles: Sequence[dict]) -> np.ndarray:
    """Return (len(rles), 2) int64 heights and widths, pixels."""
    return rles.sizes if isinstance(rles, PackedMasks) else np.array([r["size"] for r in rles], np.int64).reshape(-1, 2)


def check_rles(rles: Sequence[dict], say: Callable[[int], str], sizes: np.ndarray | None = None) -> None:
    """Refuse compressed RLEs that are no masks.

    Args:
        rles: of ``{"size": [height, width], "counts": str or bytes}``.
        say: called with the position of a wrong one, returns how the error begins ("predictions p.json: entry 3").
        sizes: (len(rles), 2) int64, the heights and widths that are expected, in pixels; None for any.

    Raises:
        ValueError: counts that are no run lengths or do not sum to height * width, or another size.
    """
    for start in range(0, len(rles), BATCH):
        stop = min(start + BATCH, len(rles))
        if isinstance(rles, PackedMasks):  # whose sizes and types are known to be right
            texts = [rles.counts(index) for index in range(start, stop)]
            found: np.ndarray = np.array(rles._sizes[2 * start : 2 * stop], np.int64).reshape(-1, 2)
        else:
            both = [_size_and_counts(rles[index], say, index) for index in range(start, stop)]
            texts, found = [text for _, text in both], np.array([size for size, _ in both], np.int64)
        wrong = _wrong_counts(texts, found.prod(axis=1))
        if wrong.any():
            index = int(wrong.argmax())
            height, width = found[index]
            raise ValueError(
                f"{say(start + index)}: the mask's RLE is damaged; expected counts of runs that sum to "
                f"{height} x {width} pixels, as pycocotools.mask.encode writes them"
            )
        if sizes is not None and (differs := (found != sizes[start : start + BATCH]).any(axis=1)).any():
            index = int(differs.argmax())
            expected, got = sizes[start + index].tolist(), found[index].tolist()
            raise ValueError(
                f"{say(start + index)}: expected a mask of the image's height and width {expected}, got {got}; "
                "encode masks at the size of the original image"
            )


def compress_rle(rle: dict, say: str) -> dict:
    """Return an uncompressed RLE, ``{"size": [height, width], "counts": [run, ...]}``, compressed.

    Raises:
        ValueError: it is not of this form, or the runs do not sum to height * width; ``say`` begins the message.
    """
    size: Any = rle.get("size")
    counts: Any = rle.get("counts")
    size = list(size) if isinstance(size, (list, tuple)) else size
    good = isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts)
    if not good or not is_size(size) or sum(counts) != size[0] * size[1]:
        raise ValueError(f"{say}: expected RLE whose counts sum to height x width, got size {size} and other counts")
    return mask_utils.frPyObjects({"size": size, "counts": counts}, *size)


def encode_polygons(polygons: Any, size: tuple[int, int], say: str) -> dict:
    """Return the mask that the union of polygons covers, as ``lvis`` and ``pycocotools`` draw it, as compressed RLE.

    Args:
        polygons: ``[[x0, y0, x1, y1, ...], ...]`` in pixels.
        size: (height, width) of the image.
        say: how an error begins.

    Raises:
        ValueError: none, or one with fewer than three points, an odd number or a point far outside.
    """
    good = isinstance(polygons, list) and len(polygons) > 0
    for polygon in polygons if good else ():
        good = good and isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        good = good and all(type(x) in (int, float) and abs(x) <= _MAX_POLYGON for x in polygon)
    if not good:
        raise ValueError(f"{say}: expected polygons [[x0, y0, x1, y1, x2, y2, ...], ...] in pixels, or RLE")
    return mask_utils.merge(mask_utils.frPyObjects(polygons, *size))


def areas_of(rles: Sequence[dict]) -> np.ndarray:
    """Return (len(rles),) float64 areas in pixels."""
    parts = [mask_utils.area(list(rles[i : i + BATCH])) for i in range(0, len(rles), BATCH)]
    return np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)


def boxes_of(rles: Sequence[dict]) -> np.ndarray:
    """Return (len(rles), 4) float64 XYWH boxes around masks, in pixels."""
    parts = [mask_utils.toBbox(list(rles[i : i + BATCH])) for i in range(0, len(rles), BATCH)]
    return np.concatenate(parts).astype(np.float64) if parts else np.zeros((0, 4))


def is_size(size: Any) -> bool:
    """Return whether it is a height and a width in pixels that pycocotools can count."""
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        return False
    return (
        all(isinstance(x, (int, np.integer)) and 0 < x <= MAX_PIXELS for x in size)
        and int(size[0]) * int(size[1]) <= MAX_PIXELS
    )


def _size_and_counts(rle: Any, say: Callable[[int], str], index: int) -> tuple[Sequence[int], bytes]:
    size: Any = rle.get("size") if isinstance(rle, dict) else None
    counts = rle.get("counts") if isinstance(rle, dict) else None
    if isinstance(counts, str) and counts.isascii():
        counts = counts.encode()
    if not isinstance(counts, bytes) or not counts or not is_size(size):
        raise ValueError(
            f"{say(index)}: expected a mask as compressed RLE, {{'size': [height, width], 'counts': '...'}}, "
            f"of at most 2^32 pixels, got {str(rle)[:80]}"
        )
    return size, counts


def _wrong_counts(texts: list[bytes], pixels: np.ndarray) -> np.ndarray:
    """Return (N,) bool: the text is no sequence of run lengths >= 0 that sum to ``pixels``.

    A count is written in digits of 5 bits, the lowest first, each as one character from "0" on; bit 32 says that
    another follows, bit 16 of the last that the number is negative. From the fourth on, counts are written as the
    difference to the last but one.
    """
    codes = np.frombuffer(b"".join(texts), np.uint8) - np.uint8(48)  # a sign before "0" becomes a large number
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    ends = lengths.cumsum()
    wrong = np.maximum.reduceat(codes, ends - lengths) > 63
    is_last = codes & 32 == 0
    wrong |= ~is_last[ends - 1]
    is_last[ends - 1] = True  # so that a wrong text does not run on into the next one

    last = np.flatnonzero(is_last)  # of each number
    first = np.concatenate([[0], last[:-1] + 1])
    digits = last - first + 1
    low = (codes & 31).astype(np.int64)
    values = low[first]
    for place in range(1, min(int(digits.max()), _MAX_DIGITS)):
        longer = np.flatnonzero(digits > place)
        values[longer] |= low[first[longer] + place] << (5 * place)
    negative = np.flatnonzero(codes[last] & 16)
    values[negative] -= np.int64(1) << (5 * np.minimum(digits[negative], _MAX_DIGITS))

    # Two columns, in which each text begins with a row of its own: the last but one is the one above.
    stop = np.searchsorted(last, ends - 1) + 1
    number = np.diff(stop, prepend=0)  # of numbers in each text
    rows = (number + 1) // 2
    begin = rows.cumsum() - rows
    owner = np.repeat(np.arange(len(texts)), number)
    wrong[owner[digits > _MAX_DIGITS]] = True
    table = np.zeros(2 * int(rows.sum()), np.int64)
    table[np.arange(len(values)) + (2 * begin - (stop - number))[owner]] = values
    zeroth = table[2 * begin]
    table[2 * begin] = 0  # no difference is to the first count
    sums = table.reshape(-1, 2).cumsum(axis=0)
    before = np.where(begin[:, None] > 0, sums[begin - 1], 0)
    counts = sums - np.repeat(before, rows, axis=0)
    flat, starts = counts.reshape(-1), 2 * begin
    flat[starts] = zeroth
    flat[(starts + 2 * rows - 1)[number % 2 == 1]] = 0  # the place that an odd number leaves
    outside = (np.minimum.reduceat(flat, starts) < 0) | (np.maximum.reduceat(flat, starts) > MAX_PIXELS)
    return wrong | outside | (np.add.reduceat(flat, starts) != pixels)
