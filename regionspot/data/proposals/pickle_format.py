"""Detectron2's pickle of proposals: which containers it has, and what they must hold."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from regionspot.data.proposals.arrays import ProposalArrays, gather_images
from regionspot.utils.unpickling import array_of, describe, load_arrays


@np.errstate(over="ignore", invalid="ignore")  # boxes with infinity or NaN are dropped later
def read_pickle(path: Path) -> ProposalArrays:
    """Read ``{"ids", "boxes", "objectness_logits", "bbox_mode"}``, or Detectron's ``indexes`` and ``scores``.

    ``labels`` (a list of integer arrays) are optional. Scores are logits if ``scores_are`` is "logits", which our own
    files have; without it their range decides.

    Raises:
        ValueError: not such a pickle, or it holds anything but arrays and plain containers.
    """
    proposals = load_arrays(path)
    if type(proposals) is not dict:
        raise ValueError(f"proposals {path}: expected a pickled dict, got {describe(proposals)}")
    ids = _items(path, "ids", proposals.get("ids", proposals.get("indexes")), None)
    boxes = [_boxes(path, i, item) for i, item in enumerate(_items(path, "boxes", proposals.get("boxes"), len(ids)))]
    lengths = np.array([len(item) for item in boxes], np.int64)
    scores = proposals.get("objectness_logits", proposals.get("scores"))
    all_scores = None if scores is None else _column(path, "scores", scores, lengths, np.float64)
    labels = proposals.get("labels")
    all_labels = None if labels is None else _column(path, "labels", labels, lengths, np.int64)
    # float64 until XYWH is added up: rounded to float32 once
    all_boxes = np.concatenate([np.zeros((0, 4)), *boxes])  # (N, 4)
    mode = proposals.get("bbox_mode", 0)
    if type(mode) is not int or mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
        raise ValueError(f"proposals {path}: bbox_mode: expected XYXY_ABS (0) or XYWH_ABS (1), got {describe(mode)}")
    if mode == BoxMode.XYWH_ABS:
        all_boxes[:, 2:] += all_boxes[:, :2]
    are_logits = proposals.get("scores_are") == "logits"
    image_ids, all_boxes = _image_ids(path, ids), all_boxes.astype(np.float32)
    return gather_images(path, image_ids, lengths, all_boxes, all_scores, all_labels, are_logits)


def _items(path: Path, key: str, value: Any, num_images: int | None) -> Any:
    value = array_of(value)
    if not (isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim)):
        got = "nothing" if value is None else describe(value)
        raise ValueError(f"proposals {path}: {key}: expected a list with an item for each image, got {got}")
    if num_images is not None and len(value) != num_images:
        raise ValueError(f"proposals {path}: {key}: expected {num_images} items, as there are ids, got {len(value)}")
    return value


def _image_ids(path: Path, ids: Any) -> np.ndarray:
    image_ids: list[int] = []
    for index, item in enumerate(ids):
        # an array's items are NumPy scalars, and some tools write image ids as strings
        item = item.item() if isinstance(item, np.generic) else item
        if type(item) is str and re.fullmatch(r"-?[0-9]{1,18}", item):
            item = int(item)
        if type(item) is not int or abs(item) >= 2**63:
            raise ValueError(f"proposals {path}: ids[{index}]: expected an image id (an integer), got {describe(item)}")
        image_ids.append(item)
    return np.array(image_ids, np.int64)


def _boxes(path: Path, index: int, item: Any) -> np.ndarray:
    """Return (n, 4) float64 of an image's item: an array, or a list with four numbers for each box."""
    item = array_of(item)
    if isinstance(item, (list, tuple)) and all(_are_numbers(row) and len(row) == 4 for row in item):
        item = _to_floats(item).reshape(-1, 4)
    if isinstance(item, np.ndarray) and item.dtype.kind in "fiu":
        if item.ndim == 2 and item.shape[1] == 4:
            return item.astype(np.float64)
        if item.size == 0 and item.ndim <= 2:  # np.array([]) of an image without boxes
            return np.zeros((0, 4))
    raise ValueError(f"proposals {path}: boxes[{index}]: expected an array of shape (n, 4), got {_describe(item)}")


def _column(path: Path, key: str, value: Any, lengths: np.ndarray, dtype: type) -> np.ndarray:
    """Return (N,) of ``dtype`` from an array or a list of numbers for each image."""
    kinds, expected, convert = (
        ("fiu", "numbers", _to_floats) if dtype is np.float64 else ("iu", "integers", _to_integers)
    )
    columns: list[np.ndarray] = [np.zeros(0, dtype)]
    for index, item in enumerate(_items(path, key, value, len(lengths))):
        item = array_of(item)
        if _are_numbers(item):
            item = convert(item)
        if isinstance(item, np.ndarray) and item.ndim == 2 and item.shape[1] == 1:  # one column of an array
            item = item[:, 0]
        is_column = isinstance(item, np.ndarray) and (item.dtype.kind in kinds or not item.size)
        if not is_column or item.shape != (lengths[index],):
            raise ValueError(
                f"proposals {path}: {key}[{index}]: expected {lengths[index]} {expected}, got {_describe(item)}"
            )
        columns.append(item.astype(dtype))
    return np.concatenate(columns)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and all(type(value) in (int, float) for value in values)


def _describe(item: Any) -> str:
    return f"shape {item.shape} of {item.dtype}" if isinstance(item, np.ndarray) else describe(item)


def _to_floats(values: Any) -> np.ndarray:
    try:
        return np.array(values, np.float64)
    except OverflowError:  # an integer of more than 308 digits; its box is dropped
        return np.full(np.shape(values), np.inf)


def _to_integers(values: Any) -> np.ndarray:
    # type() and not isinstance: True is an int, too.
    are_integers = all(type(value) is int and abs(value) < 2**63 for value in values)
    return np.array(values, np.int64 if are_integers else np.float64)  # float64 is refused
