"""Deprecated: drawings are in ``regionspot.drawing``, attention maps in ``regionspot.modeling.attention_maps``."""

import numpy as np

from regionspot.drawing import DrawingStyle, Regions
from regionspot.drawing import draw_regions as draw_regions_with_style
from regionspot.utils.deprecation import moved_names, warn_renamed

__getattr__ = moved_names(
    __name__,
    {
        "draw_labels": "regionspot.drawing",
        "draw_attention": "regionspot.drawing",
        "draw_sheet": "regionspot.drawing",
        "enlarge": "regionspot.drawing",
        "cross_attention": "regionspot.modeling.attention_maps",
    },
)


def draw_regions(image: np.ndarray, predictions: Regions, with_masks: bool = True) -> np.ndarray:
    """Deprecated: ``regionspot.drawing.draw_regions``, whose last argument is a style."""
    warn_renamed(f"{__name__}.draw_regions", "regionspot.drawing.draw_regions", 2)
    return draw_regions_with_style(image, predictions, DrawingStyle(outline="mask" if with_masks else "box"))
