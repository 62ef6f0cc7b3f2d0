"""Checkpoints: the released ones are read as they are, our own hold what is trained and name what is frozen."""

import logging
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import nn

from regionspot.modeling.key_layout import FROZEN, TRAINED, to_recognizer_key, to_released_key
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.utils.files import atomic_path
from regionspot.weights import fingerprint, load_checkpoint_file, load_frozen_state_dict, resolve_weights

logger = logging.getLogger(__name__)


class RegionSpotCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer for a model that holds a ``RegionRecognizer``.

    It saves, in the released key layout, the trained parts only, with the fingerprints of the frozen ones. It loads
    such a file or a released checkpoint, with or without its frozen parts; frozen parts that the file lacks come
    from ``sam_weights`` and ``clip_weights``. No file is ever executed.
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
            sam_weights: SAM's weights, see ``regionspot.weights.resolve_weights``; "" leaves them as they are.
            clip_weights: likewise CLIP's.
            checkpointables: saved and loaded beside the model.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.recognizer = find_recognizer(self.model)
        self.frozen_sources = {"sam": sam_weights, "clip_model": clip_weights}

    @classmethod
    def from_config(
        cls, cfg: CfgNode, model: nn.Module, save_dir: str = "", **checkpointables: Any
    ) -> "RegionSpotCheckpointer":
        """Return a checkpointer that takes the frozen parts from ``cfg.MODEL.REGIONSPOT.{SAM,CLIP}.WEIGHTS``."""
        node = cfg.MODEL.REGIONSPOT
        return cls(model, save_dir, sam_weights=node.SAM.WEIGHTS, clip_weights=node.CLIP.WEIGHTS, **checkpointables)

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        state = self.recognizer.state_dict()
        data = {
            "model": {to_released_key(key): value for key, value in state.items() if key.startswith(TRAINED)},
            "frozen": {part: fingerprint(_part(state, prefix)) for part, prefix in FROZEN.items()},
        }
        data.update({key: value.state_dict() for key, value in self.checkpointables.items()})
        data.update(kwargs)
        path = f"{self.save_dir}/{name}.pth"
        with atomic_path(path) as temporary:
            torch.save(data, temporary)
        logger.info("Saved checkpoint to %s", path)
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_path(f"{self.save_dir}/last_checkpoint") as temporary:
            temporary.write_text(last_filename_basename)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load ``path`` (a file or URL; "" for none), then the frozen parts that it did not hold.

        Returns:
            What else the file held, such as ``iteration``.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a damaged file, no RegionSpot checkpoint, one of another variant, or one that was trained
                with other frozen parts.
        """
        checkpoint: dict[str, Any] = {}
        missing = set(FROZEN)
        if path:
            file = resolve_weights(
                path if "://" not in path or path.startswith("http") else PathManager.get_local_path(path)
            )
            checkpoint = load_checkpoint_file(file)
            missing -= self._load_state(checkpoint.pop("model", checkpoint), str(file))
        for part in sorted(missing):
            self._load_frozen(part)
        self._check_fingerprints(checkpoint.pop("frozen", {}), path)
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in checkpoint:
                self.checkpointables[key].load_state_dict(checkpoint.pop(key))
        return checkpoint

    def _load_state(self, state: dict[str, torch.Tensor], path: str) -> set[str]:
        """Load released keys; return the frozen parts that were among them."""
        tensors = {
            key.removeprefix("module."): value for key, value in state.items() if isinstance(value, torch.Tensor)
        }
        renamed = {target: value for key, value in tensors.items() if (target := to_recognizer_key(key)) is not None}
        if not any(key.startswith(TRAINED) for key in renamed):
            raise ValueError(
                f"{path} is no RegionSpot checkpoint: expected keys such as 'model.to_clip.weight', "
                f"got {list(state)[:3]}. "
                "SAM's and CLIP's own files go to MODEL.REGIONSPOT.SAM.WEIGHTS and MODEL.REGIONSPOT.CLIP.WEIGHTS"
            )
        found = {part for part, prefix in FROZEN.items() if any(key.startswith(prefix) for key in renamed)}
        prefixes = [TRAINED, *(FROZEN[part] for part in found)]
        _load_strictly(self.recognizer, renamed, prefixes, path)
        ignored = [key for key in tensors if to_recognizer_key(key) is None]
        if ignored:
            logger.info("%s: %d keys are not used: %s", path, len(ignored), ignored[:5])
        logger.info("Loaded the trained parts%s from %s", "".join(f" and {part}" for part in sorted(found)), path)
        return found

    def _load_frozen(self, part: str) -> None:
        source = self.frozen_sources[part]
        if not source:
            logger.warning(
                "No weights are given for %s: it keeps those it has, random ones if nothing was loaded", part
            )
            return
        state = {
            FROZEN[part] + key: value
            for key, value in load_frozen_state_dict(source).items()
            if isinstance(value, torch.Tensor)
        }
        known = {key: value for key, value in state.items() if to_recognizer_key(to_released_key(key)) is not None}
        _load_strictly(self.recognizer, known, [FROZEN[part]], source)
        logger.info("Loaded %s from %s", part, source)

    def _check_fingerprints(self, expected: dict[str, str], path: str) -> None:
        state = self.recognizer.state_dict() if expected else {}
        for part, wanted in expected.items():
            found = fingerprint(_part(state, FROZEN[part]))
            if found != wanted:
                raise ValueError(
                    f"{path} was trained with another {part}: expected weights with fingerprint {wanted[:12]}, "
                    f"got {found[:12]} from {self.frozen_sources[part] or 'no file (random weights)'!r}. "
                    "Give the weights it was trained with"
                )


def _part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _load_strictly(
    recognizer: RegionRecognizer, state: dict[str, torch.Tensor], prefixes: list[str], source: str
) -> None:
    """Load ``state``, which must hold every key under ``prefixes``, and nothing of another shape."""
    expected = {key: value.shape for key, value in recognizer.state_dict().items() if key.startswith(tuple(prefixes))}
    problems = [f"{key} is missing" for key in expected if key not in state]
    problems += [f"{key} is not known" for key in state if key not in expected]
    problems += [
        f"{key}: expected shape {tuple(shape)}, got {tuple(state[key].shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    if problems:
        raise ValueError(
            f"{source} does not fit the configured model ({len(problems)} of {len(expected)} keys): "
            f"{'; '.join(problems[:3])}. "
            "Is the config of the same variant (MODEL.REGIONSPOT.SAM.NAME, CLIP.NAME, TOKEN_STAGE, INTEGRATION.DEPTH)?"
        )
    recognizer.load_state_dict(state, strict=False)


def find_recognizer(model: nn.Module) -> RegionRecognizer:
    """Return the ``RegionRecognizer`` inside ``model``."""
    for module in model.modules():
        if isinstance(module, RegionRecognizer):
            return module
    raise ValueError(f"{type(model).__name__} holds no RegionRecognizer")
