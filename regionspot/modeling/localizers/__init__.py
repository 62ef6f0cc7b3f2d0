"""Frozen localizers; importing this registers them."""

from regionspot.modeling.localizers.localizer import LOCALIZER_REGISTRY, Localizer, LocalizerOutput, build_localizer
from regionspot.modeling.localizers.mobile_sam import MobileSamLocalizer
from regionspot.modeling.localizers.sam import SamLocalizer

__all__ = [
    "LOCALIZER_REGISTRY",
    "Localizer",
    "LocalizerOutput",
    "MobileSamLocalizer",
    "SamLocalizer",
    "build_localizer",
]
