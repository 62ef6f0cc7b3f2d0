"""Detectron2's proposal pickle: what the containers in it must be."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from regionspot.data.proposals.arrays import ProposalArrays, gather_images
from regionspot.utils.unpickling import array_of, describe, load_arrays


def read_pickle(path: Path) -> ProposalArrays:
    """Read ``{"ids", "boxes", "objectness_logits", "bbox_mode"}``, or Detectron's ``indexes`` and ``scores``.

    ``labels`` (a list of integer arrays) are read if they are there. If ``scores_are`` is there and says "logits", the
    scores are; otherwise the numbers tell.

    Raises:
        ValueError: not such a pickle, or it holds anything but arrays and plain containers.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # to infinity and NaN, which are left out later
        return _gather(path, load_arrays(path))


def _gather(path: Path, proposals: Any) -> ProposalArrays:
    if type(proposals) is not dict:
        raise ValueError(f"proposals {path}: expected a pickled dict, got {describe(proposals)}")
    ids = _items(path, "ids", proposals.get("ids", proposals.get("indexes")), None)
    boxes = [_boxes(path, i, item) for i, item in enumerate(_items(path, "boxes", proposals.get("boxes"), len(ids)))]
    lengths = np.array([len(item) for item in boxes], np.int64)
    scores = proposals.get("objectness_logits", proposals.get("scores"))
    all_scores = None if scores is None else _column(path, "scores", scores, lengths, "fiu", np.float64)
    labels = proposals.get("labels")
    all_labels = None if labels is None else _column(path, "labels", labels, lengths, "iu", np.int64)
    every = np.concatenate([np.zeros((0, 4)), *boxes])
    mode = proposals.get("bbox_mode", 0)
    if type(mode) is not int or mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        raise ValueError(f"proposals {path}: bbox_mode: expected XYXY_ABS (0) or XYWH_ABS (1), got {describe(mode)}")
    if mode == BoxMode.XYWH_ABS:
        every[:, 2:] += every[:, :2]
    every = every.astype(np.float32)
    are_logits = proposals.get("scores_are") == "logits"
    return gather_images(path, _image_ids(path, ids), lengths, every, all_scores, all_labels, are_logits)


def _items(path: Path, key: str, value: Any, number: int | None) -> Any:
    value = array_of(value)
    if not (isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim)):
        got = "nothing" if value is None else describe(value)
        raise ValueError(f"proposals {path}: {key}: expected a list with an item for each image, got {got}")
    if number is not None and len(value) != number:
        raise ValueError(f"proposals {path}: {key}: expected {number} items, as there are ids, got {len(value)}")
    return value


def _image_ids(path: Path, ids: Any) -> np.ndarray:
    result: list[int] = []
    for index, item in enumerate(ids):
        item = item.item() if isinstance(item, np.generic) else item
        if type(item) is str and re.fullmatch(r"-?[0-9]{1,18}", item):
            item = int(item)
        if type(item) is not int or abs(item) >= 2**63:
            raise ValueError(f"proposals {path}: ids[{index}]: expected an image id (an integer), got {describe(item)}")
        result.append(item)
    return np.array(result, np.int64)


def _boxes(path: Path, index: int, item: Any) -> np.ndarray:
    """Return (n, 4) float64 of an image's entry: an array, or a list of four numbers a box."""
    item = array_of(item)
    if isinstance(item, (list, tuple)) and all(
        isinstance(row, (list, tuple)) and len(row) == 4 and all(type(x) in (int, float) for x in row) for row in item
    ):
        item = _to_numbers(item).reshape(-1, 4)
    if isinstance(item, np.ndarray) and item.dtype.kind in "fiu":
        if item.ndim == 2 and item.shape[1] == 4:
            return item.astype(np.float64)
        if item.size == 0 and item.ndim <= 2:
            return np.zeros((0, 4))
    got = f"shape {item.shape} of {item.dtype}" if isinstance(item, np.ndarray) else describe(item)
    raise ValueError(f"proposals {path}: boxes[{index}]: expected an array of shape (n, 4), got {got}")


def _column(path: Path, key: str, value: Any, lengths: np.ndarray, kinds: str, dtype: type) -> np.ndarray:
    """Return (N,) of what the file has for each box: lists of arrays or of numbers."""
    result: list[np.ndarray] = [np.zeros(0, dtype)]
    for index, item in enumerate(_items(path, key, value, len(lengths))):
        item = array_of(item)
        if isinstance(item, (list, tuple)) and all(type(x) in (int, float) for x in item):
            item = _to_numbers(item) if kinds == "fiu" or not item else _to_integers(item)
        if isinstance(item, np.ndarray) and item.ndim == 2 and item.shape[1] == 1:
            item = item[:, 0]
        is_column = isinstance(item, np.ndarray) and (item.dtype.kind in kinds or not item.size)
        if not is_column or item.shape != (lengths[index],):
            got = f"shape {item.shape} of {item.dtype}" if isinstance(item, np.ndarray) else describe(item)
            what = "numbers" if kinds == "fiu" else "integers"
            raise ValueError(f"proposals {path}: {key}[{index}]: expected {lengths[index]} {what}, got {got}")
        result.append(item.astype(dtype))
    return np.concatenate(result)


def _to_numbers(values: Any) -> np.ndarray:
    """Return float64; integers that have no float become infinity."""
    try:
        return np.array(values, np.float64)
    except OverflowError:
        return np.full(np.shape(values), np.inf)


def _to_integers(values: Any) -> np.ndarray:
    fits = all(type(value) is int and abs(value) < 2**63 for value in values)
    return np.array(values, np.int64 if fits else np.float64)
