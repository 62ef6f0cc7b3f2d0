"""Checkpoints: the released ones are read as they are, our own hold what is trained and name what is frozen."""

import logging
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from regionspot.checkpoint.key_layout import FROZEN, TRAINED, to_released_key
from regionspot.checkpoint.recognizer import frozen_sources, load_weights, part_of
from regionspot.checkpoint.weights import fingerprint
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.utils.files import atomic_path

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
            sam_weights: SAM's weights, see ``resolve_weights``, or a checkpoint that holds them;
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
        sources = frozen_sources(cfg)
        return cls(model, save_dir, sam_weights=sources["sam"], clip_weights=sources["clip_model"], **checkpointables)

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
                part: {"fingerprint": fingerprint(part_of(state, prefix)), "source": self.frozen_sources[part]}
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
        resuming = checkpointables is None and "trainer" in self.checkpointables
        found = load_weights(self.recognizer, path, self.frozen_sources, prefer_average=not resuming)
        self.loaded, self.frozen_sources, checkpoint = found.parts, found.sources, found.rest
        for key in self.checkpointables if checkpointables is None else checkpointables:
            if key in checkpoint:
                self.checkpointables[key].load_state_dict(checkpoint.pop(key))
        return checkpoint


def load_model(cfg: CfgNode) -> tuple[Any, RegionSpotCheckpointer]:
    """Build the model of ``cfg`` with its weights, in eval mode; the checkpointer knows where they came from.

    What has no weights is random, by ``SEED``, and the same in all processes.
    """
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
        torch.manual_seed(max(cfg.SEED, 0))
        model = build_model(cfg).eval()
    checkpointer = RegionSpotCheckpointer.from_config(cfg, model)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    return model, checkpointer


def find_recognizer(model: nn.Module) -> RegionRecognizer:
    """Return the ``RegionRecognizer`` inside ``model``."""
    for module in model.modules():
        if isinstance(module, RegionRecognizer):
            return module
    raise ValueError(f"{type(model).__name__} holds no RegionRecognizer")
