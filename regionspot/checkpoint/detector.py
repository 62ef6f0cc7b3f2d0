"""Weights of Detectron2 detectors, read without running code that a file may hold."""

from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from regionspot.checkpoint.weights import load_checkpoint_file
from regionspot.utils.unpickling import array_of, load_arrays


class SafeDetectionCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer for its own formats: ``.pth``, and ``.pkl`` of arrays as in its model zoo."""

    def _load_file(self, filename: str) -> dict[str, Any]:
        if not filename.endswith(".pkl"):
            loaded = load_checkpoint_file(filename)
            loaded = loaded if "model" in loaded else {"model": loaded}
        else:
            loaded = _read_pickle(filename)
        if not isinstance(loaded["model"], dict) or not all(isinstance(key, str) for key in loaded["model"]):
            raise ValueError(f"{filename}: expected a detector's weights by name, got {type(loaded['model']).__name__}")
        return loaded


def _read_pickle(filename: str) -> dict[str, Any]:
    data = load_arrays(Path(filename))
    blobs = data.get("blobs", data) if isinstance(data, dict) else None  # of Caffe2
    if not isinstance(blobs, dict):
        raise ValueError(f"{filename}: expected a pickled dict of weights, as in Detectron2's model zoo")
    if "model" in data and "__author__" in data:
        return {key: _plain(value) for key, value in data.items()}
    weights = {key: value for key, value in _plain(blobs).items() if not str(key).endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _plain(value: Any) -> Any:
    """Return weights of a pickle with their arrays as arrays."""
    return {key: array_of(item) for key, item in value.items()} if isinstance(value, dict) else array_of(value)
