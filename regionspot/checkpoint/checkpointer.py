"""Detectron2's checkpointer, safe, and for released checkpoints; ``load_model``."""

import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from regionspot.checkpoint.formats import fingerprint, load_checkpoint_file
from regionspot.checkpoint.key_layout import FROZEN, TRAINED, select, to_released_key
from regionspot.checkpoint.loading import find_recognizer, frozen_sources, load_weights, seeded_weights
from regionspot.utils.files import atomic_path
from regionspot.utils.unpickling import array_of, load_arrays

logger = logging.getLogger(__name__)


class SafeDetectionCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer for ``.pth`` and the model zoo's ``.pkl``, without running code from files.

    Files that it writes appear whole or not at all.
    """

    def save(self, name: str, is_last: bool = True, **kwargs: Any) -> None:
        """Save ``name``.pth, with ``kwargs`` beside the weights; without ``is_last`` it lacks the training state."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = self.weights_to_save()
        data.update({key: x.state_dict() for key, x in self.checkpointables.items() if is_last or key == "ema"})
        data.update(kwargs)
        path = f"{self.save_dir}/{name}.pth"
        # synced: last_checkpoint must not name a file that a loss of power has emptied
        with atomic_path(path, sync=True) as temporary:
            torch.save(data, temporary)
        logger.info("Saved checkpoint to %s", path)
        if is_last:
            self.tag_last_checkpoint(f"{name}.pth")

    def weights_to_save(self) -> dict[str, Any]:
        """Return the entries of a file that hold the model."""
        return {"model": self.model.state_dict()}

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_path(f"{self.save_dir}/last_checkpoint") as temporary:
            temporary.write_text(last_filename_basename)

    def _load_file(self, filename: str) -> dict[str, Any]:
        # By suffix, as Detectron2 does, whose own method would run the pickle.
        if filename.endswith(".pkl"):
            loaded = _read_pickled_weights(filename)
        else:
            loaded = load_checkpoint_file(filename)
            loaded = loaded if "model" in loaded else {"model": loaded}
        if not isinstance(loaded["model"], dict) or not all(isinstance(key, str) for key in loaded["model"]):
            raise ValueError(f"{filename}: expected a detector's weights by name, got {type(loaded['model']).__name__}")
        return loaded


class RegionSpotCheckpointer(SafeDetectionCheckpointer):
    """Detectron2's checkpointer for a model that holds a ``RegionRecognizer``.

    It saves the trained parts in the released key layout, with the fingerprints and files of the frozen parts. It
    loads such a file or a released checkpoint; frozen parts that the file lacks come from ``sam_weights`` and
    ``clip_weights``. After an error the model is unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        sam_weights: str = "",
        clip_weights: str = "",
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model: the model, wrapped for DDP or not.
            save_dir: directory to save to.
            sam_weights: SAM's weights (see ``resolve_weights``), or a checkpoint with them; "" leaves SAM as it is.
            clip_weights: CLIP's, likewise.
            checkpointables: saved and loaded beside the model.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.recognizer = find_recognizer(self.model)
        self.frozen_sources = {"sam": sam_weights, "clip_model": clip_weights}

    @classmethod
    def from_config(
        cls, cfg: CfgNode, model: nn.Module, save_dir: str = "", **checkpointables: Any
    ) -> "RegionSpotCheckpointer":
        """Return a checkpointer with the frozen parts of ``cfg.MODEL.REGIONSPOT.{SAM,CLIP}.WEIGHTS``."""
        sources = frozen_sources(cfg)
        return cls(model, save_dir, sam_weights=sources["sam"], clip_weights=sources["clip_model"], **checkpointables)

    def weights_to_save(self) -> dict[str, Any]:
        state, sources = self.recognizer.state_dict(), self.recognizer.weight_sources
        return {
            "model": {to_released_key(key): value for key, value in state.items() if key.startswith(TRAINED)},
            "integration": self.recognizer.settings,
            "frozen": {
                part: {"fingerprint": fingerprint(select(state, prefix)), "source": sources[part]}
                for part, prefix in FROZEN.items()
            },
        }

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load ``path`` (a file or URL; "" for none) and the frozen parts that it lacks.

        Returns the other contents of the file, such as ``iteration``; raises as ``load_weights``.
        """
        # A resumed run continues with the weights that the optimizer changed; all others want their average.
        is_resuming = checkpointables is None and "trainer" in self.checkpointables
        rest = load_weights(self.recognizer, path, self.frozen_sources, prefer_average=not is_resuming)
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in rest:
                self.checkpointables[key].load_state_dict(rest.pop(key))
        return rest


def _read_pickled_weights(filename: str) -> dict[str, Any]:
    data = load_arrays(Path(filename))
    # Three formats: Caffe2's {"blobs": weights}, plain weights, and Detectron2's {"model": weights, "__author__": ...}.
    blobs = data.get("blobs", data) if isinstance(data, dict) else None
    if not isinstance(blobs, dict):
        raise ValueError(f"{filename}: expected a pickled dict of weights, as in Detectron2's model zoo")
    if "model" in data and "__author__" in data:
        return {key: _unwrap_arrays(value) for key, value in data.items()}
    # as Detectron2 does: blobs of momentum are no weights, and names are matched by suffix
    weights = {key: value for key, value in _unwrap_arrays(blobs).items() if not str(key).endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _unwrap_arrays(value: Any) -> Any:
    return {key: array_of(item) for key, item in value.items()} if isinstance(value, dict) else array_of(value)


def load_model(cfg: CfgNode, resume: bool = False) -> Any:
    """Build the model of ``cfg``, of any meta-architecture, with its weights, in eval mode.

    The recognizer's ``weight_sources`` has the files of its parts. ``resume`` prefers the last checkpoint in
    ``OUTPUT_DIR`` to ``MODEL.WEIGHTS``.
    """
    with seeded_weights(cfg.SEED):
        model = build_model(cfg).eval()
    RegionSpotCheckpointer.from_config(cfg, model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return model
