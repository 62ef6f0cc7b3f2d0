"""What training logs about names of regions, against independent computations of the same numbers."""

import json

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from regionspot.data.build import build_test_loader
from regionspot.engine import RegionSpotTrainer, region_logs
from regionspot.engine.region_logs import RegionAccuracy, validate_regions
from regionspot.modeling import RegionRecognizer
from regionspot.modeling.losses import region_focal_loss

from ..helpers import tiny_model
from .test_trainer import config, scenes  # noqa: F401

STEADY = ("SOLVER.BASE_LR", 0.0, "MODEL.REGIONSPOT.INTEGRATION.DROPOUT", 0.0)  # weights do not change


def train(scenes, output, *overrides):  # noqa: F811
    output.mkdir(exist_ok=True)
    trainer = RegionSpotTrainer(config(scenes, output, *overrides))
    trainer.resume_or_load(resume=False)
    return trainer


def logged(output):
    """Return the last value of each key of the log."""
    values = {}
    for line in (output / "metrics.json").read_text().splitlines():
        values |= json.loads(line)
    return values


@torch.no_grad()
def test_top1_of_the_batches_of_a_step(scenes, tmp_path, monkeypatch):  # noqa: F811
    trainer = train(scenes, tmp_path, *STEADY, "SOLVER.MAX_ITER", 20, "SOLVER.ACCUMULATE", 2)
    batches, calls, score = [], [], RegionRecognizer.score
    trainer.model.register_forward_pre_hook(lambda _, args: batches.append(args[0]))

    def count(recognizer, *args, **options):
        calls.append(len(batches))
        return score(recognizer, *args, **options)

    monkeypatch.setattr(RegionRecognizer, "score", count)
    with torch.enable_grad():
        trainer.train()
    assert len(batches) == 40 and all(len(batch) == 2 for batch in batches)
    assert len(calls) == 40 + 4  # the images of the last step are scored once more, those of others are not
    correct = []
    for inputs in (*batches[38], *batches[39]):
        recognizer = trainer.recognizer
        [logits] = recognizer.classify([inputs["tokens"]], inputs["feature_map"][None].float(), [inputs["vocabulary"]])
        correct += (logits.argmax(dim=1) == inputs["instances"].gt_classes).tolist()
    assert logged(tmp_path)["region_top1"] == pytest.approx(100 * np.mean(correct))
    assert 0 < np.mean(correct) < 1
    for module in trainer.model.modules():
        assert not module._forward_hooks and len(module._forward_pre_hooks) <= 1  # this test's own


def test_nested_calls_count_once(scenes, tmp_path, monkeypatch):  # noqa: F811
    """A batch with many regions is decoded image by image, by calls within the call."""
    trainer = train(scenes, tmp_path / "a", *STEADY, "SOLVER.MAX_ITER", 20)
    trainer.train()
    monkeypatch.setattr("regionspot.modeling.knowledge_integration.MAX_QUERIES", 1)
    nested = train(scenes, tmp_path / "b", *STEADY, "SOLVER.MAX_ITER", 20)
    nested.train()
    assert logged(tmp_path / "a")["region_top1"] == logged(tmp_path / "b")["region_top1"]


def test_steps_without_a_log_are_not_looked_at(scenes, tmp_path):  # noqa: F811
    trainer = train(scenes, tmp_path, *STEADY, "SOLVER.MAX_ITER", 3)
    [hook] = [hook for hook in trainer._hooks if isinstance(hook, RegionAccuracy)]
    assert hook.period == 20
    trainer.train()
    assert "region_top1" not in logged(tmp_path)


@pytest.fixture(scope="module")
def validated(scenes, tmp_path_factory):  # noqa: F811
    """A run that ends with a validation on all 12 images, and its directory."""
    output = tmp_path_factory.mktemp("validated")
    trainer = train(scenes, output, *STEADY, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", ("test_trainer",))
    trainer.train()
    return trainer, output


@torch.no_grad()
def test_validation_matches_loss_and_evaluation(validated):
    trainer, output = validated
    values, losses = logged(output), []
    assert values["validation/top1"] == pytest.approx(values["region/top1"])
    recognizer = trainer.recognizer.eval()
    for batch in build_test_loader(trainer.cfg, "test_trainer"):
        for inputs in batch:
            instances = inputs["instances"]
            keys = ["test_trainer"]  # the vocabulary of training, with the same names
            loss = recognizer.loss([inputs["image"]], [instances.gt_boxes], [instances.gt_classes], keys)
            losses.append(float(loss))
    assert len(losses) == 12
    assert values["validation/loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_drawings_are_in_tensorboard(validated):
    _, output = validated
    [path] = output.glob("events.out.tfevents*")
    events = EventAccumulator(str(path))
    events.Reload()
    tags = [tag for tag in events.Tags()["images"] if tag.startswith("validation/")]
    assert tags == [f"validation/{image_id}" for image_id in (1, 2, 3, 4)]
    assert all((events.Images(tag)[0].width, events.Images(tag)[0].height) == (2 * 64, 48) for tag in tags)
    assert {"validation/loss", "validation/top1", "total_loss"} <= set(events.Tags()["scalars"])


def test_validation_is_of_images_all_over_the_set(scenes, validated, monkeypatch):  # noqa: F811
    trainer, _ = validated
    seen, original = [], region_logs._validate_image

    def record(cfg, model, inputs, drawings):
        seen.append(inputs["image_id"])
        return original(cfg, model, inputs, drawings)

    monkeypatch.setattr(region_logs, "_validate_image", record)
    validation = validate_regions(trainer.cfg, trainer.model, "test_trainer", 3)
    assert len(seen) == 3 and seen[0] == 1 and seen[-1] == 12 and 6 <= seen[1] <= 7
    assert 0 <= validation.top1 <= 100 and np.isfinite(validation.loss) and len(validation.drawings) == 3


def test_validation_leaves_the_model_as_it_was(validated):
    trainer, _ = validated
    recognizer = tiny_model(names=["a", "b"]).recognizer
    trainer.model.train()
    before = trainer.recognizer.classifier.active
    validate_regions(trainer.cfg, trainer.model, "test_trainer", 2)
    assert trainer.model.training and trainer.recognizer.classifier.active == before
    assert recognizer.vocabulary == ["a", "b"]


def test_no_validation_if_not_asked_for(scenes, tmp_path):  # noqa: F811
    overrides = ("SOLVER.MAX_ITER", 1, "DATASETS.TEST", ("test_trainer",), "TEST.VALIDATION_IMAGES", 0)
    train(scenes, tmp_path, *STEADY, *overrides).train()
    values = logged(tmp_path)
    assert "region/top1" in values and not any(key.startswith("validation") for key in values)


def test_loss_is_a_mean_over_images():
    """What the validation adds up, image by image, is the loss of the batch."""
    torch.manual_seed(0)
    logits, targets = [torch.randn(n, 5) for n in (2, 7)], [torch.randint(5, (n,)) for n in (2, 7)]
    one_by_one = [region_focal_loss([x], [t]) for x, t in zip(logits, targets)]
    torch.testing.assert_close(region_focal_loss(logits, targets), torch.stack(one_by_one).mean())
