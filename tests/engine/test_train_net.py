"""tools/train_net.py as a user runs it: torchrun, evaluation, and errors."""

import json
import logging
import multiprocessing

import pytest
import torch
import torch.distributed.run
from termcolor import colored

from regionspot.config import load_config
from regionspot.engine import RegionSpotTrainer
from regionspot.utils.run_lock import run_lock
from regionspot_cli.commands import COMMANDS

from ..helpers import ROOT, TINY, frozen_overrides, tiny_config, write_user_files
from ..processes import run_program


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A user's files: my.json, my_val.json, my_images; the frozen weights, the same for all processes, beside it."""
    directory = tmp_path_factory.mktemp("user")
    write_user_files(directory)
    path = directory / "my_val.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:  # only the required keys
        for key in ("id", "area", "iscrowd"):
            del annotation[key]
    path.write_text(json.dumps(content))
    return directory


def run_here(directory, *options, overrides=()):
    """Run train_net in this process."""
    arguments = ["--config-file", str(TINY), *options, *frozen_overrides(directory), *map(str, overrides)]
    return COMMANDS["train"].call(*arguments)


def test_two_processes_match_one_with_twice_the_batch(directory, tmp_path):
    """By torchrun, with SAM in the loop; a step of the optimizer is 7e-4, and the weights agree to 2e-4."""
    weights = []
    overrides = ["DATASETS.TRAIN", f"('{directory}/my.json:{directory}/my_images',)", "DATASETS.TEST", "()"]
    schedule = {"MAX_ITER": 3, "IMS_PER_BATCH": 4, "BASE_LR": 7e-4, "WARMUP_ITERS": 2, "STEPS": "()"}
    overrides += [part for key, value in schedule.items() for part in (f"SOLVER.{key}", value)]
    overrides += [
        "MODEL.REGIONSPOT.INTEGRATION.DROPOUT",
        "0.0",
        "INPUT.RANDOM_FLIP",
        "horizontal",
        *frozen_overrides(directory),
    ]
    torchrun = [torch.distributed.run.__file__, "--standalone", "--nproc-per-node", 2]
    torchrun += ["--start-method", "fork", "--run-path"]  # saves the imports
    command = [ROOT / "tools/train_net.py", "--config-file", TINY, *overrides, "OUTPUT_DIR"]
    run_program(tmp_path, *command, tmp_path / "one")
    run_program(tmp_path, *torchrun, *command, tmp_path / "two")
    for name in ("one", "two"):
        weights.append(torch.load(tmp_path / name / "model_final.pth", weights_only=True))
    assert weights[0]["frozen"] == weights[1]["frozen"]
    for key, value in weights[0]["model"].items():
        torch.testing.assert_close(value, weights[1]["model"][key], atol=2e-4, rtol=0)


def test_evaluation_on_one_and_two_processes(directory, tmp_path):
    run_here(
        directory,
        overrides=[
            *["DATASETS.TRAIN", f"('{directory}/my.json:{directory}/my_images',)", "DATASETS.TEST", "()"],
            *["SOLVER.MAX_ITER", 5, "SOLVER.IMS_PER_BATCH", 4, "OUTPUT_DIR", tmp_path],
        ],
    )
    options = ["--eval-only", "--num-gpus", "2", "--dist-url", "auto", "--config-file", TINY]
    overrides = ["MODEL.WEIGHTS", tmp_path / "model_final.pth", "OUTPUT_DIR", tmp_path, "MODEL.MASK_ON", "True"]
    overrides += ["DATASETS.TEST", f"('{directory}/my.json:{directory}/my_images',)", *frozen_overrides(directory)]
    two = run_program(tmp_path, ROOT / "tools/train_net.py", *options, *overrides)
    [written] = (tmp_path / "inference").glob("*/metrics.json")
    by_two = written.read_text()
    one = run_here(directory, "--eval-only", overrides=overrides)
    assert written.read_text() == by_two  # to the last digit
    rows = [line.split("copypaste: ")[1] for line in two.splitlines() if "copypaste: " in line]
    assert rows[0] == "Task: bbox" and rows[3] == "Task: segm" and rows[1].endswith("APr,APc,APf")
    for row, task in ((2, "bbox"), (5, "segm")):
        assert float(rows[row].split(",")[0]) == pytest.approx(one[task]["AP"], abs=1e-3)


def test_coco_dataset_is_evaluated_as_coco(directory, tmp_path):
    name = f"('{directory}/my_val.json:{directory}/my_images',)"
    overrides = ["DATASETS.TEST", name, "MODEL.MASK_ON", "True", "OUTPUT_DIR", tmp_path]
    results = run_here(directory, "--eval-only", overrides=overrides)
    assert set(results) == {"bbox", "segm", "region"} and "APr" not in results["bbox"]


def _hold(directory, started):
    with run_lock(directory):
        started.set()
        multiprocessing.Event().wait()


@pytest.mark.parametrize("what", ["training", "evaluation", "trainer"])
def test_second_run_in_directory_is_refused(directory, tmp_path, what):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, started))
    process.start()
    assert started.wait(60)
    leftover = tmp_path / ".model_final.pth.0123.tmp"  # which the first run is writing
    leftover.touch()
    before = sorted(tmp_path.iterdir())
    name = f"('{directory}/my.json:{directory}/my_images',)"
    overrides = ["DATASETS.TRAIN", name, "DATASETS.TEST", name, "OUTPUT_DIR", tmp_path]
    try:
        with pytest.raises(ValueError, match=f"{tmp_path}: another run is at work there .process {process.pid} on "):
            if what == "trainer":
                RegionSpotTrainer(tiny_config(*map(str, overrides), *map(str, frozen_overrides(directory)))).train()
            else:
                run_here(directory, *["--eval-only"] * (what == "evaluation"), overrides=overrides)
        assert leftover.exists() and (what == "trainer" or sorted(tmp_path.iterdir()) == before)
    finally:
        process.kill()
        process.join()


def test_log_is_short_and_plain(directory, tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as if for a terminal
    data = f"('{directory}/my.json:{directory}/my_images',)"
    overrides = ["DATASETS.TRAIN", data, "DATASETS.TEST", data, "SOLVER.MAX_ITER", 60, "SOLVER.IMS_PER_BATCH", 1]
    run_here(directory, overrides=[*overrides, "SOLVER.CHECKPOINT_PERIOD", 20, "OUTPUT_DIR", tmp_path])
    logging.getLogger("detectron2").warning(colored("in color", "red"))
    log = (tmp_path / "log.txt").read_text()
    assert "in color" in log and "\x1b" not in log and len(log.splitlines()) < 60
    for text in ("torch", "8 images with", "0.16 million parameters learn", "iter: 59", "bbox", "Saved checkpoint"):
        assert text in log, text
    written = load_config(tmp_path / "config.yaml")
    assert written.SOLVER.MAX_ITER == 60 and str(tmp_path) == written.OUTPUT_DIR
    assert "PyTorch" in (tmp_path / "environment.txt").read_text()


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["DATASETS.TRAIN", "('unknown',)"], KeyError, "'unknown' is not registered"),
        (["DATASETS.TRAIN", "('lvis_v1_trian',)"], KeyError, "do you mean lvis_v1_train"),
        (["DATASETS.TRAIN", "('no.json:images',)"], FileNotFoundError, "no.json: no such file"),
        (["DATASETS.TRAIN", "('my.json',)"], ValueError, "names no images: expected 'annotations.json:directory"),
        (["DATASETS.TRAIN", "()"], ValueError, "DATASETS.TRAIN is empty"),
        (["SOLVER.OPTIMIZER", "Adam"], ValueError, "expected AdamW"),
        (["DATASETS.TEST", "('unknown',)"], KeyError, "'unknown' is not registered"),
        (["MODEL.WEIGHTS", "no.pth"], FileNotFoundError, "no.pth.*no such file"),
        (["DATASETS.TOKEN_STORES_TRAIN", "('no_store',)"], FileNotFoundError, "make it with tools/extract_tokens.py"),
    ],
)
def test_settings_are_checked_before_training(directory, tmp_path, overrides, error, message):
    own = ["DATASETS.TRAIN", f"('{directory}/my.json:{directory}/my_images',)", "DATASETS.TEST", "()"]
    with pytest.raises(error, match=message):
        run_here(directory, overrides=[*own, "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", tmp_path, *overrides])
