"""Evaluation: LVIS AP, fixed AP and COCO AP of boxes and masks, by protocols that are stated."""

from regionspot.data.coco_io import Results, read_results
from regionspot.evaluation.coco_metrics import CocoEvaluation, evaluate_coco
from regionspot.evaluation.detection_evaluator import DetectionLVISEvaluator
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.lvis_metrics import LvisEvaluation, evaluate_lvis
from regionspot.evaluation.protocol import Protocol
from regionspot.evaluation.region_evaluator import RegionEvaluator

__all__ = [
    "CocoEvaluation",
    "DetectionLVISEvaluator",
    "GroundTruth",
    "LvisEvaluation",
    "Protocol",
    "RegionEvaluator",
    "Results",
    "evaluate_coco",
    "evaluate_lvis",
    "read_results",
]
