"""Evaluation: LVIS AP, fixed AP and COCO AP of boxes and masks, by protocols that are stated."""

from regionspot.data.coco_io import Results, read_results
from regionspot.evaluation.build import build_evaluator
from regionspot.evaluation.coco_metrics import evaluate_coco, run_coco_evaluation
from regionspot.evaluation.detection_evaluator import DetectionLVISEvaluator
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.lvis_metrics import LvisEvaluation, evaluate_lvis, run_lvis_evaluation
from regionspot.evaluation.protocol import Protocol

__all__ = [
    "DetectionLVISEvaluator",
    "GroundTruth",
    "LvisEvaluation",
    "Protocol",
    "Results",
    "build_evaluator",
    "evaluate_coco",
    "evaluate_lvis",
    "read_results",
    "run_coco_evaluation",
    "run_lvis_evaluation",
]
