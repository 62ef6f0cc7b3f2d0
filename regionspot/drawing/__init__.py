"""Drawings: regions on their images, attention maps, sheets."""

from regionspot.drawing.heat_maps import draw_attention, draw_sheet, enlarge
from regionspot.drawing.regions import Regions, draw_labels, draw_regions
from regionspot.drawing.style import DrawingStyle

__all__ = ["DrawingStyle", "Regions", "draw_attention", "draw_labels", "draw_regions", "draw_sheet", "enlarge"]
