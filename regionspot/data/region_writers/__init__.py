"""Recognized regions in the formats of labeling tools, evaluators and tables."""

from regionspot.data.region_writers.image_writers import CropWriter, LabelmeWriter, RegionWriter, YoloWriter
from regionspot.data.region_writers.table import write_table
from regionspot.data.region_writers.whole_runs import SEGMENTATIONS, write_coco_dataset, write_coco_results

__all__ = [
    "SEGMENTATIONS",
    "CropWriter",
    "LabelmeWriter",
    "RegionWriter",
    "YoloWriter",
    "write_coco_dataset",
    "write_coco_results",
    "write_table",
]
