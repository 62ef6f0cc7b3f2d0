"""The shipped configs by name, as in Detectron2's model zoo, and models of them."""

from pathlib import Path

from detectron2.config import CfgNode
from torch import nn

from regionspot.checkpoint.checkpointer import load_model
from regionspot.config import load_config

CONFIGS = Path(__file__).parent / "configs"  # in a checkout a link to its configs/


def get_config_file(config_path: str) -> str:
    """Return the path of a shipped config, of which ``config_path`` is the part below ``configs/``.

    Raises:
        ValueError: no such config.
    """
    path = CONFIGS / config_path
    if not path.is_file():
        names = ", ".join(sorted(entry.name for entry in CONFIGS.glob("RegionSpot-*.yaml")))
        raise ValueError(f"config {config_path!r}: not in the model zoo; expected one of {names} or of its directories")
    return str(path)


def get_config(config_path: str, overrides: list[str] | None = None) -> CfgNode:
    """Return a shipped config with ``KEY VALUE`` overrides.

    Raises:
        ValueError: no such config, an unknown key, or a value of the wrong type.
    """
    return load_config(get_config_file(config_path), overrides)


def get(config_path: str, weights: str = "", device: str | None = None) -> nn.Module:
    """Return the model of a shipped config in evaluation mode, with the weights of SAM and CLIP that the config names.

    Args:
        config_path: as for ``get_config_file``.
        weights: a RegionSpot checkpoint; without one the trained module stays random.
        device: such as "cpu"; by default the config's.

    Raises:
        ValueError, FileNotFoundError: no such config, or no such weights.
    """
    overrides = ["MODEL.WEIGHTS", weights, *(["MODEL.DEVICE", device] if device else [])]
    return load_model(get_config(config_path, overrides))
