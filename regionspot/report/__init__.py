"""Evaluations as one HTML file."""

from regionspot.report.attention import AttentionMaps
from regionspot.report.page import write_report
from regionspot.report.run import Run

__all__ = ["AttentionMaps", "Run", "write_report"]
