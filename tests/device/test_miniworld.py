"""The demo, the ablations and the detection of the miniature world on a simulated accelerator."""

import os
import sys
from argparse import Namespace

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from miniworld import ablations, demo, experiment
from miniworld.drawing import draw_predictions
from regionspot.data.tokens import TokenStore

from ..helpers import ROOT, load_program

MINI = [
    "MODEL.DEVICE",
    "meta",
    "SOLVER.MAX_ITER",
    "2",
    "SOLVER.IMS_PER_BATCH",
    "4",
    "MODEL.REGIONSPOT.CLIP.TEMPLATES",
    "one",
]


@pytest.fixture(autouse=True)
def catalogs(monkeypatch):
    """Forget what is registered in place of the miniature world of $DETECTRON2_DATASETS."""
    for catalog in (DatasetCatalog, MetadataCatalog):
        monkeypatch.setattr(catalog, "data", dict(catalog.data))


@pytest.fixture
def miniworld(tmp_path):
    """Scenes in a directory, registered; a config, and a trained model."""
    experiment.draw_data(tmp_path / "data", {"train": 6, "test": 2}, 1)
    cfg = experiment.miniworld_config(experiment.CONFIG, tmp_path / "out", 0, MINI)
    return cfg, experiment.train(cfg, tmp_path / "features"), experiment.test_scenes("test", 2)


def test_demo(miniworld, tmp_path):
    """What ``miniworld demo`` does."""
    cfg, model, scenes = miniworld
    summary = demo.evaluate(cfg, model, scenes, tmp_path, demo.Stages())
    assert {"base_top1", "jittered_base_top1", "crop_mask_base_top1", "mask_AP"} <= set(summary)
    assert "attention_0" in draw_predictions(model.recognizer, scenes[:1])


def test_ablations(tmp_path, monkeypatch):
    jobs = os.cpu_count()  # so that a run uses one thread, as all tests do
    args = Namespace(output=tmp_path, train=4, test=2, jobs=jobs, seeds=1, rows=None, split="test", opts=MINI)
    evaluated, evaluate = [], experiment.average_precision

    def record(cfg, model, split):
        ensemble = model.recognizer.ensemble
        evaluated.append((model.recognizer.rule.score_function, ensemble and (ensemble.alpha, ensemble.beta)))
        return evaluate(cfg, model, split)

    monkeypatch.setattr(experiment, "average_precision", record)
    ablations.run_once("RegionSpot-mini", 0, args)
    assert evaluated == [("softmax", None), ("sigmoid", None), ("softmax", (0.0, 0.2)), ("softmax", (0.2, 0.1))]
    rows = {line.split("|")[1].strip(): line.split("|")[2:5] for line in ablations.table(args).splitlines()}
    assert rows["full model"] == rows["sigmoid scores"] and rows["full model"][0].strip()  # the same weights


def test_detection_in_miniature(tmp_path, monkeypatch):
    """What projects/RegionSpotRCNN/miniworld_detection.py does for one of its hosts."""
    project = ROOT / "projects" / "RegionSpotRCNN"
    monkeypatch.setitem(sys.modules, "rcnn_training", load_program(project / "rcnn_training.py"))  # beside it
    miniworld_detection = load_program(project / "miniworld_detection.py")
    few = ["MODEL.RPN.POST_NMS_TOPK_TEST", "8", "TEST.DETECTIONS_PER_IMAGE", "5"]
    args = Namespace(output=tmp_path, weights=None, seed=0, split="test", opts=[*MINI, *few])
    experiment.draw_data(tmp_path / "data", {"train": 6, "test": 2}, 1)
    miniworld_detection.register_host_data("test")
    host, head = miniworld_detection.train_host("class-agnostic", args), miniworld_detection.train_recognizer(args)
    cfg, model = miniworld_detection.build("RegionSpot-head", args, host, head)
    assert model.device.type == "meta" and "segm" in miniworld_detection.Trainer.test(cfg, model)
    [scene] = experiment.test_scenes("test", 1)
    assert miniworld_detection.draw_detections(model, scene, score=0.0).dtype == "uint8"


def test_training_waits_for_features_of_another_run(tmp_path, monkeypatch):
    answers, waits, extract_tokens = [False, False, True], [], experiment.extract_tokens
    monkeypatch.setattr(experiment, "extract_tokens", lambda *args: answers.pop(0) and extract_tokens(*args))
    monkeypatch.setattr(experiment.time, "sleep", waits.append)
    experiment.draw_data(tmp_path / "data", {"train": 4}, 1)
    cfg = experiment.miniworld_config(experiment.CONFIG, tmp_path / "out", 0, MINI)
    experiment.train(cfg, tmp_path / "features")
    assert answers == [] and len(waits) == 2


def test_box_jitter_trains_on_copies(tmp_path):
    experiment.draw_data(tmp_path / "data", {"train": 4}, 1)
    stores = []
    for name in ("RegionSpot-mini", "plus/box-jitter"):
        cfg = experiment.miniworld_config(experiment.CONFIGS / f"{name}.yaml", tmp_path / name, 0, MINI)
        experiment.train(cfg, tmp_path / "features")
        stores.append(TokenStore(experiment.store_path(cfg, tmp_path / "features", "train")))
    assert [(store.jitter, store.num_copies) for store in stores] == [(0, 0), (0.08, 3)]
