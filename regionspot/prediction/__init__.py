"""Recognition in many images: batches, and which regions are kept."""

from regionspot.prediction.batch_predictor import RegionBatchPredictor
from regionspot.prediction.region_filter import RegionFilter

__all__ = ["RegionBatchPredictor", "RegionFilter"]
