"""RegionSpot's own format of proposals: memory-mapped safetensors."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from regionspot.data.proposals.arrays import ProposalArrays, gather_images

FORMAT = "regionspot-proposals-1"
_EXPECTED = {"image_ids": "I64", "offsets": "I64", "boxes": "F32", "scores": "F32", "labels": "I64"}
_OPTIONAL = ("scores", "labels")


def read_safetensors(path: Path) -> ProposalArrays:
    """Read ``image_ids`` (I,), ``offsets`` (I + 1,), ``boxes`` (N, 4) and, where present, ``scores``, ``labels`` (N,).

    Raises:
        ValueError: damaged, or other tensors; it names the tensor.
    """
    try:
        # PyTorch's tensors map the file, which NumPy's do not: pages are read when they are used
        with safe_open(path, framework="pt") as file:
            file_format = (file.metadata() or {}).get("format")
            if file_format != FORMAT:
                raise ValueError(
                    f"proposals {path}: expected safetensors of format {FORMAT!r}, got {file_format!r:.60}"
                )
            names = set(file.keys())
            present = [key for key in _EXPECTED if key in names or key not in _OPTIONAL]
            for key in present:
                if key not in names:
                    raise ValueError(f"proposals {path}: expected a tensor {key!r}, which is missing")
                _check_type(path, key, file.get_slice(key))
            columns = {key: file.get_tensor(key).numpy() for key in present}
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"proposals {path}: damaged safetensors ({error}); make or copy the file again") from error
    image_ids, offsets, boxes = columns["image_ids"], columns["offsets"], columns["boxes"]
    for key, length in (("offsets", len(image_ids) + 1), *((key, len(boxes)) for key in _OPTIONAL)):
        if key in columns and len(columns[key]) != length:
            raise ValueError(f"proposals {path}: {key}: expected {length} numbers, got {len(columns[key])}")
    if offsets[0] != 0 or offsets[-1] != len(boxes) or (offsets[1:] < offsets[:-1]).any():
        raise ValueError(f"proposals {path}: offsets: expected numbers that grow from 0 to {len(boxes)}, the boxes")
    return gather_images(path, image_ids, np.diff(offsets), boxes, columns.get("scores"), columns.get("labels"))


def _check_type(path: Path, key: str, tensor: Any) -> None:
    dtype, shape = _EXPECTED[key], tensor.get_shape()
    is_right_shape = len(shape) == 2 and shape[1] == 4 if key == "boxes" else len(shape) == 1
    if tensor.get_dtype() != dtype or not is_right_shape:
        expected = f"{dtype} (N, 4)" if key == "boxes" else f"{dtype} in one dimension"
        raise ValueError(f"proposals {path}: {key}: expected {expected}, got {tensor.get_dtype()} {tuple(shape)}")
