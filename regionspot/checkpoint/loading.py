"""Loads a recognizer's weights: from released checkpoints, our own, or those of whole models that contain one."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import nn

from regionspot.checkpoint.fetch import resolve_weights
from regionspot.checkpoint.formats import fingerprint, load_checkpoint_file
from regionspot.checkpoint.key_layout import (
    FROZEN,
    PARTS,
    TRAINED,
    is_released_key,
    rename_released_keys,
    select,
)

logger = logging.getLogger(__name__)


def find_recognizer(model: nn.Module) -> Any:
    """Return the ``RegionRecognizer`` inside ``model``."""
    # by its parts: this package must not import modeling, which imports it
    for module in model.modules():
        if all(hasattr(module, prefix.split(".")[0]) for prefix in PARTS.values()):
            return module
    raise ValueError(f"{type(model).__name__} holds no RegionRecognizer")


@contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """Build a model inside the block whose random weights are the same in all processes (a negative seed is 0)."""
    # The caller's generator stays as it is. Weights are drawn on the CPU.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(max(seed, 0))
        yield


def frozen_sources(cfg: CfgNode) -> dict[str, str]:
    """Return the configured sources of SAM's and CLIP's weights, by the names of these parts."""
    return {"sam": cfg.MODEL.REGIONSPOT.SAM.WEIGHTS, "clip_model": cfg.MODEL.REGIONSPOT.CLIP.WEIGHTS}


def load_weights(recognizer: Any, path: str, sources: dict[str, str], prefer_average: bool = True) -> dict[str, Any]:
    """Load a checkpoint into a recognizer, and the frozen parts that it lacks from ``sources``.

    ``recognizer.weight_sources`` then has the file of each part.

    Args:
        recognizer: a ``RegionRecognizer``, which is unchanged after an error.
        path: file or URL of a released checkpoint, one of ours, or one of a whole model that contains a recognizer;
            "" for none.
        sources: files, URLs or known names of "sam" and "clip_model"; "" leaves a part as it is.
        prefer_average: load the averaged weights (``SOLVER.EMA``) if the checkpoint has them.

    Returns:
        The other contents of the checkpoint, such as ``iteration``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, not a RegionSpot checkpoint, one of another variant, or one that was trained with
            other frozen parts.
    """
    state, rest, file = _read_checkpoint(path) if path else ({}, {}, "")
    if "ema" in rest and prefer_average:
        state.update({TRAINED + key: value for key, value in rest["ema"].items()})
    recorded = _check_frozen(rest.pop("frozen", {}), path)
    _check_settings(recognizer, rest.pop("integration", {}), path)
    sources = {"trained": path, **sources}
    for part, prefix in FROZEN.items():
        if select(state, prefix):
            sources[part] = file
            continue
        # Prefer the file that the checkpoint was trained with, if it still exists and the config names no file.
        source = recorded.get(part, {}).get("source", "")
        if source and Path(source).is_file() and not Path(sources[part]).is_file():
            sources[part] = source
        state.update(_read_frozen_part(recognizer, part, sources[part]))
    _check_fingerprints(recognizer, state, recorded, sources)
    _load_strictly(recognizer, state, path)
    loaded = {part: sources[part] for part, prefix in PARTS.items() if select(state, prefix)}
    recognizer.weight_sources.update(loaded)
    files = ", ".join(f"{part} from {source}" for part, source in loaded.items())
    logger.info("Loaded %s", files or "no weights")
    return rest


def _read_checkpoint(path: str) -> tuple[dict[str, torch.Tensor], dict[str, Any], str]:
    """Return the weights under the recognizer's keys, the other contents, and the local file."""
    # Detectron2's own addresses: detectron2://, s3://, ...
    is_other_url = "://" in path and not path.startswith("http")
    file = str(resolve_weights(PathManager.get_local_path(path) if is_other_url else path))
    content = load_checkpoint_file(file)
    state = to_recognizer_state(unwrap_state(content, file), file)
    return state, {key: value for key, value in content.items() if not isinstance(value, torch.Tensor)}, file


def unwrap_state(content: dict[str, Any], path: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a file's content, which may be wrapped in "model" or "state_dict", or by DDP."""
    state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict of weights, got {type(state).__name__}")
    return {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, torch.Tensor)}


def to_recognizer_state(state: dict[str, torch.Tensor], path: str) -> dict[str, torch.Tensor]:
    """Rename a checkpoint's keys, released ones or those of a whole model, to those of the recognizer."""
    anchor = f"recognizer.{TRAINED}to_clip.weight"
    prefixes = [key.removesuffix(anchor) + "recognizer." for key in state if f".{key}".endswith(f".{anchor}")]
    renamed = select(state, prefixes[0]) if prefixes else rename_released_keys(state)
    if not select(renamed, TRAINED):
        raise ValueError(
            f"{path} is no RegionSpot checkpoint: expected keys such as 'model.to_clip.weight', got {list(state)[:3]}. "
            "SAM's and CLIP's own files go to MODEL.REGIONSPOT.SAM.WEIGHTS and MODEL.REGIONSPOT.CLIP.WEIGHTS"
        )
    return renamed


def _read_frozen_part(recognizer: Any, part: str, source: str) -> dict[str, torch.Tensor]:
    if not source:
        logger.warning("No weights are given for %s: it keeps those it has, random ones if nothing was loaded", part)
        return {}
    state = unwrap_state(load_checkpoint_file(resolve_weights(source)), source)
    # SAM's and CLIP's own files have no prefixes; a RegionSpot checkpoint may be the source, too.
    if not any(is_released_key(key) for key in state):
        module = recognizer.get_submodule(FROZEN[part].split(".")[0])
        renamed = module.rename_official_keys(state)
        if not renamed:
            raise ValueError(
                f"{source} holds no weights of a {type(module).__name__}, got keys such as {list(state)[:3]}; is it of "
                f"another model than MODEL.REGIONSPOT.{'SAM' if part == 'sam' else 'CLIP'}.NAME?"
            )
        state = {f"{part}.{key}": value for key, value in renamed.items()}
    return {key: value for key, value in rename_released_keys(state).items() if key.startswith(FROZEN[part])}


def _check_frozen(frozen: Any, path: str) -> dict[str, Any]:
    """Return the fingerprints and sources of the frozen parts that a checkpoint was trained with, if they are valid."""
    if not isinstance(frozen, dict) or not all(
        part in FROZEN and isinstance(entry, dict) and isinstance(entry.get("fingerprint"), str)
        for part, entry in frozen.items()
    ):
        raise ValueError(
            f"{path}: 'frozen' is damaged; expected fingerprints of {', '.join(FROZEN)}, got {str(frozen)[:80]}"
        )
    return frozen


def _check_settings(recognizer: Any, settings: Any, path: str) -> None:
    """Refuse a module that was trained with other settings, where they change no shape of its weights."""
    own, settings = recognizer.settings, settings if isinstance(settings, dict) else {}
    # older checkpoints record fewer settings
    if other := [key for key in own if settings.get(key, own[key]) != own[key]]:
        had, has = (", ".join(f"{key} {x[key]}" for key in other) for x in (settings, own))
        raise ValueError(f"{path} was trained with MODEL.REGIONSPOT's {had}; the config has {has}")


def _check_fingerprints(
    recognizer: nn.Module, state: dict[str, torch.Tensor], recorded: dict[str, Any], sources: dict[str, str]
) -> None:
    for part, entry in recorded.items():
        weights = select(state, FROZEN[part]) or select(recognizer.state_dict(), FROZEN[part])
        expected, actual = entry["fingerprint"], fingerprint(weights)
        if actual != expected:
            raise ValueError(
                f"{sources['trained']} was trained with another {part}: expected weights with fingerprint "
                f"{expected[:12]}, got {actual[:12]} from {sources[part] or 'no file (random weights)'}. "
                "Give the weights it was trained with"
            )


def _load_strictly(recognizer: nn.Module, state: dict[str, torch.Tensor], path: str) -> None:
    """Load ``state``; a part with any key in it must be complete, with no unknown key or other shape."""
    # All is checked before anything is loaded: after an error the model is as before, which strict=True is not.
    prefixes = tuple(prefix for prefix in PARTS.values() if select(state, prefix))
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
            f"{path or 'the frozen weights'} does not fit the configured model "
            f"({len(problems)} of {len(expected)} keys): {'; '.join(problems[:3])}. "
            "Are config and weights of the same variant "
            "(MODEL.REGIONSPOT.SAM.NAME, CLIP.NAME, TOKEN_STAGE, INTEGRATION.DEPTH)?"
        )
    recognizer.load_state_dict(state, strict=False)
