"""Evaluations as one HTML file."""

from regionspot.report.page import write_report
from regionspot.report.run import Run

__all__ = ["Run", "write_report"]
