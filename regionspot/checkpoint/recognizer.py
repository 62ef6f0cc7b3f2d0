"""Weights of a recognizer, from released checkpoints, from our own, and from those of models that hold one."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager

from regionspot.checkpoint.key_layout import CLIP_EXTRAS, FROZEN, TRAINED, is_released_key, to_recognizer_key
from regionspot.checkpoint.weights import fingerprint, load_checkpoint_file, resolve_weights
from regionspot.modeling.recognizer import RegionRecognizer

logger = logging.getLogger(__name__)


@dataclass
class LoadedWeights:
    """What was loaded.

    Attributes:
        parts: those that hold weights from a file: "trained", "sam", "clip_model".
        sources: where each frozen part came from; "" for nowhere.
        rest: what else the file held.
    """

    parts: set[str]
    sources: dict[str, str]
    rest: dict[str, Any]


def load_recognizer(cfg: CfgNode, weights: str = "") -> RegionRecognizer:
    """Build the recognizer of ``cfg`` and load its weights: a plain ``nn.Module`` for any detector to hold.

    Args:
        cfg: with RegionSpot's keys; ``MODEL.REGIONSPOT.{SAM,CLIP}.WEIGHTS`` name the frozen parts' files.
        weights: a RegionSpot checkpoint, released or not; "" leaves the trained part random.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no RegionSpot checkpoint, or one that does not fit.
    """
    recognizer = RegionRecognizer(cfg)
    load_weights(recognizer, weights, frozen_sources(cfg))
    return recognizer.to(cfg.MODEL.DEVICE)


def frozen_sources(cfg: CfgNode) -> dict[str, str]:
    """Return where ``cfg`` wants SAM's and CLIP's weights from."""
    return {"sam": cfg.MODEL.REGIONSPOT.SAM.WEIGHTS, "clip_model": cfg.MODEL.REGIONSPOT.CLIP.WEIGHTS}


def load_weights(
    recognizer: RegionRecognizer, path: str, sources: dict[str, str], prefer_average: bool = True
) -> LoadedWeights:
    """Load ``path`` (a file or URL; "" for none), and the frozen parts that it does not hold from ``sources``.

    Args:
        recognizer: left as it was by a file that is refused.
        path: a released checkpoint, one of ours, or one of a whole model that holds a recognizer.
        sources: files, URLs or known names of the frozen parts; "" leaves a part as it is. Where no file is named, one
            that the checkpoint remembers is taken if it is still there.
        prefer_average: of a file that also holds averaged weights (``SOLVER.EMA``) take these.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, no RegionSpot checkpoint, one of another variant, or one that was trained with
            other frozen parts.
    """
    rest: dict[str, Any] = {}
    state: dict[str, torch.Tensor] = {}
    sources = dict(sources)
    if path:
        file = resolve_weights(
            path if "://" not in path or path.startswith("http") else PathManager.get_local_path(path)
        )
        rest = load_checkpoint_file(file)
        state = to_recognizer_state(unwrap_state(rest, str(file)), str(file))
        rest = {key: value for key, value in rest.items() if not isinstance(value, torch.Tensor)}
        if "ema" in rest and prefer_average:
            state.update({TRAINED + key: value for key, value in rest["ema"].items()})
    expected = _expected_fingerprints(rest.pop("frozen", {}), path)
    for part, prefix in FROZEN.items():
        if any(key.startswith(prefix) for key in state):
            sources[part] = str(file)
            continue
        recorded = expected.get(part, {}).get("source", "")
        if recorded and Path(recorded).is_file() and not Path(sources[part]).is_file():  # where it was recorded
            sources[part] = recorded
        state.update(_read_frozen(part, sources[part]))
    _check_fingerprints(recognizer, state, expected, sources, path)
    _load_strictly(recognizer, state, path)
    prefixes = {"trained": TRAINED, **FROZEN}
    parts = {part for part, prefix in prefixes.items() if any(key.startswith(prefix) for key in state)}
    files = [source for source in (path, *sources.values()) if source]
    logger.info("Loaded %s from %s", ", ".join(sorted(parts)) or "nothing", ", ".join(files) or "no file")
    return LoadedWeights(parts, sources, rest)


def _read_frozen(part: str, source: str) -> dict[str, torch.Tensor]:
    if not source:
        logger.warning("No weights are given for %s: it keeps those it has, random ones if nothing was loaded", part)
        return {}
    state = unwrap_state(load_checkpoint_file(resolve_weights(source)), source)
    if any(is_released_key(key) for key in state):  # a RegionSpot checkpoint that holds the part
        renamed = {target: value for key, value in state.items() if (target := to_recognizer_key(key)) is not None}
        return {key: value for key, value in renamed.items() if key.startswith(FROZEN[part])}
    return {FROZEN[part] + key: value for key, value in state.items() if key not in CLIP_EXTRAS}


def _check_fingerprints(
    recognizer: RegionRecognizer,
    state: dict[str, torch.Tensor],
    expected: dict[str, Any],
    sources: dict[str, str],
    path: str,
) -> None:
    for part, wanted in expected.items():
        frozen = part_of(state, FROZEN[part]) or part_of(recognizer.state_dict(), FROZEN[part])
        if (found := fingerprint(frozen)) != wanted["fingerprint"]:
            raise ValueError(
                f"{path} was trained with another {part}: expected weights with fingerprint "
                f"{wanted['fingerprint'][:12]}, got {found[:12]} from "
                f"{sources[part] or 'no file (random weights)'}. Give the weights it was trained with"
            )


def unwrap_state(content: dict[str, Any], path: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a file's content, which may be wrapped in "model" or "state_dict", or by DDP."""
    state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict of weights, got {type(state).__name__}")
    return {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, torch.Tensor)}


def to_recognizer_state(state: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """Rename a checkpoint's keys, released ones or those of a whole model, to those of the recognizer."""
    anchor = f"recognizer.{TRAINED}to_clip.weight"
    whole = [key.removesuffix(anchor) + "recognizer." for key in state if f".{key}".endswith(f".{anchor}")]
    renamed = (
        part_of(state, whole[0])
        if whole
        else {target: value for key, value in state.items() if (target := to_recognizer_key(key)) is not None}
    )
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


def part_of(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return what lies under ``prefix`` in a state dict, without it."""
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
