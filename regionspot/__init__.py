"""RegionSpot: open-world region recognition for Detectron2."""

import warnings
from importlib.util import find_spec

if find_spec("detectron2") is None:
    raise ImportError(
        "RegionSpot needs detectron2: build the official repository (pip install --no-build-isolation ...), "
        "or run `make detectron2` in RegionSpot's checkout for the copy on PyPI"
    )

with warnings.catch_warnings():  # setuptools, about a module that clip imports
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    import clip as _clip  # noqa: F401

from detectron2.config import CfgNode

from regionspot.config import add_regionspot_config
from regionspot.modeling import RegionRecognizer, RegionSpot, RegionSpotRCNN, RegionSpotROIHeads, freeze_host
from regionspot.modeling.region_predictions import RegionPredictions
from regionspot.prediction import RegionBatchPredictor, RegionFilter
from regionspot.predictor import RegionSpotPredictor


def load_recognizer(cfg: CfgNode, weights: str = "") -> RegionRecognizer:
    """Deprecated: the former name of ``RegionRecognizer.from_pretrained``."""
    warnings.warn("load_recognizer is now RegionRecognizer.from_pretrained", DeprecationWarning, stacklevel=2)
    return RegionRecognizer.from_pretrained(cfg, weights)


__version__ = "0.1.0"

__all__ = [
    "RegionBatchPredictor",
    "RegionFilter",
    "RegionPredictions",
    "RegionRecognizer",
    "RegionSpot",
    "RegionSpotPredictor",
    "RegionSpotRCNN",
    "RegionSpotROIHeads",
    "add_regionspot_config",
    "freeze_host",
    "load_recognizer",
]
