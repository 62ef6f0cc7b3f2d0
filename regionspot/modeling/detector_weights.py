"""Weights of Detectron2 detectors, read without running code that a file may hold."""

from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from regionspot.utils.unpickling import array_of, load_arrays
from regionspot.weights import load_checkpoint_file


class SafeDetectionCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer for its own formats: ``.pth``, and ``.pkl`` of arrays as in its model zoo."""

    def _load_file(self, filename: str) -> dict[str, Any]:
        if not filename.endswith(".pkl"):
            loaded = load_checkpoint_file(filename)
            return loaded if "model" in loaded else {"model": loaded}
        data = _plain(load_arrays(Path(filename)))
        if "model" in data and "__author__" in data:
            return data
        data = data.get("blobs", data)  # of Caffe2
        weights = {key: value for key, value in data.items() if not key.endswith("_momentum")}
        return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _plain(value: Any) -> Any:
    """Return what a pickle held with its arrays as arrays."""
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else array_of(value)
