"""projects/RegionSpotDense: RegionSpot behind RetinaNet and FCOS, by lazy configs, in one process and in two."""

import json
import logging
from functools import partial

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from filelock import FileLock

from regionspot import RegionSpot

from ..helpers import NAMES, as_inputs, frozen_overrides, load_program, write_dataset, write_frozen_parts
from ..modeling.test_meta_arch import assert_same
from ..processes import run_program
from .tiny_dense import PROJECT, tiny_dense_config

logging.getLogger("detectron2").setLevel(logging.ERROR)
CONFIGS = ("retinanet_R_50_FPN", "fcos_R_50_FPN")

training = load_program(PROJECT / "dense_training.py")
COMMAND = load_program(PROJECT / "train_net.py").COMMAND


def build(name, *overrides):
    """Return a detector whose boxes are near its anchors, as they are after training, and vary in score."""
    torch.manual_seed(0)
    model = instantiate(tiny_dense_config(name, *overrides).model).eval()
    with torch.no_grad():
        model.detector.head.bbox_pred.weight.mul_(1e-3)
        model.detector.head.cls_score.weight.mul_(0.1)
    model.set_vocabulary(NAMES)
    return model


def batch():
    """Images of different sizes; their outputs are larger, smaller, stretched, and of the same size."""
    sizes = [(96, 128), (30, 20), (50, 100), None]
    inputs = [as_inputs(i, size) for i, size in enumerate([(48, 64), (64, 40), (50, 50), (90, 130)])]
    for x, size in zip(inputs, sizes):
        for key in ("instances", "height", "width"):
            del x[key]
        x.update({"height": size[0], "width": size[1]} if size else {})
    return inputs


def proposals_of(model, inputs, detections):
    """Return a detector's boxes in the image's frame, each once, best first: a second implementation, box by box."""
    height, width = inputs["image"].shape[1:]
    boxes, scores = detections.pred_boxes.tensor, detections.scores
    x, y = width / inputs.get("width", width), height / inputs.get("height", height)
    boxes = boxes * torch.tensor([x, y, x, y])
    selected = []
    for index in scores.argsort(descending=True).tolist():
        selected_boxes = Boxes(boxes[selected])
        if not selected or pairwise_iou(Boxes(boxes[index : index + 1]), selected_boxes).max() <= model.box_nms_thresh:
            selected.append(index)
    selected = selected if model.top_k < 0 else selected[: model.top_k]
    return Instances((height, width), proposal_boxes=Boxes(boxes[selected]), scores=scores[selected])


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        (CONFIGS[0], []),
        (CONFIGS[0], ["model.masks=True", "model.input_format=RGB", "model.top_k=7", "model.box_nms_thresh=0.3"]),
        (CONFIGS[1], ["model.masks=True", "model.top_k=-1"]),
        (CONFIGS[1], ["model.box_nms_thresh=1"]),
    ],
)
def test_results_equal_regionspot_for_detector_boxes(name, overrides):
    model = build(name, *overrides)
    reference = RegionSpot(
        recognizer=model.recognizer, input_format=model.input_format, masks="bitmask" if model.masks else ""
    ).eval()
    with torch.no_grad():
        raw = [output["instances"] for output in model.detector(batch())]  # at output size
    for inputs, output, detections in zip(batch(), model(batch()), raw, strict=True):
        proposals = proposals_of(model, inputs, detections)
        expected = reference([{**inputs, "proposals": proposals}])[0]["instances"]
        named = output["instances"]
        assert set(output) == {"instances"} and len(named) > 5
        assert_same(named, expected)
        size = (inputs.get("height", inputs["image"].shape[1]), inputs.get("width", inputs["image"].shape[2]))
        assert named.image_size == size and named.has("pred_masks") == model.masks
        distances = (named.pred_boxes.tensor[:, None] - detections.pred_boxes.tensor).abs().amax(dim=2)
        assert distances.amin(dim=1).max() < 1e-3  # the frame is that of the detector's own output


def test_image_without_boxes():
    model = build(CONFIGS[0], "model.detector.test_score_thresh=1.0")
    assert [len(output["instances"]) for output in model(batch())] == [0] * 4


def train_a_little(model, cfg, inputs, steps=3):
    """Return the keys of the state dict that have changed, and the last losses."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cfg.optimizer.params.model = model
    cfg.optimizer.lr = 1e-3
    optimizer = instantiate(cfg.optimizer)
    model.train()
    with EventStorage():
        for _ in range(steps):
            losses = model(inputs)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    return {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}, losses


@pytest.mark.parametrize("name", CONFIGS)
def test_training_changes_only_attention_module(name):
    model, inputs = build(name), [as_inputs(0), as_inputs(1, (64, 40)), as_inputs(2, num_objects=0)]
    attention = {key for key in model.state_dict() if key.startswith("recognizer.knowledge_integration.")}
    assert {key for key, value in model.named_parameters() if value.requires_grad} == attention
    changed, losses = train_a_little(model, tiny_dense_config(name), inputs)
    assert changed == attention and len(attention) > 20 and set(losses) == {"loss_regionspot"}
    assert any("running_mean" in key for key in model.state_dict())  # BatchNorm's, which training would have changed


@pytest.mark.parametrize("name", CONFIGS)
def test_unfrozen_detector_has_its_own_losses(name):
    model, inputs = build(name, "model.freeze=False"), [as_inputs(0), as_inputs(1, (64, 40))]
    changed, losses = train_a_little(model, tiny_dense_config(name), inputs)
    assert "loss_regionspot" in losses and len(losses) >= 3
    for part in ("detector.head.bbox_pred.weight", "detector.backbone.bottom_up.res3.0.conv1.norm.running_mean"):
        assert part in changed
    frozen = ("recognizer.localizer.", "recognizer.vision_language.")
    assert "recognizer.knowledge_integration.projector.weight" in changed
    assert not [key for key in changed if key.startswith(frozen)]


def test_loss_equals_regionspot_for_annotated_boxes():
    model, inputs = build(CONFIGS[0]), [as_inputs(0), as_inputs(1, (64, 40)), as_inputs(2, num_objects=0)]
    reference = RegionSpot(recognizer=model.recognizer, input_format="BGR")
    for module in (model.train(), reference.train()):
        module.recognizer.knowledge_integration.eval()  # no dropout
    expected = reference(inputs)["loss_cls"]
    torch.testing.assert_close(model(inputs)["loss_regionspot"], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gt_classes": torch.tensor([4])}, ValueError, "image scene 0: class 4 is outside the vocabulary of 4 names"),
        ({"gt_classes": torch.tensor([-1])}, ValueError, "class -1 is outside the vocabulary"),
        ({"gt_boxes": Boxes(torch.tensor([[9.0, 9, 9, 20]]))}, ValueError, "boxes of image scene 0: .* has no area"),
        (None, KeyError, "image scene 0: training needs the key 'instances'"),
    ],
)
def test_invalid_annotations_are_refused(change, error, message):
    model, inputs = build(CONFIGS[0]).train(), as_inputs(0, num_objects=1)
    for key, value in (change or {}).items():
        inputs["instances"].set(key, value)
    if change is None:
        del inputs["instances"]
    with pytest.raises(error, match=message):
        model([inputs])


def test_invalid_models_are_refused():
    with pytest.raises(ValueError, match="input_format: expected RGB or BGR, got 'GRB'"):
        build(CONFIGS[0], "model.input_format=GRB")
    with pytest.raises(ValueError, match="no vocabulary is set"):
        instantiate(tiny_dense_config(CONFIGS[0]).model).train()([as_inputs(0)])


def test_roi_heads_from_arguments(tmp_path):
    """The zoo's Mask R-CNN with RegionSpotROIHeads, and the weights of one with heads of its own."""
    name = "mask_rcnn_R_50_FPN"
    cfg = tiny_dense_config(name, f"model.weights={tmp_path}/rcnn.pth")
    own = LazyConfig.load(str(PROJECT / "configs" / f"{name}.py")).model.detector.roi_heads
    assert own.num_classes == 80 and own.positive_fraction == 0.25 and own.masks
    other = instantiate(cfg.model.detector)
    state = {key: value for key, value in other.state_dict().items() if "recognizer" not in key}
    torch.save({"model": {**state, "roi_heads.box_predictor.cls_score.bias": torch.zeros(81)}}, tmp_path / "rcnn.pth")
    model = instantiate(cfg.model)
    model.roi_heads.set_vocabulary(NAMES)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items()) and len(state) > 50
    changed, losses = train_a_little(model, cfg, [as_inputs(0), as_inputs(1, (64, 40))])
    assert set(losses) == {"loss_regionspot"}
    assert changed == {key for key in model.state_dict() if "recognizer.knowledge_integration." in key}
    for inputs, output in zip(batch(), model.eval()(batch()), strict=True):
        size = (inputs.get("height", inputs["image"].shape[1]), inputs.get("width", inputs["image"].shape[2]))
        assert output["instances"].image_size == size and len(output["instances"]) == 20 * len(NAMES)
        assert output["instances"].pred_masks.shape[1:] == size


@pytest.mark.parametrize("name", CONFIGS)
def test_shipped_configs_with_overrides(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = LazyConfig.load(str(PROJECT / "configs" / f"{name}.py"))
    assert set(cfg) == {"model", "optimizer", "dataloader", "lr_multiplier", "train"}
    assert cfg.optimizer.lr == 2.5e-5 and cfg.model.freeze and not cfg.train.init_checkpoint
    assert ("retinanet" in name) == cfg.model.detector_weights.endswith("model_final_bfca0b.pkl")
    overrides = "[MODEL.REGIONSPOT.VOCABULARY,'a,b',TEST.DETECTIONS_PER_IMAGE,9]"
    LazyConfig.apply_overrides(cfg, [f"model.recognizer.cfg.overrides={overrides}"])
    regionspot = instantiate(cfg.model.recognizer.cfg)
    assert regionspot.MODEL.REGIONSPOT.SAM.NAME == "vit_b" and regionspot.MODEL.REGIONSPOT.VOCABULARY == "a,b"
    assert regionspot.TEST.DETECTIONS_PER_IMAGE == 9


def arguments(directory, *options):
    return COMMAND.parse_arguments(["--config-file", str(directory / "tiny.py"), *map(str, options)])


def metrics(output):
    return json.loads((output / "metrics.json").read_text().splitlines()[-1])


WHOLE = ["model.freeze=False", "model.detector_weights=''", "optimizer.lr=3e-3", "train.max_iter=30"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A user's files: a data set, frozen weights, a config that names them, and a detector trained with it."""
    directory = tmp_path_factory.mktemp("user")
    write_dataset(directory / "data").rename(directory / "my.json")
    (directory / "data" / "images").rename(directory / "my_images")
    model = build(CONFIGS[0])
    write_frozen_parts(model.recognizer, directory)
    frozen = ",".join(f"'{part}'" for part in frozen_overrides(directory))
    options = [
        *[f"model.recognizer.cfg.overrides=[{frozen}]", f"model.detector_weights={directory}/detector.pth"],
        *[f"dataloader.{part}.dataset.names='{directory}/my.json:{directory}/my_images'" for part in ("train", "test")],
        *["optimizer.lr=3e-4", "train.max_iter=4", "train.log_period=1", "train.eval_period=100"],
    ]
    (directory / "tiny.py").write_text(
        "from tests.projects.tiny_dense import tiny_dense_config\n"
        f"globals().update(tiny_dense_config({CONFIGS[0]!r}, *{options!r}).items())\n"
    )
    trained = training.main(arguments(directory, *WHOLE, f"train.output_dir={directory}/whole"))
    torch.save({"model": trained.detector.state_dict()}, directory / "detector.pth")
    return directory


def test_two_processes_train_and_one_resumes(directory, monkeypatch):
    forked = partial(torch.multiprocessing.start_processes, start_method="fork")  # saves the imports
    output = f"train.output_dir={directory}/two"
    with monkeypatch.context() as patch:
        patch.setattr(torch.multiprocessing, "start_processes", forked)
        training.launch(training.main, arguments(directory, "--num-gpus", 2, "--dist-url", "auto", output), "cpu")
    by_two = metrics(directory / "two")
    checkpoint = f"train.init_checkpoint={directory}/two/model_final.pth"
    by_one = training.main(arguments(directory, "--eval-only", checkpoint, f"train.output_dir={directory}/one"))["bbox"]
    random = training.main(arguments(directory, "--eval-only", f"train.output_dir={directory}/one"))["bbox"]
    assert by_one["AP"] > 5 and abs(by_one["AP"] - random["AP"]) > 0.1
    for metric in ("AP", "AP50", *(f"AP-{name}" for name in NAMES)):
        assert by_two[f"bbox/{metric}"] == pytest.approx(by_one[metric], abs=1e-6)
    saved = torch.load(directory / "two" / "model_final.pth", weights_only=True)
    assert {key.split(".")[0] for key in saved["model"]} == {"detector", "recognizer"}

    command = [PROJECT / "train_net.py", "--config-file", "tiny.py", "--resume", output, "train.max_iter=6"]
    log = run_program(directory, *command)
    assert "Starting training from iteration 4" in log and metrics(directory / "two")["iteration"] == 6


def test_directory_of_another_run_is_refused(directory, tmp_path):
    with FileLock(tmp_path / ".run.lock"), pytest.raises(ValueError, match="another run is at work"):
        training.main(arguments(directory, f"train.output_dir={tmp_path}"))
    assert [path.name for path in tmp_path.iterdir()] == [".run.lock"]


def test_names_from_data_set_or_config(directory):
    cfg = LazyConfig.load(str(directory / "tiny.py"))
    recognizer = instantiate(cfg.model.recognizer)
    assert training.class_names(recognizer, cfg.dataloader.test) == [NAMES[i] for i in (1, 0, 3, 2)]  # by category id
    cfg.model.recognizer.cfg.overrides.extend(["MODEL.REGIONSPOT.VOCABULARY", "a,b,c,d"])
    recognizer = instantiate(cfg.model.recognizer)
    assert training.class_names(recognizer, cfg.dataloader.test) == ["a", "b", "c", "d"]


def test_trained_detector_is_saved_and_resumed(directory):
    lines = [json.loads(line) for line in (directory / "whole" / "metrics.json").read_text().splitlines()]
    losses = ("loss_regionspot", "loss_cls", "loss_box_reg")
    assert all(lines[-2][loss] < 0.8 * lines[0][loss] for loss in losses)
    resumed = training.main(arguments(directory, "--resume", *WHOLE, f"train.output_dir={directory}/whole"))
    saved = torch.load(directory / "whole" / "model_final.pth", weights_only=True)["model"]
    detector = torch.load(directory / "detector.pth", weights_only=True)["model"]
    for key, value in resumed.state_dict().items():
        assert torch.equal(value, saved[key])
        assert not key.startswith("detector.") or torch.equal(value, detector[key.removeprefix("detector.")])


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["dataloader.train.dataset.names=coco_2017_trian"], KeyError, "do you mean coco_2017_train"),
        (["dataloader.test.dataset.names=no.json:images"], FileNotFoundError, "no.json: no such file"),
        (["model.recognizer.weights=no.pth"], FileNotFoundError, "no.pth.*no such file"),
        (["train.init_checkpoint=DETECTOR"], ValueError, "holds nothing of RegionSpot.*model.detector_weights"),
    ],
)
def test_mistakes_are_reported_before_training(directory, overrides, error, message):
    overrides = [x.replace("DETECTOR", f"{directory}/detector.pth") for x in overrides]
    with pytest.raises(error, match=message):
        training.main(arguments(directory, *overrides, f"train.output_dir={directory}/wrong"))
