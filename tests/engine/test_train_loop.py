"""Training steps with numbers that are not finite: float16 skips them, other precisions stop in all processes."""

import json
import re
from argparse import Namespace
from functools import partial

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from regionspot.data import register_json_dataset
from regionspot.engine import RegionSpotTrainer, launch, train_loop
from regionspot.engine.extract import Extraction, extract_tokens

from ..helpers import tiny_config, tiny_model, write_dataset

NAME = "test_train_loop"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Return the overrides for a registered data set, its store, and the frozen weights that made it."""
    directory = tmp_path_factory.mktemp("scenes")
    register_json_dataset(NAME, write_dataset(directory / "data", 12), directory / "data" / "images")
    model, store = tiny_model(names=None), directory / "store"
    sources = {"sam": str(directory / "sam.pth"), "clip_model": str(directory / "clip.pth")}
    torch.save(model.recognizer.localizer.sam.state_dict(), sources["sam"])
    torch.save(model.recognizer.vision_language.clip_model.state_dict(), sources["clip_model"])
    model.recognizer.weight_sources.update(sources)
    extract_tokens(model.recognizer, NAME, store, Extraction(feature_maps=True), show_progress=False)
    weights = ["MODEL.REGIONSPOT.SAM.WEIGHTS", sources["sam"], "MODEL.REGIONSPOT.CLIP.WEIGHTS", sources["clip_model"]]
    yield [*weights, "DATASETS.TRAIN", (NAME,), "DATASETS.TOKEN_STORES_TRAIN", (str(store),), "DATASETS.TEST", ()]
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture
def cfg(scenes, tmp_path):
    schedule = ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 4, "SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS", ()]
    return tiny_config(*scenes, *schedule, "OUTPUT_DIR", str(tmp_path))


def build(cfg, precision=torch.float16):
    """Return a trainer; float16 on a CPU is for tests only, so no config allows it."""
    torch.manual_seed(0)
    trainer = RegionSpotTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.loop.precision = precision
    trainer.loop.scaler = torch.amp.GradScaler("cpu", 256.0, enabled=precision == torch.float16)
    return trainer


def spoil_losses(trainer, iterations, value):
    """Multiply the losses of some iterations."""
    loss = trainer.recognizer.loss
    trainer.recognizer.loss = lambda *args: loss(*args) * (value if trainer.iter in iterations else 1.0)


def steps_taken(trainer):
    """Return the number of steps of the optimizer."""
    return int(next(iter(trainer.loop.optimizer.state.values()))["step"])


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e36], ids=["inf", "nan", "overflow"])
def test_float16_overflow_skips_the_step(cfg, tmp_path, caplog, value):
    """With an infinite loss, and with a finite one whose scaled gradients are infinite; clipping sees neither."""
    trainer = build(cfg)
    spoil_losses(trainer, {1}, value)
    with caplog.at_level("INFO"):
        trainer.train()
    assert steps_taken(trainer) == 3 and trainer.loop.skipped == 1
    assert trainer.loop.scaler.get_scale() == 128
    assert "iteration 1: float16 overflowed; the step is skipped (1 in all)" in caplog.text
    assert all(p.isfinite().all() for p in trainer.recognizer.knowledge_integration.parameters())
    assert json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])["skipped_steps"] == 1


def test_float16_stops_after_many_overflows(cfg, monkeypatch):
    monkeypatch.setattr(train_loop, "MAX_SKIPPED_STEPS", 3)
    trainer = build(cfg)
    spoil_losses(trainer, {0, 2, 3, 4}, float("nan"))
    trainer.max_iter = 9
    with pytest.raises(FloatingPointError, match="iteration 4: the gradients of 3 steps in a row.*images of the batch"):
        trainer.train()


def test_float16_matches_float32(cfg):
    losses = []
    for precision in (torch.float16, None):
        trainer = build(cfg, precision)
        trainer.train()
        losses.append(trainer.storage.history("total_loss").values())
    assert losses[0] != losses[1]
    torch.testing.assert_close(*(torch.tensor(values)[:, 0] for values in losses), rtol=0.02, atol=0)


def test_first_steps_log_memory_and_time(cfg, caplog):
    cfg.SOLVER.MAX_ITER = 7
    trainer = build(cfg, None)
    with caplog.at_level("INFO", "regionspot.engine.hooks"):
        trainer.train()
    [line] = [message for message in caplog.messages if message.startswith("first ")]
    match = re.fullmatch(
        r"first 5 steps: peak memory (.*) GB \(cpu\), (.*) s a step, about 0:00:(..) to iteration 7", line
    )
    memory, seconds, left = map(float, match.groups())
    assert 0.1 < memory < 20 and 0 < seconds < 10 and left == round(2 * seconds)


def train_process(args):
    """Train with a loss that is not finite in the second process; write how each process ended."""
    trainer = build(args.cfg, args.precision)
    if comm.get_rank() == 1:
        spoil_losses(trainer, {1}, float("inf"))
    try:
        trainer.train()
        weights = trainer.recognizer.knowledge_integration.state_dict().values()
        ending = [trainer.loop.skipped, steps_taken(trainer), sum(w.sum().item() for w in weights)]
    except FloatingPointError as error:
        ending = str(error)
    (args.directory / str(comm.get_rank())).write_text(json.dumps([ending, trainer.loop._ids]))


@pytest.mark.parametrize("precision", [torch.float16, None])
def test_processes_agree_on_infinite_loss(cfg, tmp_path, monkeypatch, precision):
    forked = partial(torch.multiprocessing.start_processes, start_method="fork")  # saves the imports
    monkeypatch.setattr(torch.multiprocessing, "start_processes", forked)
    group = {"num_gpus": 2, "num_machines": 1, "machine_rank": 0, "dist_url": "auto"}
    launch(train_process, Namespace(**group, cfg=cfg, directory=tmp_path, precision=precision), "cpu")
    (first, _), (second, images) = [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    assert first == second
    if precision:
        assert first[:2] == [1, 3]
    else:
        assert f"iteration 1: {{'loss_cls': inf}}; images of the batch: {', '.join(images)}. " in first
