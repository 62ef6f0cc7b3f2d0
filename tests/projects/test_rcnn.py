"""projects/RegionSpotRCNN as a user runs it, and Detectron2's own trainer with the head."""

import json
import re
from itertools import chain

import pytest
import torch
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import LVISEvaluator
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from regionspot import RegionSpotPredictor
from regionspot.checkpoint.loading import find_recognizer
from regionspot.config import load_config
from regionspot.data.build import check_registered
from regionspot.engine import RegionSpotTrainer
from regionspot.engine.evaluate import load_host
from regionspot.evaluation import DetectionLVISEvaluator

from ..engine.test_trainer import assert_same
from ..evaluation.reference import lvis_on_current_numpy
from ..helpers import (
    NAMES,
    ROOT,
    as_inputs,
    flat,
    frozen_overrides,
    load_program,
    tiny_config,
    write_user_files,
)
from ..processes import run_program

PROJECT = ROOT / "projects" / "RegionSpotRCNN"
CONFIG = ROOT / "tests" / "tiny_rcnn.yaml"
rcnn_training = load_program(PROJECT / "rcnn_training.py")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A user's directory: my.json, my_images, and the frozen weights, the same for all processes."""
    directory = tmp_path_factory.mktemp("user")
    write_user_files(directory)
    return directory


def overrides(directory, output, *more):
    data = f"{directory}/my.json:{directory}/my_images"
    keys = {"DATASETS.TRAIN": (data,), "DATASETS.TEST": (data,), "OUTPUT_DIR": directory / output}
    keys |= {"INPUT.MIN_SIZE_TRAIN": (96,), "INPUT.MIN_SIZE_TEST": 96, "SOLVER.IMS_PER_BATCH": 4, "SOLVER.STEPS": ()}
    keys |= {"SOLVER.WARMUP_ITERS": 1, "MODEL.REGIONSPOT.PROPOSALS.TOP_K": 8, "TEST.DETECTIONS_PER_IMAGE": 20}
    return [str(part) for part in (*frozen_overrides(directory), *chain.from_iterable(keys.items()), *more)]


def run_project(directory, output, *options, processes=1, more=()):
    script = [PROJECT / "train_net.py", "--config-file", CONFIG, "--num-gpus", processes]
    return run_program(directory, *script, "--dist-url", "auto", *options, *overrides(directory, output, *more))


def metrics_of(log):
    """Return the metrics in Detectron2's last line of results of boxes."""
    lines = [line for line in log.splitlines() if "copypaste: " in line]
    at = next(i for i, line in enumerate(lines) if "Task: bbox" in line)
    return [float(value) for value in lines[at + 2].split("copypaste: ")[1].split(",")]


def trained_state(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.fixture(scope="module")
def joint(directory):
    """A checkpoint of host and head, trained in one process."""
    run_project(directory, "one", more=("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 1))
    return directory / "one" / "model_final.pth"


def test_training_in_one_and_two_processes(directory, joint):
    log = run_project(directory, "two", processes=2, more=("SOLVER.MAX_ITER", 4))
    assert "copypaste: Task: bbox" in log
    first, last = trained_state(directory / "one" / "model_0000000.pth"), trained_state(joint)
    two = trained_state(directory / "two" / "model_final.pth")
    for key, value in first.items():  # the host and frozen parts stay, in one process and in two
        for state in (last, two):
            assert torch.equal(state[key], value) != ("knowledge_integration" in key), key


def test_evaluation_in_one_and_two_processes(directory, joint):
    logs = [
        run_project(directory, f"eval{processes}", "--eval-only", processes=processes, more=("MODEL.WEIGHTS", joint))
        for processes in (1, 2)
    ]
    one, two = map(metrics_of, logs)
    assert one == pytest.approx(two, nan_ok=True) and len(one) > 5
    names = json.loads((directory / "eval1" / "inference" / "lvis_instances_results.json").read_text())
    assert {entry["category_id"] for entry in names} <= {3, 1, 10, 7} and len(names) > 20
    assert re.search(r"AP, ?AP50", logs[0])


@pytest.mark.parametrize("name", ["faster_rcnn_R_50_FPN", "mask_rcnn_R_50_FPN", "faster_rcnn_R_50_FPN_keep_coco"])
def test_shipped_configs_with_zoo_detectors(name):
    """The zoo's detectors at full size, RegionSpot at the tests' size, all weights random."""
    tiny = {
        key: value for key, value in tiny_config().MODEL.REGIONSPOT.items() if key in ("SAM", "CLIP", "INTEGRATION")
    }
    small = [
        *chain.from_iterable(flat(tiny, "MODEL.REGIONSPOT").items()),
        "MODEL.REGIONSPOT.VOCABULARY",
        "person, red square, green disc",
    ]
    cfg = load_config(PROJECT / "configs" / f"{name}.yaml", [*small, "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if name.endswith("keep_coco"):
        predictor = model.roi_heads.host.box_predictor
        torch.nn.init.zeros_(predictor.cls_score.weight)
        predictor.cls_score.bias.data[0] = 10  # detects only persons
    [output] = model([{**as_inputs(0), "height": 96, "width": 128}])
    detections = output["instances"]
    assert 0 < len(detections) <= 300 and detections.pred_boxes.tensor[:, 2].max() <= 128
    assert detections.has("pred_masks") == name.startswith("mask")
    persons = detections.scores[detections.pred_classes == 0]
    assert len(persons) and (persons.min() > 0.9) == name.endswith("keep_coco")


def test_predictor_loads_joint_checkpoint(directory, joint):
    cfg = tiny_config(*overrides(directory, "p", "MODEL.WEIGHTS", joint))
    predictor = RegionSpotPredictor(cfg)
    assert not predictor.random_parts
    expected = trained_state(joint)["roi_heads.recognizer.knowledge_integration.to_clip.weight"]
    assert torch.equal(predictor.recognizer.knowledge_integration.to_clip.weight, expected)


def test_default_trainer_and_lvis_evaluator(directory):
    """Only the head is RegionSpot's: ``DefaultTrainer`` trains, its ``test`` evaluates."""
    more = ("SOLVER.MAX_ITER", 3, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value")
    cfg = load_config(CONFIG, overrides(directory, "theirs", *more))
    (directory / "theirs").mkdir()
    check_registered(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")

    class Trainer(DefaultTrainer):
        @classmethod
        def build_evaluator(cls, cfg, name):
            return LVISEvaluator(name, output_dir=cfg.OUTPUT_DIR)

    trainer = Trainer(cfg)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.resume_or_load(resume=False)
    with lvis_on_current_numpy():
        trainer.train()
    results = trainer._last_eval_results
    assert results["bbox"]["AP"] >= 0
    evaluator = DetectionLVISEvaluator(cfg.DATASETS.TEST[0], directory / "ours")
    assert DefaultTrainer.test(cfg, trainer.model, [evaluator])["bbox"]["APf"] == pytest.approx(results["bbox"]["APf"])
    changed = {key for key, value in trainer.model.state_dict().items() if not torch.equal(before[key], value)}
    assert changed and all("knowledge_integration" in key for key in changed)


def test_resume_matches_uninterrupted_run(directory):
    """With accumulation, an average, and batches of images of the same orientation."""
    options = ("SOLVER.ACCUMULATE", 2, "SOLVER.EMA.ENABLED", True, "SEED", 3)
    options += ("SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()")
    options += ("MODEL.REGIONSPOT.VOCABULARY", ",".join(NAMES))

    def train(start):
        trainer = rcnn_training.Trainer(load_config(CONFIG, overrides(directory, "run", *options)))
        trainer.resume_or_load(resume=True)
        trainer.train()
        assert trainer.start_iter == start
        return torch.load(directory / "run" / "model_final.pth", weights_only=True)

    whole = train(0)
    (directory / "run" / "last_checkpoint").write_text("model_0000001.pth")
    resumed = train(2)
    assert whole["ema"] and whole["iteration"] == 2
    assert_same(resumed, whole)
    model = build_model(load_config(CONFIG, overrides(directory, "run")))
    load_host(model, str(directory / "run" / "model_final.pth"), "")
    average = find_recognizer(model).knowledge_integration.state_dict()
    assert all(torch.equal(value, whole["ema"][key]) for key, value in average.items())


def test_bfloat16_on_cpu(directory):
    more = ("SOLVER.AMP.ENABLED", True, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")
    cfg = load_config(CONFIG, overrides(directory, "bf16", *more, "MODEL.REGIONSPOT.VOCABULARY", ",".join(NAMES)))
    trainer = rcnn_training.Trainer(cfg)
    trainer.train()
    assert trainer.loop.precision == torch.bfloat16 and trainer.storage.latest()["total_loss"][0] > 0


def test_unsupported_configs_are_refused(directory):
    with pytest.raises(ValueError, match="SOLVER.EMA averages RegionSpot's attention module, but backbone"):
        more = ("SOLVER.EMA.ENABLED", True, "MODEL.REGIONSPOT.HEAD.FREEZE_HOST", False)
        rcnn_training.Trainer(load_config(CONFIG, overrides(directory, "no", *more)))
    with pytest.raises(ValueError, match="expected RegionSpot or CropBaseline, got 'RegionSpotRCNN'"):
        RegionSpotTrainer(load_config(CONFIG, overrides(directory, "no")))
    cfg = load_config(CONFIG, overrides(directory, "no", "MODEL.REGIONSPOT.VOCABULARY", "a, b, c"))
    check_registered(cfg.DATASETS.TEST, "DATASETS.TEST")
    with pytest.raises(ValueError, match="3 names, but .* has 4 classes"):
        rcnn_training.Trainer.test(cfg, build_model(cfg))


def test_unknown_classes_are_refused(directory):
    name = f"{directory}/my.json:{directory}/my_images"
    check_registered([name], "DATASETS.TEST")
    evaluator = DetectionLVISEvaluator(name, directory / "wrong")
    evaluator.reset()
    output = Instances((48, 64), pred_boxes=Boxes([[0, 0, 4, 4]]), scores=torch.ones(1), pred_classes=torch.tensor([4]))
    evaluator.process([{"image_id": 1}], [{"instances": output}])
    with pytest.raises(ValueError, match="predicts class 4, but .* has 4 classes"):
        evaluator.evaluate()
