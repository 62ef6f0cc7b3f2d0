"""The model. Importing this package registers its parts with Detectron2."""

from regionspot.modeling.meta_arch import RegionSpot
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.modeling.sam import SamImageEncoder
from regionspot.modeling.vision_language import ClipImageEncoder

__all__ = ["ClipImageEncoder", "RegionRecognizer", "RegionSpot", "SamImageEncoder"]
