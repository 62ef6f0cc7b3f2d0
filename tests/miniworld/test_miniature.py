"""The committed weights, and the demo end to end at a small size."""

import json
import shutil
from argparse import Namespace
from collections import Counter
from functools import partial

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from miniworld import examples
from miniworld.__main__ import COMMANDS
from miniworld.__main__ import __file__ as MAIN
from miniworld.categories import NOVEL
from miniworld.experiment import CONFIG, CONFIGS, WEIGHTS, draw_data, miniworld_config
from miniworld.pretrain_clip import report_clip
from miniworld.pretrain_sam import report_sam
from miniworld.trained import training_directory
from regionspot.modeling import RegionRecognizer
from regionspot.modeling.localizers import Sam2Localizer
from regionspot.modeling.vision_language.open_clip import OpenClipVisionLanguageModel
from regionspot.utils.files import sha256_of_file

from ..helpers import ROOT
from ..processes import run_program

# As little training as shows that the model learns: one layer, a higher rate; and one prompt for each name.
SMALL = ["MODEL.REGIONSPOT.INTEGRATION.DEPTH", 1, "MODEL.REGIONSPOT.CLIP.TEMPLATES", "one"]
DEMO = [*SMALL, "SOLVER.MAX_ITER", 120, "SOLVER.IMS_PER_BATCH", 12, "SOLVER.WARMUP_ITERS", 20, "SOLVER.BASE_LR", 2e-3]


@pytest.fixture(scope="module")
def recognizer(tmp_path_factory):
    cfg = miniworld_config(CONFIG, tmp_path_factory.mktemp("mini"))
    return RegionRecognizer.from_pretrained(cfg).eval()


@pytest.mark.parametrize("part", ["sam", "clip", "sam2", "siglip"])
def test_committed_weights_match_report(part):
    report = json.loads((WEIGHTS / f"{part}.json").read_text())
    assert sha256_of_file(WEIGHTS / f"{part}.safetensors") == report["sha256"]


def test_committed_weights_are_small():
    assert max(path.stat().st_size for path in WEIGHTS.glob("*.safetensors")) <= 4e6


def test_clip_accuracy_matches_report(recognizer):
    """By one prompt template instead of the report's 81."""
    report = json.loads((WEIGHTS / "clip.json").read_text())
    measured = report_clip(recognizer.vision_language.clip_model, num_images=80, templates="one")
    for key in ("top1", "pattern", "color", "shape"):
        assert measured[key] == pytest.approx(report[key], abs=0.1)


def test_sam_iou_matches_report(recognizer):
    report = json.loads((WEIGHTS / "sam.json").read_text())
    measured = report_sam(recognizer.localizer.sam, num_scenes=15)
    for key in ("box_iou", "point_iou"):
        assert measured[key] == pytest.approx(report[key], abs=0.06)


def test_sam2_and_siglip_match_their_reports(tmp_path):
    """On fewer images, and by one prompt template instead of the report's 81."""
    cfg = miniworld_config(CONFIGS / "models" / "SAM2-SigLIP-mini.yaml", tmp_path)
    recognizer = RegionRecognizer.from_pretrained(cfg).eval()
    localizer, vision_language = recognizer.localizer, recognizer.vision_language
    siglip = partial(OpenClipVisionLanguageModel, config=vision_language.config)
    for part, measured in (
        ("sam2", report_sam(localizer.sam, Sam2Localizer, num_scenes=6)),
        ("siglip", report_clip(vision_language.clip_model, siglip, num_images=60, templates="one")),
    ):
        report = json.loads((WEIGHTS / f"{part}.json").read_text())
        for key, value in measured.items():
            assert value == pytest.approx(report[key], abs=0.1)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The directory of a short demo, and what it printed."""
    directory = tmp_path_factory.mktemp("demo")
    sizes = ["--train", 96, "--test", 8, "--workers", 1, *DEMO]
    quick = CONFIGS / "RegionSpot-mini-quick.yaml"
    return directory, run_program(directory, MAIN, "demo", "--output", directory, "--config-file", quick, *sizes)


def test_demo_learns_and_writes_summary(demo):
    directory, output = demo
    summary = json.loads((directory / "summary.json").read_text())
    numbers = ["base_top1", "novel_top1", "novel_top1_novel_vocabulary", "crop_box_top1", "crop_mask_top1", "sam_iou"]
    for key in [*numbers, "AP", "APr", "APc", "APf", "mask_AP"]:
        assert isinstance(summary[key], float)
    assert {"proposal_file", "seconds", "seed", "versions"} <= set(summary)
    assert summary["base_top1"] > 0.08  # chance is 1 / 120
    images = {path.name for path in directory.glob("*.png")}
    assert {"scene_0.png", "attention_0.png", "attention_1.png"} <= images
    report = (directory / "report.html").read_text()
    assert f"{summary['AP']:.2f}" in report and f"{summary['proposal_file']['AP']:.2f}" in report
    assert f"open {directory / 'report.html'} in a browser" in output
    assert (
        (directory / "search" / "sheet.png").is_file() and "search --index" in output and "predict --config" in output
    )
    rows = (directory / "search" / "regions.csv").read_text().splitlines()[1:]
    assert len(rows) == 12 and all(row.split(",")[2].startswith("test/") for row in rows)


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_matches_demo(demo, tmp_path, monkeypatch, processes):
    """On one process and on two, from the checkpoint and the data on disk, it gives the demo's numbers."""
    directory, _ = demo
    monkeypatch.setenv("REGIONSPOT_CACHE", str(directory / "cache"))  # the names are encoded once for both
    weights = ["MODEL.WEIGHTS", directory / "training" / "model_final.pth", "OUTPUT_DIR", tmp_path]
    options = ["--config-file", CONFIG, "--eval-only", "--num-gpus", processes, "--dist-url", "auto"]
    data = f"{directory}/data/miniworld/test.json:{directory}/data/miniworld"
    command = [ROOT / "tools" / "train_net.py", *options, *weights, *SMALL, "DATASETS.TEST", f"('{data}',)"]
    lines = run_program(tmp_path, *command).splitlines()
    rows = [line.split("copypaste: ")[1] for line in lines if "copypaste: " in line]
    assert [rows[0], rows[3]] == ["Task: bbox", "Task: segm"]
    keys, boxes, masks = (row.split(",") for row in (rows[1], rows[2], rows[5]))
    metrics = {**dict(zip(keys, boxes)), "mask_AP": masks[0]}
    summary = json.loads((directory / "summary.json").read_text())
    for key in ("AP", "APr", "APc", "APf", "mask_AP"):
        assert float(metrics[key]) == pytest.approx(summary[key], abs=2e-4)


def place_weights(demo, output, num_scenes, overrides):
    """Copy the demo's weights to where the experiments with these settings look for them."""
    args = Namespace(output=output, train=num_scenes, opts=[str(part) for part in overrides])
    directory = training_directory(args, CONFIG, 0)
    directory.mkdir(parents=True)
    shutil.copy(demo / "training" / "model_final.pth", directory)


@pytest.fixture(scope="module")
def trained(demo, tmp_path_factory):
    """A directory of experiments with the demo's weights; what they register is forgotten afterwards."""
    registered = [(catalog, dict(catalog.data)) for catalog in (DatasetCatalog, MetadataCatalog)]
    directory = tmp_path_factory.mktemp("experiments")
    place_weights(demo[0], directory, 1, SMALL)
    yield directory, ["--output", directory, "--config-file", CONFIG, "--train", 1, "--workers", 1, "--val", 30]
    for catalog, content in registered:
        catalog.data.clear()
        catalog.data.update(content)


def test_audit_finds_more_errors_than_chance(demo, trained, monkeypatch, capsys):
    directory, options = trained
    monkeypatch.setenv("REGIONSPOT_CACHE", str(demo[0] / "cache"))  # the names are encoded once for all
    points = COMMANDS["audit"].call(*options, *SMALL)
    number, precision, recall = next(point for point in points if point[1] > 0)
    assert points[-1][2] > 4 * 0.05 + 0.1  # chance finds a share of 4 * 5 % in the last row's labels
    assert 0 < precision <= 1 and 0 < recall <= 1 and number > 0
    assert "labels are wrong" in capsys.readouterr().out and (directory / "audit" / "audit.html").is_file()


def test_examples_of_the_classes_that_have_them(demo, trained, monkeypatch, capsys):
    directory, options = trained
    monkeypatch.setenv("REGIONSPOT_CACHE", str(demo[0] / "cache"))
    draw_data(directory / "data", {"val": 30, "test": 30}, 1)
    examples_of, tested = (
        Counter(x["category_id"] for record in DatasetCatalog.get(f"miniworld_{split}") for x in record["annotations"])
        for split in ("val", "test")
    )
    present = [label for label in NOVEL if examples_of[label] >= 2 and tested[label]][:2]
    assert len(present) == 2
    monkeypatch.setattr(examples, "NOVEL", present)
    monkeypatch.setattr(examples, "NUMBERS", (1, 2))
    options = [*options, "--test", 30, "--seeds", 1]
    COMMANDS["examples"].call(*options, *SMALL)
    results = json.loads((directory / "examples" / "0.json").read_text())
    assert list(results)[:3] == ["name", "1 example", "2 examples"] and len(results) == 6
    assert all(0 <= value <= 1 for row in results.values() for value in row.values())
    assert "| name and 2 examples" in capsys.readouterr().out


def test_transfer_to_sam2_keeps_more_than_chance(demo, trained, monkeypatch, capsys):
    directory, _ = demo  # its scenes and features are used again
    overrides = [*SMALL, "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.WARMUP_ITERS", 0]
    place_weights(directory, directory, 96, overrides)
    monkeypatch.setenv("REGIONSPOT_CACHE", str(directory / "cache"))
    sizes = ["--train", 96, "--split", "val", "--test", 4, "--steps", 2, "--seeds", 1, "--workers", 1]
    COMMANDS["transfer"].call("--output", directory, *sizes, *overrides)
    results = json.loads((directory / "transfer" / "val-0.json").read_text())["results"]
    trained_on_sam, mapped, tuned, scratch, whole = (row["base_top1"] for row in results.values())
    assert mapped > 0.5 * trained_on_sam > 2 / 120  # chance is 1 / 120
    assert max(scratch, whole) < min(mapped, tuned)
    assert 0 < list(results.values())[1]["explained_variance"] < 1
    assert "| SAM 2, the map alone" in capsys.readouterr().out
