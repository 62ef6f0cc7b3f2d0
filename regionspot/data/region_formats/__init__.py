"""Boxes that come with images, in the formats of annotation tools and of detectors, by the images' names."""

from regionspot.data.region_formats.reading import FORMATS, read_regions
from regionspot.data.region_formats.region_file import ImageBoxes, RegionFile

__all__ = ["FORMATS", "ImageBoxes", "RegionFile", "read_regions"]
