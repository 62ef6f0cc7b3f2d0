"""Our own form: safetensors, which are read from the disk as they are used."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from regionspot.data.proposals.arrays import ProposalArrays, gather_images

FORMAT = "regionspot-proposals-1"
_EXPECTED = {
    "image_ids": ("I64", 1),
    "offsets": ("I64", 1),
    "boxes": ("F32", 2),
    "scores": ("F32", 1),
    "labels": ("I64", 1),
}
_OPTIONAL = ("scores", "labels")


def read_tensors(path: Path) -> ProposalArrays:
    """Read ``image_ids`` (I,), ``offsets`` (I + 1,), ``boxes`` (N, 4) and, if they are there, ``scores``, ``labels``.

    Raises:
        ValueError: damaged, or other tensors; it names the tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:  # the tensors are maps of the file, read when they are used
            found = (file.metadata() or {}).get("format")
            if found != FORMAT:
                raise ValueError(f"proposals {path}: expected safetensors of format {FORMAT!r}, got {found!r:.60}")
            there = set(file.keys())
            for key, (dtype, dims) in _EXPECTED.items():
                _check(path, key, file.get_slice(key) if key in there else None, dtype, dims)
            columns = {key: file.get_tensor(key).numpy() for key in _EXPECTED if key in there}
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"proposals {path}: damaged safetensors ({error}); make or copy the file again") from error
    image_ids, offsets, boxes = columns["image_ids"], columns["offsets"], columns["boxes"]
    for key, number in (("offsets", len(image_ids) + 1), *((key, len(boxes)) for key in _OPTIONAL)):
        if key in columns and len(columns[key]) != number:
            raise ValueError(f"proposals {path}: {key}: expected {number} numbers, got {len(columns[key])}")
    if offsets[0] != 0 or offsets[-1] != len(boxes) or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"proposals {path}: offsets: expected numbers that grow from 0 to {len(boxes)}, the boxes")
    return gather_images(path, image_ids, np.diff(offsets), boxes, columns.get("scores"), columns.get("labels"))


def _check(path: Path, key: str, tensor: object, dtype: str, dims: int) -> None:
    if tensor is None:
        if key not in _OPTIONAL:
            raise ValueError(f"proposals {path}: expected a tensor {key!r}, which is missing")
        return
    shape = tensor.get_shape()  # type: ignore[attr-defined]
    if tensor.get_dtype() != dtype or len(shape) != dims or (key == "boxes" and shape[1] != 4):  # type: ignore[attr-defined]
        wanted = f"{dtype} (N, 4)" if dims == 2 else f"{dtype} in one dimension"
        raise ValueError(f"proposals {path}: {key}: expected {wanted}, got {tensor.get_dtype()} {tuple(shape)}")  # type: ignore[attr-defined]
