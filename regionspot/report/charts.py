"""Line charts as geometry, which the page draws as SVG."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 400, 260  # of the area inside the axes, SVG units
MAX_POINTS = 500  # of a line; more would not be visible


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name in the legend, and ``points`` as SVG has them."""

    name: str
    points: str


@dataclass(frozen=True)
class Tick:
    """A tick of an axis: its place in SVG units, and its number."""

    place: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A chart of lines; y is up."""

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    has_diagonal: bool = False
    width: int = WIDTH
    height: int = HEIGHT


def make_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[tuple[str, np.ndarray, np.ndarray]],
    limits: tuple[float, float] | None = None,
    has_diagonal: bool = False,
) -> Chart:
    """Return a chart.

    Args:
        title, x_label, y_label: texts.
        series: (name, x (N,), y (N,)) of each line; points that are not finite are left out.
        limits: of both axes; by default those of the values.
        has_diagonal: also draw y = x.
    """
    series = [(name, *_finite(np.asarray(x, float), np.asarray(y, float))) for name, x, y in series]
    x_ticks, x_range = _ticks([x for _, x, _ in series], limits)
    y_ticks, y_range = _ticks([y for _, _, y in series], limits)
    lines = [
        Line(name, " ".join(f"{u:.1f},{v:.1f}" for u, v in zip(_scale(x, x_range, WIDTH), _scale_up(y, y_range))))
        for name, x, y in series
    ]
    return Chart(
        title,
        x_label,
        y_label,
        lines,
        [Tick(float(place), _number(value)) for value, place in zip(x_ticks, _scale(x_ticks, x_range, WIDTH))],
        [Tick(float(place), _number(value)) for value, place in zip(y_ticks, _scale_up(y_ticks, y_range))],
        has_diagonal,
    )


def _finite(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if len(keep) > MAX_POINTS:
        keep = keep[np.linspace(0, len(keep) - 1, MAX_POINTS).round().astype(int)]
    return x[keep], y[keep]


def _ticks(columns: list[np.ndarray], limits: tuple[float, float] | None) -> tuple[np.ndarray, tuple[float, float]]:
    """Return round numbers of an axis, and its ends."""
    values = np.concatenate([*columns, np.zeros(0)])
    low, high = limits or ((values.min(), values.max()) if len(values) else (0.0, 1.0))
    if low == high:
        low, high = low - 0.5, high + 0.5
    ticks = np.asarray(MaxNLocator(nbins=5).tick_values(low, high))
    low, high = (low, high) if limits else (ticks[0], ticks[-1])
    return ticks[(ticks >= low) & (ticks <= high)], (float(low), float(high))


def _scale(values: np.ndarray, ends: tuple[float, float], size: int) -> np.ndarray:
    return (np.asarray(values) - ends[0]) / (ends[1] - ends[0]) * size


def _scale_up(values: np.ndarray, ends: tuple[float, float]) -> np.ndarray:
    return HEIGHT - _scale(values, ends, HEIGHT)  # SVG's y is down


def _number(value: float) -> str:
    text = f"{value:.6g}"
    return "0" if text == "-0" else text
