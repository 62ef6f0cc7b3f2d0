"""The trainer: resuming, averages, precision, accumulation, files, and errors."""

import json
import logging
import multiprocessing
import os
import random
import shutil
import time

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from regionspot.checkpoint.checkpointer import RegionSpotCheckpointer
from regionspot.data import build_test_loader, register_json_dataset
from regionspot.engine import RegionSpotTrainer
from regionspot.engine.extract import Extraction, extract_tokens
from regionspot.engine.trainer import best_metric

from ..helpers import frozen_overrides, tiny_config, tiny_model, write_dataset, write_frozen_parts

logging.getLogger("detectron2").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A registered data set, its stores, and the frozen weights that made them."""
    directory = tmp_path_factory.mktemp("scenes")
    name = "test_trainer"
    register_json_dataset(name, write_dataset(directory / "data", 12), directory / "data" / "images", "lvis")
    recognizer = tiny_model(names=None).recognizer
    sources = {"sam": str(directory / "sam.pth"), "clip_model": str(directory / "clip.pth")}
    write_frozen_parts(recognizer, directory)
    extraction = Extraction(flip=True, feature_maps=True)
    recognizer.weight_sources.update(sources)
    extract_tokens(recognizer, name, directory / "store", extraction, show_progress=False)
    yield directory
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def config(scenes, output, *overrides):
    data = ["DATASETS.TRAIN", ("test_trainer",), "DATASETS.TEST", (), "OUTPUT_DIR", str(output)]
    store = ["DATASETS.TOKEN_STORES_TRAIN", (str(scenes / "store"),)]
    solver = ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.BASE_LR", 7e-4, "SOLVER.WARMUP_ITERS", 5, "SOLVER.STEPS", ()]
    return tiny_config(*frozen_overrides(scenes), *data, *store, *solver, *overrides)


def train(scenes, output, *overrides, resume=False):
    cfg = config(scenes, output, *overrides)
    output.mkdir(exist_ok=True)
    torch.manual_seed(cfg.SEED)
    trainer = RegionSpotTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def saved(directory, name="model_final.pth"):
    return torch.load(directory / name, weights_only=True)


def assert_same(one, two):
    """Compare whatever is in a checkpoint, tensors to the bit."""
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for a, b in zip(one, two):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    else:
        assert one == two


EXACT = ("SOLVER.MAX_ITER", 12, "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.9)
EXACT += ("INPUT.RANDOM_FLIP", "horizontal", "SOLVER.ACCUMULATE", 2)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_killed_run_resumes_exactly(scenes, tmp_path, precision):
    overrides, killed = (*EXACT, "SOLVER.AMP.ENABLED", precision == "bf16"), tmp_path / "killed"
    start = time.perf_counter()
    train(scenes, tmp_path / "undisturbed", *overrides)
    seconds = time.perf_counter() - start
    context, rng, iterations = multiprocessing.get_context("fork"), random.Random(1), []
    last = killed / "last_checkpoint"
    for attempt in range(4):
        process = context.Process(target=train, args=(scenes, killed, *overrides), kwargs={"resume": True})
        process.start()
        time.sleep(rng.uniform(0.3, 0.8) * seconds)
        while attempt == 3 and process.is_alive() and not last.is_file():  # on a busy machine none got that far
            time.sleep(0.01)
        process.kill()
        process.join()
        iterations.append(saved(killed, last.read_text())["iteration"] if last.is_file() else -1)
    train(scenes, killed, *overrides, resume=True)
    assert max(iterations) > 0  # a run was resumed
    assert_same(saved(killed), saved(tmp_path / "undisturbed"))


def test_random_seed_is_kept_on_resume(scenes, tmp_path):
    overrides = ("SEED", -1, "SOLVER.CHECKPOINT_PERIOD", 5)
    first = train(scenes, tmp_path, *overrides, "SOLVER.MAX_ITER", 5)
    second = train(scenes, tmp_path, *overrides, "SOLVER.MAX_ITER", 10, resume=True)
    assert first.loop.seed == second.loop.seed and second.start_iter == 5


def test_truncated_checkpoint_never_becomes_last(scenes, tmp_path, monkeypatch):
    train(scenes, tmp_path, "SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3)
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    save = torch.save

    def cut(data, path, *rest):
        save(data, path, *rest)
        os.truncate(path, 1000)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(KeyboardInterrupt):
        train(scenes, tmp_path, "SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3, resume=True)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert not list(tmp_path.glob(".*.tmp")) and saved(tmp_path, "model_0000005.pth")["iteration"] == 5
    monkeypatch.undo()
    assert train(scenes, tmp_path, "SOLVER.MAX_ITER", 6, resume=True).start_iter == 3


def test_run_killed_before_model_final(scenes, tmp_path):
    """The last periodic checkpoint was written, model_final was not."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(scenes, whole, *EXACT, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2)
    shutil.copytree(whole, cut)
    (cut / "model_final.pth").unlink()
    (cut / "last_checkpoint").write_text("model_0000003.pth")
    train(scenes, cut, *EXACT, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, resume=True)
    assert_same(saved(cut), saved(whole))


def test_accumulated_batch_matches_batch(scenes, tmp_path):
    overrides = ("SOLVER.MAX_ITER", 8, "MODEL.REGIONSPOT.INTEGRATION.DROPOUT", 0.0)
    for parts in (1, 2):
        train(scenes, tmp_path / str(parts), *overrides, "SOLVER.ACCUMULATE", parts)
    one, two = saved(tmp_path / "1")["model"], saved(tmp_path / "2")["model"]
    for key in one:
        torch.testing.assert_close(one[key], two[key], atol=1e-4, rtol=0)  # a seventh of a step
    with pytest.raises(ValueError, match="IMS_PER_BATCH 4 must be a multiple of the 1 processes times .* 3"):
        train(scenes, tmp_path, "SOLVER.ACCUMULATE", 3)


def test_bfloat16_on_cpu_and_unsupported_precisions(scenes, tmp_path):
    losses = {}
    for enabled in (False, True):
        directory = tmp_path / str(enabled)
        train(scenes, directory, "SOLVER.MAX_ITER", 20, "SOLVER.AMP.ENABLED", enabled)
        losses[enabled] = [
            json.loads(line)["total_loss"] for line in (directory / "metrics.json").read_text().splitlines()
        ]
    assert losses[True] != losses[False]
    np.testing.assert_allclose(losses[True], losses[False], rtol=0.1)
    with pytest.raises(ValueError, match="fp16 needs CUDA; on a CPU set bf16"):
        train(scenes, tmp_path, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "fp16")
    with pytest.raises(ValueError, match="expected bf16 or fp16, got 'fp8'"):
        train(scenes, tmp_path, "SOLVER.AMP.DTYPE", "fp8")


def test_moving_average_is_saved_and_preferred(scenes, tmp_path):
    overrides = ("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5)
    train(scenes, tmp_path, *overrides, "SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 1)
    states = [saved(tmp_path, f"model_000000{k}.pth") for k in range(3)]
    weights = [state["model"]["model.projector.weight"] for state in states]
    averages = [state["ema"]["projector.weight"] for state in states]
    for k in (1, 2):
        torch.testing.assert_close(averages[k], averages[k - 1] / 2 + weights[k] / 2)
    model = tiny_model(names=None)
    checkpointer = RegionSpotCheckpointer.from_config(config(scenes, tmp_path), model)
    checkpointer.load(str(tmp_path / "model_final.pth"))
    assert torch.equal(model.recognizer.knowledge_integration.projector.weight, averages[2])
    resumed = train(scenes, tmp_path, *overrides, "SOLVER.MAX_ITER", 3, resume=True)
    module = resumed.recognizer.knowledge_integration
    assert torch.equal(module.projector.weight, weights[2])
    with resumed.average.applied():
        assert torch.equal(module.projector.weight, averages[2])
    assert torch.equal(module.projector.weight, weights[2])


def test_best_checkpoint_is_kept(scenes, tmp_path):
    overrides = ["DATASETS.TEST", ("test_trainer",), "TEST.EVAL_PERIOD", 10, "SOLVER.CHECKPOINT_PERIOD", 10]
    first = train(scenes, tmp_path, *overrides, "SOLVER.MAX_ITER", 20)
    best = saved(tmp_path, "model_best.pth")
    state = saved(tmp_path, "model_0000009.pth")["trainer"]["hooks"]["BestCheckpointer"]
    assert state["best_iter"] == 9 and best["iteration"] in (9, 20)
    assert set(best) == {"model", "frozen", "integration", "iteration"}  # only what recognition needs
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert {"bbox/AP", "images_per_second", "data_share", "lr", "total_loss"} <= set().union(*lines)
    assert list(tmp_path.glob("events.out.tfevents*"))
    second = train(scenes, tmp_path, *overrides, "SOLVER.MAX_ITER", 20, resume=True)
    hook = next(h for h in second._hooks if type(h).__name__ == "BestCheckpointer")
    assert hook.best_metric >= state["best_metric"] and first.max_iter == second.start_iter


@pytest.mark.parametrize(
    ("sets", "metric", "name"),
    [
        (("a",), "bbox/AP", "bbox/AP"),
        (("a", "b"), "bbox/AP", "a/bbox/AP"),
        (("a", "b"), "b/bbox/AP", "b/bbox/AP"),
        (("odinw_a", "odinw_b"), "odinw_average/bbox/AP", "odinw_average/bbox/AP"),
    ],
)
def test_best_metric_of_several_test_sets(sets, metric, name):
    assert best_metric(tiny_config("DATASETS.TEST", sets, "TEST.BEST_METRIC", metric)) == name


def test_nan_loss_names_the_images(scenes, tmp_path):
    cfg = config(scenes, tmp_path, "SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 12)
    trainer = RegionSpotTrainer(cfg)
    trainer.resume_or_load(resume=False)
    torch.nn.init.constant_(trainer.recognizer.knowledge_integration.projector.bias, float("nan"))
    with pytest.raises(FloatingPointError, match=r"not a number in iteration 0.*images of the batch: (\d+, ){11}\d+\."):
        trainer.train()
    assert not list(tmp_path.glob("*.pth"))


def test_stores_of_other_models_are_refused(scenes, tmp_path):
    for key, message in (("SAM", "another sam: expected no name"), ("CLIP", "another clip: expected no name")):
        with pytest.raises(ValueError, match=message.replace("no name", "weights without a name")):
            train(scenes, tmp_path, f"MODEL.REGIONSPOT.{key}.WEIGHTS", "", "SEED", 99)


VOCABULARIES = {
    "test_stage_a": ((3, 1, 10, 7), ["red square", "green disc", "blue square", "white disc"]),
    "test_stage_b": ((0, 1, 2, 3), ["crimson box", "lime coin", "navy box", "snow coin"]),
    "test_stage_c": ((900, 17, 40, 5), ["ruby", "emerald", "sapphire", "pearl"]),
}


@pytest.fixture
def three(tmp_path, scenes, register):
    """Three data sets with different scenes, names and ids, and their stores."""
    recognizer = tiny_model(names=None).recognizer
    recognizer.weight_sources.update(sam=str(scenes / "sam.pth"), clip_model=str(scenes / "clip.pth"))
    for index, (name, (ids, names)) in enumerate(VOCABULARIES.items()):
        path = write_dataset(tmp_path / name, 16, ids, names, first=100 * index)
        register(name, path, tmp_path / name / "images", "lvis")
        extraction = Extraction(feature_maps=True)
        extract_tokens(recognizer, name, tmp_path / f"{name}_store", extraction, show_progress=False)
    return tmp_path


def accuracy(trainer, name):
    """Return how many regions of a data set get their annotated class, with the data set's vocabulary."""
    recognizer, num_correct, num_regions = trainer.recognizer, 0, 0
    with recognizer.using_vocabulary(list(MetadataCatalog.get(name).thing_classes)):
        for batch in build_test_loader(trainer.cfg, name):
            for inputs in batch:
                instances = inputs["instances"]
                features = recognizer.encode_images([inputs["image"]])
                tokens = recognizer.position_tokens([inputs["image"]], [instances.gt_boxes])
                with torch.no_grad():
                    [logits] = recognizer.classify(tokens, features.feature_map)
                num_correct += int((logits.argmax(dim=1) == instances.gt_classes).sum())
                num_regions += len(instances)
    return num_correct / num_regions


def test_second_stage_improves_all_vocabularies(three, scenes):
    def stage(directory, names, *overrides):
        stores = tuple(str(three / f"{name}_store") for name in names)
        data = ["DATASETS.TRAIN", names, "DATASETS.TOKEN_STORES_TRAIN", stores, "SOLVER.BASE_LR", 1e-3]
        trainer = train(scenes, three / directory, *data, "SOLVER.IMS_PER_BATCH", 12, *overrides)
        trainer.model.eval()
        return trainer

    first = stage("one", ("test_stage_a",), "SOLVER.MAX_ITER", 20)
    before = {name: accuracy(first, name) for name in VOCABULARIES}
    weights = ["MODEL.WEIGHTS", str(three / "one" / "model_final.pth"), "DATASETS.TRAIN_RATIO", (1.0, 1.0, 1.0)]
    second = stage("two", tuple(VOCABULARIES), "SOLVER.MAX_ITER", 100, *weights)
    after = {name: accuracy(second, name) for name in VOCABULARIES}
    assert second.start_iter == 0
    for name in VOCABULARIES:
        assert after[name] > before[name] + 0.1, (before, after)


def test_average_enabled_later_starts_from_weights(scenes, tmp_path):
    train(scenes, tmp_path, "SOLVER.MAX_ITER", 5)
    weight = saved(tmp_path)["model"]["model.projector.weight"]
    overrides = ("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.999)
    second = train(scenes, tmp_path, *overrides, "SOLVER.MAX_ITER", 6, resume=True)
    torch.testing.assert_close(second.average.average.projector.weight, weight, atol=1e-4, rtol=0)


def test_nan_gradient_names_the_images(scenes, tmp_path):
    trainer = RegionSpotTrainer(config(scenes, tmp_path, "SOLVER.MAX_ITER", 3))
    trainer.resume_or_load(resume=False)
    weight = trainer.recognizer.knowledge_integration.projector.weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match="iteration 0: the gradient's norm is .*images of the batch"):
        trainer.train()
    assert weight.isfinite().all()


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["DATASETS.PROPOSAL_FILES_TEST", ("no.json",)], FileNotFoundError, "no.json: no such file"),
        (["DATASETS.PROPOSAL_FILES_TEST", ("a.json", "b.json")], ValueError, "one file for each of 1 test sets"),
        (["MODEL.REGIONSPOT.PROPOSALS.SOURCE", "file"], ValueError, "give DATASETS.PROPOSAL_FILES_TEST"),
        (["MODEL.REGIONSPOT.VOCABULARY", "a,b"], ValueError, "has 2 names, but test_trainer has 4"),
    ],
)
def test_evaluation_settings_are_checked_first(scenes, tmp_path, overrides, error, message):
    with pytest.raises(error, match=message):
        RegionSpotTrainer(config(scenes, tmp_path, "DATASETS.TEST", ("test_trainer",), *overrides))


def test_failed_training_is_not_evaluated(scenes, tmp_path, monkeypatch):
    cfg = config(scenes, tmp_path, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", ("test_trainer",))
    trainer = RegionSpotTrainer(cfg)
    trainer.resume_or_load(resume=False)
    torch.nn.init.constant_(trainer.recognizer.knowledge_integration.projector.bias, float("nan"))
    monkeypatch.setattr(RegionSpotTrainer, "test", lambda *_: pytest.fail("evaluated"))
    with pytest.raises(FloatingPointError):
        trainer.train()


def test_old_checkpoints_are_removed(scenes, tmp_path):
    (tmp_path / ".model_0000001.pth.0123.tmp").write_bytes(b"cut")
    train(scenes, tmp_path, "SOLVER.MAX_ITER", 9, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.CHECKPOINTS_KEPT", 2)
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert names == ["model_0000007.pth", "model_0000008.pth", "model_final.pth"]
    assert not list(tmp_path.glob(".*.tmp"))


def test_unreadable_images_are_replaced_and_listed(scenes, tmp_path, caplog, register):
    annotations = write_dataset(tmp_path / "data", 12)
    register("test_unreadable", annotations, tmp_path / "data" / "images", "lvis")
    data = ("DATASETS.TRAIN", ("test_unreadable",), "DATASETS.TOKEN_STORES_TRAIN", (), "SOLVER.MAX_ITER", 6)
    (tmp_path / "data" / "images" / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 12 images are unreadable"):
        train(scenes, tmp_path / "run", *data)
    skip = (*data, "DATALOADER.SKIP_UNREADABLE", True, "SOLVER.CHECKPOINT_PERIOD", 3)
    with caplog.at_level(logging.WARNING, "regionspot"):
        train(scenes, tmp_path / "run", *skip)
    [line] = (tmp_path / "run" / "unreadable_images.txt").read_text().splitlines()
    assert "3.png" in line and "1 images could not be read" in caplog.text
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000002.pth")
    whole = saved(tmp_path / "run")
    assert train(scenes, tmp_path / "run", *skip, resume=True).start_iter == 3
    assert_same(saved(tmp_path / "run"), whole)
    assert (tmp_path / "run" / "unreadable_images.txt").read_text().splitlines() == [line]
