"""The committed weights, and the demo end to end at a small size."""

import json
import subprocess
import sys

import pytest
from detectron2.modeling import build_model

from miniworld.experiment import WEIGHTS, miniworld_config
from miniworld.pretrain_clip import report_clip
from miniworld.pretrain_sam import report_sam
from regionspot.checkpoint import RegionSpotCheckpointer
from regionspot.utils.files import sha256_of_file

from ..helpers import ROOT

CONFIG = ROOT / "configs" / "miniworld" / "RegionSpot-mini.yaml"


@pytest.fixture(scope="module")
def recognizer(tmp_path_factory):
    cfg = miniworld_config(CONFIG, tmp_path_factory.mktemp("mini"))
    model = build_model(cfg).eval()
    RegionSpotCheckpointer.from_config(cfg, model).load("")
    return model.recognizer


@pytest.mark.parametrize("part", ["sam", "clip"])
def test_committed_weights_are_those_of_the_report(part):
    report = json.loads((WEIGHTS / f"{part}.json").read_text())
    assert sha256_of_file(WEIGHTS / f"{part}.safetensors") == report["sha256"]


def test_committed_weights_are_small():
    assert sum(path.stat().st_size for path in WEIGHTS.glob("*.safetensors")) <= 8e6


def test_clip_is_as_good_as_reported(recognizer):
    report = json.loads((WEIGHTS / "clip.json").read_text())
    found = report_clip(recognizer.vision_language.clip_model, number=150)
    for key in ("top1", "pattern", "colour", "shape"):
        assert found[key] == pytest.approx(report[key], abs=0.1)


def test_sam_is_as_good_as_reported(recognizer):
    report = json.loads((WEIGHTS / "sam.json").read_text())
    found = report_sam(recognizer.localizer.sam, number=15)
    for key in ("box_iou", "point_iou"):
        assert found[key] == pytest.approx(report[key], abs=0.06)


def test_demo_learns_and_writes_its_summary(tmp_path):
    arguments = ["--output", str(tmp_path), "--train", "200", "--test", "30", "SOLVER.MAX_ITER", "250"]
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "miniworld_demo.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    for key in (
        "base_top1",
        "novel_top1",
        "novel_top1_novel_vocabulary",
        "AP",
        "APr",
        "APc",
        "APf",
        "mask_AP",
        "sam_iou",
    ):
        assert isinstance(summary[key], float)
    assert isinstance(summary["crop_box_top1"], float) and isinstance(summary["crop_mask_top1"], float)
    assert {"proposal_file", "seconds", "seed", "versions"} <= set(summary)
    assert summary["base_top1"] > 0.08  # chance is 1 / 120
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert {"scene_0.png", "attention_0.png", "attention_1.png"} <= pictures
    assert "tools/demo.py" in result.stdout
