"""The model. Importing this package registers its parts with Detectron2."""

from regionspot.modeling.backbones import ClipImageEncoder, SamImageEncoder
from regionspot.modeling.crop_baseline import CropBaseline
from regionspot.modeling.meta_arch import RegionSpot
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.modeling.roi_heads.rcnn import RegionSpotRCNN, freeze_host
from regionspot.modeling.roi_heads.roi_heads import RegionSpotROIHeads

__all__ = [
    "CropBaseline",
    "ClipImageEncoder",
    "RegionRecognizer",
    "RegionSpot",
    "RegionSpotRCNN",
    "RegionSpotROIHeads",
    "SamImageEncoder",
    "freeze_host",
]
