"""Checkpoints: the released ones are read as they are, our own hold what is trained and name what is frozen."""

import logging
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import nn

from regionspot.modeling.key_layout import (
    CLIP_EXTRAS,
    FROZEN,
    TRAINED,
    is_released_key,
    to_recognizer_key,
    to_released_key,
)
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.utils.files import atomic_path
from regionspot.weights import fingerprint, load_checkpoint_file, resolve_weights

logger = logging.getLogger(__name__)


class RegionSpotCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer for a model that holds a ``RegionRecognizer``.

    It saves, in the released key layout, the trained parts only, with the fingerprints of the frozen ones and where
    they came from. It loads such a file or a released checkpoint, with or without its frozen parts; frozen parts
    that the file lacks come from ``sam_weights`` and ``clip_weights``. No file is ever executed, and a file that is
    refused leaves the model as it was.

    Attributes:
        loaded: the parts that hold weights from a file: "trained", "sam", "clip_model".
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
            save_dir: where to save.
            sam_weights: SAM's weights, see ``regionspot.weights.resolve_weights``, or a checkpoint that holds them;
                "" leaves them as they are.
            clip_weights: likewise CLIP's.
            checkpointables: saved and loaded beside the model.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.recognizer = find_recognizer(self.model)
        self.frozen_sources = {"sam": sam_weights, "clip_model": clip_weights}
        self.loaded: set[str] = set()

    @classmethod
    def from_config(
        cls, cfg: CfgNode, model: nn.Module, save_dir: str = "", **checkpointables: Any
    ) -> "RegionSpotCheckpointer":
        """Return a checkpointer that takes the frozen parts from ``cfg.MODEL.REGIONSPOT.{SAM,CLIP}.WEIGHTS``."""
        node = cfg.MODEL.REGIONSPOT
        return cls(model, save_dir, sam_weights=node.SAM.WEIGHTS, clip_weights=node.CLIP.WEIGHTS, **checkpointables)

    def save(self, name: str, is_last: bool = True, **kwargs: Any) -> None:
        """Save ``name``.pth with what is in ``kwargs``.

        ``is_last`` makes it the one that training resumes from; one that is not holds no state of the training.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        state = self.recognizer.state_dict()
        data = {
            "model": {to_released_key(key): value for key, value in state.items() if key.startswith(TRAINED)},
            "frozen": {
                part: {"fingerprint": fingerprint(_part(state, prefix)), "source": self.frozen_sources[part]}
                for part, prefix in FROZEN.items()
            },
        }
        kept = self.checkpointables if is_last else {k: v for k, v in self.checkpointables.items() if k == "ema"}
        data.update({key: value.state_dict() for key, value in kept.items()})
        data.update(kwargs)
        path = f"{self.save_dir}/{name}.pth"
        with atomic_path(path, sync=True) as temporary:
            torch.save(data, temporary)
        logger.info("Saved checkpoint to %s", path)
        if is_last:
            self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_path(f"{self.save_dir}/last_checkpoint") as temporary:
            temporary.write_text(last_filename_basename)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load ``path`` (a file or URL; "" for none), and the frozen parts that it does not hold.

        Of a file that also holds averaged weights (``SOLVER.EMA``) these are taken, unless training is resumed.

        Returns:
            What else the file held, such as ``iteration``.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged file, no RegionSpot checkpoint, one of another variant, or one that was trained
                with other frozen parts.
        """
        checkpoint: dict[str, Any] = {}
        state: dict[str, torch.Tensor] = {}
        if path:
            file = resolve_weights(
                path if "://" not in path or path.startswith("http") else PathManager.get_local_path(path)
            )
            checkpoint = load_checkpoint_file(file)
            state = to_recognizer_state(unwrap_state(checkpoint, str(file)), str(file))
            checkpoint = {key: value for key, value in checkpoint.items() if not isinstance(value, torch.Tensor)}
            resuming = checkpointables is None and "trainer" in self.checkpointables
            if "ema" in checkpoint and not resuming:
                state.update({TRAINED + key: value for key, value in checkpoint["ema"].items()})
        expected = _expected_fingerprints(checkpoint.pop("frozen", {}), path)
        for part, prefix in FROZEN.items():
            if any(key.startswith(prefix) for key in state):
                self.frozen_sources[part] = str(file)
            else:
                state.update(self._read_frozen(part, expected.get(part, {}).get("source", "")))
        self._check_fingerprints(state, expected, path)
        _load_strictly(self.recognizer, state, path)
        prefixes = {"trained": TRAINED, **FROZEN}
        self.loaded = {part for part, prefix in prefixes.items() if any(key.startswith(prefix) for key in state)}
        logger.info(
            "Loaded %s from %s", ", ".join(sorted(self.loaded)) or "nothing", [path, *self.frozen_sources.values()]
        )
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in checkpoint:
                self.checkpointables[key].load_state_dict(checkpoint.pop(key))
        return checkpoint

    def _read_frozen(self, part: str, recorded: str) -> dict[str, torch.Tensor]:
        """Read a frozen part from where a checkpoint had it from, if that file is still there, else as configured."""
        source = recorded if recorded and Path(recorded).is_file() else self.frozen_sources[part]
        self.frozen_sources[part] = source
        if not source:
            logger.warning(
                "No weights are given for %s: it keeps those it has, random ones if nothing was loaded", part
            )
            return {}
        state = unwrap_state(load_checkpoint_file(resolve_weights(source)), source)
        if any(is_released_key(key) for key in state):  # a RegionSpot checkpoint that holds the part
            renamed = {target: value for key, value in state.items() if (target := to_recognizer_key(key)) is not None}
            return {key: value for key, value in renamed.items() if key.startswith(FROZEN[part])}
        return {FROZEN[part] + key: value for key, value in state.items() if key not in CLIP_EXTRAS}

    def _check_fingerprints(self, state: dict[str, torch.Tensor], expected: dict[str, Any], path: str) -> None:
        for part, wanted in expected.items():
            frozen = _part(state, FROZEN[part]) or _part(self.recognizer.state_dict(), FROZEN[part])
            if (found := fingerprint(frozen)) != wanted["fingerprint"]:
                raise ValueError(
                    f"{path} was trained with another {part}: expected weights with fingerprint "
                    f"{wanted['fingerprint'][:12]}, got {found[:12]} from "
                    f"{self.frozen_sources[part] or 'no file (random weights)'}. Give the weights it was trained with"
                )


def unwrap_state(content: dict[str, Any], path: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a file's content, which may be wrapped in "model" or "state_dict", or by DDP."""
    state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict of weights, got {type(state).__name__}")
    return {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, torch.Tensor)}


def to_recognizer_state(state: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """Rename a checkpoint's keys, released ones or those of a whole model of ours, to the recogniser's."""
    renamed = {}
    for key, value in state.items():
        target = key.removeprefix("recognizer.") if key.startswith("recognizer.") else to_recognizer_key(key)
        if target is not None:
            renamed[target] = value
    if not any(key.startswith(TRAINED) for key in renamed):
        raise ValueError(
            f"{path} is no RegionSpot checkpoint: expected keys such as 'model.to_clip.weight', got {list(state)[:3]}. "
            "SAM's and CLIP's own files go to MODEL.REGIONSPOT.SAM.WEIGHTS and MODEL.REGIONSPOT.CLIP.WEIGHTS"
        )
    return renamed


def _expected_fingerprints(frozen: Any, path: str) -> dict[str, Any]:
    if not isinstance(frozen, dict) or not all(
        part in FROZEN and isinstance(entry, dict) and isinstance(entry.get("fingerprint"), str)
        for part, entry in frozen.items()
    ):
        raise ValueError(
            f"{path}: 'frozen' is damaged; expected fingerprints of {', '.join(FROZEN)}, got {str(frozen)[:80]}"
        )
    return frozen


def _part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _load_strictly(recognizer: RegionRecognizer, state: dict[str, torch.Tensor], source: str) -> None:
    """Load ``state``, which must hold each part that it has keys of wholly, and nothing of another shape."""
    prefixes = tuple(p for p in (TRAINED, *FROZEN.values()) if any(key.startswith(p) for key in state))
    expected = {key: value.shape for key, value in recognizer.state_dict().items() if key.startswith(prefixes)}
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is not known" for key in state if key not in expected]
    problems += [
        f"{key}: expected shape {tuple(shape)}, got {tuple(state[key].shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    if problems:
        raise ValueError(
            f"{source or 'the frozen weights'} does not fit the configured model "
            f"({len(problems)} of {len(expected)} keys): {'; '.join(problems[:3])}. "
            "Are config and weights of the same variant "
            "(MODEL.REGIONSPOT.SAM.NAME, CLIP.NAME, TOKEN_STAGE, INTEGRATION.DEPTH)?"
        )
    recognizer.load_state_dict(state, strict=False)


def find_recognizer(model: nn.Module) -> RegionRecognizer:
    """Return the ``RegionRecognizer`` inside ``model``."""
    for module in model.modules():
        if isinstance(module, RegionRecognizer):
            return module
    raise ValueError(f"{type(model).__name__} holds no RegionRecognizer")
