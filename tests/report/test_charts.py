"""Charts as geometry, and curves from a training log."""

import json

import numpy as np
import pytest

from regionspot.report.charts import HEIGHT, WIDTH, make_chart
from regionspot.report.training_curves import draw_curves, find_training_log, read_curves


def points(line):
    return [tuple(map(float, pair.split(","))) for pair in line.points.split()]


def test_points_are_in_svg_units():
    x, y = np.array([0, 0.5, np.nan, 1]), np.array([0, 1, 0.5, 0.25])
    chart = make_chart("t", "x", "y", [("a", x, y)], limits=(0, 1))
    assert points(chart.lines[0]) == [(0, HEIGHT), (WIDTH / 2, 0), (WIDTH, 0.75 * HEIGHT)]  # y is down in SVG
    assert [tick.label for tick in chart.x_ticks] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [tick.place for tick in chart.y_ticks] == pytest.approx([HEIGHT * (1 - k / 5) for k in range(6)])


def test_axes_hold_all_lines():
    x = np.arange(3)
    chart = make_chart("t", "x", "y", [("a", x, x * 10), ("b", x + 5, -x), ("constant", x, x * 0 + 3)])
    for line in chart.lines:
        assert all(0 <= u <= WIDTH and 0 <= v <= HEIGHT for u, v in points(line))
    assert make_chart("t", "x", "y", [("a", x, x * 0 + 3)]).lines[0].points  # no range


def test_long_curves_are_thinned():
    x = np.arange(100_000)
    chart = make_chart("t", "x", "y", [("a", x, x)])
    places = points(chart.lines[0])
    assert len(places) == 500 and places[0][0] == 0 and places[-1][0] == pytest.approx(WIDTH, abs=1)


def write_log(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"iteration": 79, "total_lo')


def test_curves_of_a_resumed_log(tmp_path):
    records = [{"iteration": 19, "total_loss": 3.0, "lr": 0.1}, {"iteration": 39, "total_loss": 9.0}]
    records += [{"iteration": 39, "total_loss": 2.0}, {"iteration": 59, "total_loss": 1.0, "bbox/AP": float("nan")}]
    write_log(tmp_path / "metrics.json", records)
    curves = read_curves(tmp_path / "metrics.json")
    iterations, values = curves["total_loss"]
    assert iterations.tolist() == [19, 39, 59] and values.tolist() == [3.0, 2.0, 1.0]
    assert "bbox/AP" not in curves


def test_charts_of_what_was_logged(tmp_path):
    keys = ("total_loss", "validation/loss", "b/validation/loss", "region_top1", "data_time")
    write_log(tmp_path / "metrics.json", [{"iteration": k, **dict.fromkeys(keys, k)} for k in (1, 2)])
    charts = draw_curves(tmp_path / "metrics.json")
    lines = {chart.title: [line.name for line in chart.lines] for chart in charts}
    assert lines == {"loss": list(keys[:3]), "top-1 accuracy of regions, %": ["region_top1"]}


def test_log_beside_the_evaluation(tmp_path):
    evaluation = tmp_path / "run" / "inference" / "my_val"
    evaluation.mkdir(parents=True)
    assert find_training_log(evaluation) is None
    write_log(tmp_path / "run" / "metrics.json", [])
    assert find_training_log(evaluation) == tmp_path / "run" / "metrics.json"
    assert find_training_log(tmp_path / "run") is None
