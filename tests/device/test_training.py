"""Extraction, training and evaluation on a simulated accelerator, compared with the CPU."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from safetensors.torch import load_file

from regionspot.data import register_json_dataset
from regionspot.data.tokens import pack_images
from regionspot.engine import RegionSpotTrainer
from regionspot.engine.extract import Extraction, extract_tokens
from regionspot.engine.extraction import extract_features

from ..helpers import as_inputs, frozen_overrides, tiny_config, tiny_model, write_dataset, write_frozen_parts
from ..simulated_device import counted_waits, simulated_device

NAME = "test_device"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A directory with a registered data set, the frozen weights, and stores of both devices (maps-cpu, ...)."""
    directory = tmp_path_factory.mktemp("scenes")
    write_frozen_parts(tiny_model(names=None).recognizer, directory)
    register_json_dataset(NAME, write_dataset(directory / "data", 6), directory / "data" / "images", "lvis")
    for name in ("cpu", "meta"):
        with simulated_device():
            stages = ("prompt_encoder", "transformer", "mlp")
            extract(directory, directory / f"maps-{name}", name, stages=stages, flip=True, feature_maps=True)
            extract(directory, directory / f"tokens-{name}", name)
    yield directory
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def extract(scenes, output, name, **options):
    model = tiny_model("MODEL.DEVICE", name, names=None)
    sources = {"sam": str(scenes / "sam.pth"), "clip_model": str(scenes / "clip.pth")}
    model.recognizer.weight_sources.update(sources)
    extract_tokens(model.recognizer, NAME, output, Extraction(**options), show_progress=False)


def build_trainer(scenes, output, store, *overrides, resume=False):
    """Return a trainer of two steps, with SAM in the loop if there is no store."""
    data = ["DATASETS.TRAIN", (NAME,), "DATASETS.TEST", () if store else (NAME,), "OUTPUT_DIR", str(output)]
    data += ["DATASETS.TOKEN_STORES_TRAIN", (str(store),)] if store else []
    solver = ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 2, "SOLVER.WARMUP_ITERS", 0, "SOLVER.STEPS", ()]
    cfg = tiny_config(*frozen_overrides(scenes), *data, *solver, *overrides)
    output.mkdir(exist_ok=True)
    torch.manual_seed(0)
    trainer = RegionSpotTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


def train(*arguments, **options):
    """Train as ``build_trainer`` says, evaluate where SAM is in the loop, and return the trainer."""
    trainer = build_trainer(*arguments, **options)
    trainer.train()
    return trainer


WITH_ALL = ["SOLVER.EMA.ENABLED", True, "SOLVER.ACCUMULATE", 2, "MODEL.MASK_ON", True, "SOLVER.CHECKPOINT_PERIOD", 2]


@pytest.mark.parametrize("source", ["", "tokens", "maps"])
def test_training_equals_the_cpu(scenes, tmp_path, source):
    losses = []
    for name in ("cpu", "meta"):
        store = scenes / f"{source}-{name}" if source else None
        trainer = train(scenes, tmp_path / name, store, *WITH_ALL, "MODEL.DEVICE", name)
        losses.append([value for value, _ in trainer.storage.history("total_loss").values()])
        assert next(trainer.model.parameters()).device.type == name
    np.testing.assert_allclose(*losses, rtol=1e-3)
    state = [torch.load(tmp_path / name / "model_final.pth", weights_only=True) for name in ("cpu", "meta")]
    assert all(value.device.type == "cpu" for value in state[1]["model"].values())


def test_training_is_resumed_on_either_device(scenes, tmp_path):
    train(scenes, tmp_path / "out", scenes / "maps-cpu", *WITH_ALL, "MODEL.DEVICE", "meta")
    for iterations, name in ((4, "cpu"), (6, "meta")):
        more = ["SOLVER.MAX_ITER", iterations, "MODEL.DEVICE", name]
        trainer = train(scenes, tmp_path / "out", scenes / "maps-cpu", *WITH_ALL, *more, resume=True)
        assert trainer.start_iter == iterations - 2


def test_stores_equal_those_of_the_cpu(scenes):
    here, there = (
        [load_file(x) for x in sorted((scenes / f"maps-{n}").rglob("*.safetensors"))] for n in ("cpu", "meta")
    )
    assert len(here) == len(there) > 0
    for one, other in zip(here, there):
        assert one.keys() == other.keys() and any("flipped_tokens.mlp" in key for key in one)
        for key, value in one.items():
            torch.testing.assert_close(value, other[key], atol=2e-3, rtol=1e-3)  # float16


class _Waits(HookBase):
    """Collects what each step and its hooks wait for."""

    def __init__(self) -> None:
        self.steps: list[list[str]] = []

    def before_step(self) -> None:
        if len(self.steps) == 3:
            self.trainer.loop.checks_later = False
        self._counting = counted_waits()
        self.steps.append(self._counting.__enter__())

    def after_step(self) -> None:
        self._counting.__exit__(None, None, None)


@pytest.mark.parametrize("source", ["", "tokens", "maps"])
def test_steps_do_not_wait_for_the_device(scenes, tmp_path, source):
    """A GPU is never idle while a step is prepared, with SAM and CLIP in the loop or from stores."""
    store, overrides = scenes / f"{source}-meta" if source else None, ["DATASETS.TEST", (), "MODEL.DEVICE", "meta"]
    trainer, waits = build_trainer(scenes, tmp_path, store, *overrides, "SOLVER.MAX_ITER", 4), _Waits()
    trainer.register_hooks([waits])
    trainer.train()
    assert waits.steps[1] == waits.steps[2] == []
    assert waits.steps[3][0].startswith("aten::_local_scalar_dense in train_loop.py")  # looks at its loss at once


@pytest.mark.parametrize(
    ("spoiled", "message"), [("loss", "{'loss_cls': nan}"), ("gradient", "the gradient's norm is")]
)
@pytest.mark.parametrize(("period", "steps"), [(4, 3), (2, 2)])  # a checkpoint waits for the step that it has
def test_step_that_is_not_finite_is_skipped_and_reported(scenes, tmp_path, spoiled, message, period, steps):
    overrides = ["MODEL.DEVICE", "meta", "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", period]
    trainer = build_trainer(scenes, tmp_path, scenes / "maps-meta", *overrides)
    loss, weight = trainer.recognizer.loss, trainer.recognizer.knowledge_integration.projector.weight
    images = []  # of each step

    def factor(what):
        return float("nan") if trainer.iter == 1 and what == spoiled else 1.0

    def spoil_loss(*args):
        return loss(*args) * factor("loss")

    def keep_images(_, args):
        images.append(", ".join(str(inputs["image_id"]) for inputs in args[0]))

    trainer.recognizer.loss = spoil_loss
    weight.register_hook(lambda gradient: gradient * factor("gradient"))
    trainer.model.register_forward_pre_hook(keep_images)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert f"not a number in iteration 1: {message}" in str(error.value)
    assert f"images of the batch: {images[1]}. " in str(error.value)
    assert not list(tmp_path.glob("*.pth"))
    assert len(images) == steps  # the next one had been started
    assert all(x.isfinite().all() for x in trainer.recognizer.knowledge_integration.parameters())
    assert int(next(iter(trainer.optimizer.state.values()))["step"]) == steps - 1


def test_extraction_does_not_wait_for_the_device():
    recognizer = tiny_model("MODEL.DEVICE", "meta", names=None).recognizer
    batch = [{**as_inputs(seed), "image_id": seed, "image_file": [0, 0, 0]} for seed in range(3)]
    extraction = Extraction(flip=True, feature_maps=True, jitter=0.1, jitter_copies=2)
    for _ in range(2):  # the first fills caches
        with counted_waits() as waits:
            entries = extract_features(recognizer, batch, extraction)
    assert waits == []
    with counted_waits() as waits:
        pack_images(entries)
    assert waits  # the values themselves
