"""COCO's run-length encoded masks: encoded, measured, and checked before C code reads them.

``pycocotools`` crashes or hangs on a damaged RLE.
"""

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_utils
import torch

BATCH = 255  # with NumPy 2, pycocotools 2.0.11 fails for lists of 256 masks or more
MAX_PIXELS = 2**32 - 1  # pycocotools counts in 32 bits
# The part of a mask inside the box around its pixels, (h, w) uint8 0 or 1, and that box's top left corner (x, y).
CroppedMask = tuple[np.ndarray, tuple[int, int]]
_INTEGER = (int, np.integer)
_MAX_COORDINATE = 1e6  # pixels; pycocotools walks along each side of a polygon
_MAX_DIGITS = 7  # of 5 bits: enough for a 32-bit count and for the difference of two


class PackedRles(Sequence[dict]):
    """Compressed RLEs in one block of memory; an item is built when it is accessed."""

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
        index = range(len(self))[index]  # negative indices count from the end; raises IndexError
        return {"size": self._sizes[2 * index : 2 * index + 2].tolist(), "counts": self.counts(index)}

    def counts(self, index: int) -> bytes:
        """Return the encoded run lengths of a mask."""
        return bytes(self._counts[self._ends[index] : self._ends[index + 1]])

    def sizes(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return (N, 2) int64 heights and widths in pixels."""
        return np.array(self._sizes[2 * start : None if stop is None else 2 * stop], np.int64).reshape(-1, 2)


def encode_masks(masks: torch.Tensor) -> list[dict]:
    """Return COCO's compressed RLE, with ``counts`` as text, of (N, H, W) bool masks."""
    if masks.device.type == "cpu":
        rles = mask_utils.encode(np.asfortranarray(masks.permute(1, 2, 0).numpy().view(np.uint8)))
    else:
        rles = [mask_utils.frPyObjects(rle, *masks.shape[1:]) for rle in _count_runs(masks)]
    return [{"size": list(map(int, rle["size"])), "counts": rle["counts"].decode("ascii")} for rle in rles]


def _count_runs(masks: torch.Tensor) -> list[dict]:
    """Return uncompressed RLEs of (N, H, W) bool masks; only where pixels change leaves their device."""
    pixels = masks.transpose(1, 2).flatten(1)  # (N, H * W), column by column
    before = torch.cat([torch.zeros_like(pixels[:, :1]), pixels[:, :-1]], dim=1)  # runs begin with one of zeros
    rows, places = torch.where(pixels != before)
    ends = places.cpu().numpy()
    splits = np.searchsorted(rows.cpu().numpy(), np.arange(1, len(masks)))
    size, area = list(masks.shape[1:]), pixels.shape[1]
    return [
        {"size": size, "counts": np.diff(ends_of_mask, prepend=0, append=area).tolist()}
        for ends_of_mask in np.split(ends, splits)[: len(masks)]
    ]


def check_rles(rles: Sequence[dict], describe: Callable[[int], str], sizes: np.ndarray | None = None) -> PackedRles:
    """Return compressed RLEs, packed, if all of them are masks.

    Args:
        rles: ``{"size": [height, width], "counts": str or bytes}`` each.
        describe: returns the beginning of the message for the index of a damaged RLE: "predictions p.json: entry 3".
        sizes: (len(rles), 2) int64, the expected heights and widths in pixels; None accepts any.

    Raises:
        ValueError: counts that are not run lengths or do not sum to height * width, or another size.
    """
    if isinstance(rles, PackedRles):
        packed = rles
    else:
        packed = PackedRles()
        for index, rle in enumerate(rles):
            try:
                packed.append(*parse_rle(rle))
            except ValueError as error:
                raise ValueError(f"{describe(index)}: {error}") from error
    for start in range(0, len(packed), BATCH):
        stop = min(start + BATCH, len(packed))
        actual = packed.sizes(start, stop)
        damaged = _is_damaged([packed.counts(index) for index in range(start, stop)], actual.prod(axis=1))
        if damaged.any():
            index = int(damaged.argmax())
            height, width = actual[index]
            raise ValueError(
                f"{describe(start + index)}: the mask's RLE is damaged; expected counts of runs that sum to "
                f"{height} x {width} pixels, as pycocotools.mask.encode writes them"
            )
        if sizes is not None and (differs := (actual != sizes[start:stop]).any(axis=1)).any():
            index = int(differs.argmax())
            raise ValueError(
                f"{describe(start + index)}: expected a mask of the image's height and width "
                f"{sizes[start + index].tolist()}, got {actual[index].tolist()}; encode masks at the size of the "
                "original image"
            )
    return packed


def parse_rle(rle: Any) -> tuple[Sequence[int], bytes]:
    """Return the size and the compressed counts of an RLE, which may be uncompressed (``counts`` as a list of runs).

    Compressed counts are not checked here but by ``check_rles``, for many masks at once.

    Raises:
        ValueError: not ``{"size": [height, width], "counts": ...}``, or runs that do not sum to height * width.
    """
    fields: dict[str, Any] = rle if isinstance(rle, dict) else {}
    size: Any = fields.get("size")
    counts: Any = fields.get("counts")
    if isinstance(counts, list):
        # frPyObjects reads them in C, with no check
        are_runs = all(type(count) is int and count >= 0 for count in counts)
        if not are_runs or not is_size(size) or sum(counts) != size[0] * size[1]:
            raise ValueError(f"expected RLE whose counts sum to height x width, got size {size!r:.40} and other counts")
        counts = mask_utils.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"]
    if isinstance(counts, str):
        counts = counts.encode(errors="replace")
    if not isinstance(counts, bytes) or not counts or not is_size(size):
        raise ValueError(
            "expected a mask as compressed RLE, {'size': [height, width], 'counts': '...'}, of less than 2^32 pixels, "
            f"got {rle!r:.80}"
        )
    return size, counts


def encode_polygons(polygons: Any, size: tuple[int, int]) -> dict:
    """Return the union of polygons as compressed RLE, rasterized as ``lvis`` and ``pycocotools`` do.

    Args:
        polygons: ``[[x0, y0, x1, y1, ...], ...]`` in pixels.
        size: (height, width) of the image.

    Raises:
        ValueError: no polygon, or one with fewer than three points, an odd number of values or a point far outside.
    """
    valid = isinstance(polygons, list) and len(polygons) > 0
    for polygon in polygons if valid else ():
        valid = valid and isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
        valid = valid and all(type(x) in (int, float) and abs(x) <= _MAX_COORDINATE for x in polygon)
    if not valid:
        raise ValueError("expected polygons [[x0, y0, x1, y1, x2, y2, ...], ...] in pixels, or RLE")
    return mask_utils.merge(mask_utils.frPyObjects(polygons, *size))


def mask_areas(rles: Sequence[dict]) -> np.ndarray:
    """Return (len(rles),) float64 areas in pixels."""
    batches = [mask_utils.area(list(rles[i : i + BATCH])) for i in range(0, len(rles), BATCH)]
    return np.concatenate(batches).astype(np.float64) if batches else np.zeros(0)


def mask_boxes(rles: Sequence[dict]) -> np.ndarray:
    """Return (len(rles), 4) float64 XYWH boxes around masks, in pixels."""
    batches = [mask_utils.toBbox(list(rles[i : i + BATCH])) for i in range(0, len(rles), BATCH)]
    return np.concatenate(batches).astype(np.float64) if batches else np.zeros((0, 4))


def crop_rle(rle: dict) -> CroppedMask | None:
    """Decode a valid RLE (see ``check_rles``), no more of it than the box around its pixels; None if it has none."""
    x, y, width, height = mask_utils.toBbox(rle).astype(int).tolist()
    if not width or not height:
        return None
    return np.ascontiguousarray(mask_utils.decode(rle)[y : y + height, x : x + width]), (x, y)


def is_size(size: Any) -> bool:
    """Return whether ``size`` is a (height, width) whose pixels pycocotools can count."""
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        return False
    height, width = size
    are_integers = isinstance(height, _INTEGER) and isinstance(width, _INTEGER)
    # Python integers cannot overflow in the product, NumPy's can
    return are_integers and height > 0 and width > 0 and int(height) * int(width) <= MAX_PIXELS


def _is_damaged(texts: list[bytes], pixels: np.ndarray) -> np.ndarray:
    """Return (N,) bool: the text is not a sequence of run lengths >= 0 that sum to ``pixels``.

    A number is written in digits of 5 bits, lowest first, one character each, counted from "0". Bit 32 means that
    another digit follows, bit 16 of the last digit that the number is negative. From the fourth on, a run length is
    written as the difference to the last but one.
    """
    # 1. The characters of all texts, one after the other, and where each text ends.
    codes = np.frombuffer(b"".join(texts), np.uint8) - np.uint8(48)  # characters below "0" wrap to large numbers
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    ends = lengths.cumsum()
    damaged = np.maximum.reduceat(codes, ends - lengths) > 63

    # 2. The numbers, at most 7 digits long: (V,) in all texts.
    is_last = codes & 32 == 0
    damaged |= ~is_last[ends - 1]
    is_last[ends - 1] = True  # so that a damaged text does not run on into the next one

    last = np.flatnonzero(is_last)  # of each number
    first = np.concatenate([[0], last[:-1] + 1])
    num_digits = last - first + 1
    low = (codes & 31).astype(np.int64)
    values = low[first]
    for place in range(1, min(int(num_digits.max()), _MAX_DIGITS)):
        longer = np.flatnonzero(num_digits > place)
        values[longer] |= low[first[longer] + place] << (5 * place)
    negative = np.flatnonzero(codes[last] & 16)
    values[negative] -= np.int64(1) << (5 * np.minimum(num_digits[negative], _MAX_DIGITS))

    # 3. Run lengths from differences. In a table of two columns, in which each text begins a row, the last but one
    #    number is the one above: run lengths are the columns' cumulative sums, less those before the text.
    stop = np.searchsorted(last, ends - 1) + 1
    num_values = np.diff(stop, prepend=0)  # (N,), of each text
    rows = (num_values + 1) // 2  # (N,)
    begin = rows.cumsum() - rows
    owner = np.repeat(np.arange(len(texts)), num_values)  # (V,), the text of each number
    damaged[owner[num_digits > _MAX_DIGITS]] = True
    table = np.zeros(2 * int(rows.sum()), np.int64)
    table[np.arange(len(values)) + (2 * begin - (stop - num_values))[owner]] = values
    first_runs = table[2 * begin]
    table[2 * begin] = 0  # the third number is a run length, not a difference to the first
    sums = table.reshape(-1, 2).cumsum(axis=0)
    before = np.where(begin[:, None] > 0, sums[begin - 1], 0)
    runs, starts = (sums - np.repeat(before, rows, axis=0)).reshape(-1), 2 * begin
    runs[starts] = first_runs
    runs[(starts + 2 * rows - 1)[num_values % 2 == 1]] = 0  # the unused cell of an odd number of runs

    # 4. The lengths must be what pycocotools' counters hold, and fill the mask.
    outside = (np.minimum.reduceat(runs, starts) < 0) | (np.maximum.reduceat(runs, starts) > MAX_PIXELS)
    return damaged | outside | (np.add.reduceat(runs, starts) != pixels)
