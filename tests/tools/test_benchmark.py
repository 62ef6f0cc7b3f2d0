"""What the benchmarks run in processes of their own."""

import json

from tools.benchmarks import evaluation, fixed


def test_masks_of_both_ways_are_the_same():
    """It raises where they differ."""
    row = evaluation.benchmark_masks(boxes=2, detections=5)
    seconds = [float(row[column].removesuffix(" s")) for column in (1, 3)]
    assert all(0 <= value < 60 for value in seconds)
    assert row[0].startswith("masks of 5 detections of 2 boxes") and len(row) == len(evaluation.HEADERS)


def test_fixed_ap_is_measured_from_logits_to_metrics(tmp_path):
    headers, rows = fixed.benchmark_fixed(tmp_path, images=8, boxes=5, classes=20)
    assert [row[0] for row in rows][-2:] == ["8 images, 800 detections", "metrics"]
    assert all(len(row) == len(headers) for row in rows)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["bbox"]["AP"] >= 0
