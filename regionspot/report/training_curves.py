"""Curves of a training from the lines that Detectron2's JSONWriter wrote."""

import json
import logging
import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from regionspot.report.charts import Chart, make_chart

logger = logging.getLogger(__name__)

# Chart titles, with the names of the metrics in each as the log has them; several test sets prefix their own.
_CHARTS = {
    "loss": ("total_loss", "validation/loss"),
    "top-1 accuracy of regions, %": ("region_top1", "validation/top1", "region/top1"),
    "AP, %": ("bbox/AP", "segm/AP"),
    "learning rate": ("lr",),
    "images per second": ("images_per_second",),
}


def find_training_log(directory: Path) -> Path | None:
    """Return the training log ``OUTPUT_DIR/metrics.json`` of an evaluation in ``OUTPUT_DIR/inference/<data set>``."""
    absolute = directory.absolute()
    path = absolute.parents[1] / "metrics.json" if absolute.parent.name == "inference" else absolute / "none"
    return path if path.is_file() else None


def read_curves(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return (iterations, values) of each metric of a training log; lines that are no records are left out.

    A run that was resumed has written some iterations twice: the last value counts.
    """
    values: dict[str, dict[int, float]] = defaultdict(dict)
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:  # cut short when a run was killed
                continue
            iteration = record.get("iteration") if isinstance(record, dict) else None
            if not isinstance(iteration, int):
                continue
            for key, value in record.items():
                if isinstance(value, (int, float)) and key != "iteration" and math.isfinite(value):
                    values[key][iteration] = float(value)
    return {key: (np.array(sorted(own)), np.array([own[i] for i in sorted(own)])) for key, own in values.items()}


def draw_curves(path: Path) -> list[Chart]:
    """Return the charts of a training log, none if it has none of their metrics."""
    curves, charts = read_curves(path), []
    for title, names in _CHARTS.items():
        series = [
            (key, *curve)
            for key, curve in curves.items()
            if any(key == name or key.endswith(f"/{name}") for name in names)
        ]
        if any(len(x) > 1 for _, x, _ in series):
            charts.append(make_chart(title, "iteration", "", series))
    return charts
