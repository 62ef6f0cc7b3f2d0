"""Configs from YAML files and overrides, also over the config of a host, with checked keys and values."""

from pathlib import Path

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg

from regionspot.config.defaults import add_regionspot_config
from regionspot.utils.yaml_config import check_values, merge_yaml, reason_of

HOST_CONFIG = "MODEL.REGIONSPOT.HEAD.HOST_CONFIG"


def load_config(config_file: str | Path, overrides: list[str] | None = None) -> CfgNode:
    """Return Detectron2's defaults with RegionSpot's keys, merged with a YAML file and then ``KEY VALUE`` overrides.

    Without CUDA ``MODEL.DEVICE`` becomes "cpu", unless the overrides say otherwise.

    Raises:
        FileNotFoundError: no such YAML file.
        ValueError: a key that does not exist, or a value of the wrong type.
    """
    try:
        cfg = _merge(_defaults(), config_file, overrides)
        if host := cfg.MODEL.REGIONSPOT.HEAD.HOST_CONFIG:
            cfg = _merge(_host_defaults(host), config_file, overrides)
            if cfg.MODEL.META_ARCHITECTURE == "RegionSpot":
                raise ValueError(
                    f"{HOST_CONFIG} {host} is under a config of RegionSpot alone, which replaces the host; for another "
                    "variant than BB merge one of configs/variants into it"
                )
    except (AssertionError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"config {str(config_file)!r} with overrides {overrides or []}: {reason_of(error)}") from error
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"MODEL.DEVICE: this machine has no CUDA for {cfg.MODEL.DEVICE!r}; give 'cpu'")
    return cfg


def _merge(cfg: CfgNode, config_file: str | Path, overrides: list[str] | None) -> CfgNode:
    if config_file:
        merge_yaml(cfg, config_file)  # a config runs no code
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list(overrides or [])
    check_values(cfg, _defaults())
    if cfg.SOLVER.CHECKPOINT_PERIOD < 1:
        raise ValueError(f"SOLVER.CHECKPOINT_PERIOD: expected at least 1, got {cfg.SOLVER.CHECKPOINT_PERIOD}")
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ValueError(f"MODEL.DEVICE: expected cpu, cuda or cuda:0, got {cfg.MODEL.DEVICE!r}") from error
    return cfg


def _defaults() -> CfgNode:
    cfg = get_cfg()
    add_regionspot_config(cfg)
    return cfg


def _host_defaults(host: str) -> CfgNode:
    """Return the defaults merged with a detector's config."""
    cfg = _defaults()
    path, weights = find_host_config(host, HOST_CONFIG)
    merge_yaml(cfg, path)
    cfg.MODEL.WEIGHTS = weights or cfg.MODEL.WEIGHTS
    cfg.MODEL.REGIONSPOT.HEAD.HOST = cfg.MODEL.ROI_HEADS.NAME
    if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
        cfg.MODEL.META_ARCHITECTURE = "RegionSpotRCNN"  # the same detector, frozen around the head
    return cfg


def find_host_config(name: str, key: str) -> tuple[str, str]:
    """Return path and weights of a detector's config; the weights are "" for a file, which names its own.

    Args:
        name: a path, or a name in the model zoo such as COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml.
        key: the config key with this name, for messages.

    Raises:
        FileNotFoundError: there is neither.
    """
    if Path(name).is_file():
        return name, ""
    try:
        path = model_zoo.get_config_file(name)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{key} {name!r}: no such file, and no config of Detectron2's model zoo, such as "
            "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
        ) from error
    try:
        return path, model_zoo.get_checkpoint_url(name)
    except RuntimeError:  # a config of the zoo without weights
        return path, ""
