"""Evaluation."""

from regionspot.evaluation.build import build_evaluator

__all__ = ["build_evaluator"]
