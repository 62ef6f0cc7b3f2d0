"""Frozen localizers; importing this registers them."""

from regionspot.modeling.localizers.localizer import LOCALIZER_REGISTRY, Localizer, LocalizerOutput, build_localizer
from regionspot.modeling.localizers.mobile_sam import MobileSamLocalizer
from regionspot.modeling.localizers.sam import SamLocalizer
from regionspot.modeling.localizers.sam2 import EdgeTamLocalizer, Sam2Localizer, Sam3TrackerLocalizer
from regionspot.modeling.localizers.sam_hq import SamHqLocalizer

__all__ = [
    "LOCALIZER_REGISTRY",
    "EdgeTamLocalizer",
    "Localizer",
    "LocalizerOutput",
    "MobileSamLocalizer",
    "Sam2Localizer",
    "Sam3TrackerLocalizer",
    "SamHqLocalizer",
    "SamLocalizer",
    "build_localizer",
]
