"""Open-vocabulary detection in the miniature world, end to end at a small size."""

import json
from collections import Counter

import torch
from detectron2.modeling import build_model

from miniworld.experiment import CONFIG, miniworld_config
from regionspot.checkpoint.checkpointer import RegionSpotCheckpointer

from ..helpers import ROOT
from ..processes import run_program


def test_miniworld_hosts_and_their_named_boxes(tmp_path):
    cfg = miniworld_config(CONFIG, tmp_path)
    model = build_model(cfg)
    checkpointer = RegionSpotCheckpointer.from_config(cfg, model, str(tmp_path))
    checkpointer.load("")
    checkpointer.save("regionspot")
    script = ROOT / "projects" / "RegionSpotRCNN" / "miniworld_detection.py"
    options = ["--output", tmp_path / "out", "--weights", tmp_path / "regionspot.pth", "--train", 12, "--test", 6]
    overrides = ["SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 4, "TEST.DETECTIONS_PER_IMAGE", 7]
    overrides += ["MODEL.REGIONSPOT.CLIP.TEMPLATES", "one"]
    log = run_program(tmp_path, script, *options, "--workers", 1, *overrides)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary) == 3 and all("APr" in row["bbox"] for row in summary.values())
    assert summary["the host, closed-set"]["bbox"]["APr"] == 0
    assert "segm" in summary["class-agnostic host + RegionSpot"] and "mask AP" in log
    assert len(list((tmp_path / "out").glob("scene_*.png"))) == 6
    [path] = (tmp_path / "out" / "RegionSpot-head").rglob("lvis_instances_results.json")
    numbers = Counter(entry["image_id"] for entry in json.loads(path.read_text()))
    assert set(numbers.values()) == {7}  # overrides reach the evaluation
    hosts = [
        torch.load(tmp_path / "out" / f"host_{name}" / "model_final.pth", weights_only=True)["model"]
        for name in ("class-agnostic", "closed-set")
    ]
    rows = [len(host["roi_heads.box_predictor.cls_score.weight"]) for host in hosts]
    assert rows == [2, 85]
