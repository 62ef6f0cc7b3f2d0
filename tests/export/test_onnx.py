"""An ONNX export gives what the predictor gives, without PyTorch."""

import json
import logging
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from regionspot import RegionSpotPredictor
from regionspot.export import OnnxRegionPredictor, check_export, export_recognizer
from regionspot.export.onnx_export import save_onnx
from regionspot.export.torch_export import trace
from regionspot.structures import Prompts

from ..helpers import NAMES, ROOT, as_inputs, draw_scene, run, spread_tokens, tiny_config, tiny_model

BACKGROUND = ["sky", "wall"]
# Runs the copied file in an interpreter in which neither PyTorch nor this project can be imported.
WITHOUT_TORCH = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "regionspot", "detectron2", "segment_anything", "clip"):
            raise ImportError(f"{name} is not here")

sys.meta_path.insert(0, Refuse())
from onnx_predictor import OnnxRegionPredictor

predictor = OnnxRegionPredictor()
predictor.set_image(sys.argv[1])
result = predictor.predict(boxes=json.loads(sys.argv[2]))
print(json.dumps([result.class_names, result.scores.tolist(), result.masks.sum(axis=(1, 2)).tolist()]))
"""


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.getLogger("onnxscript").setLevel(logging.ERROR)


# One layer of the attention module: test_modules.py traces several.
SETTINGS = {"UNKNOWN.BACKGROUND": tuple(BACKGROUND), "INTEGRATION.DEPTH": 1}
OVERRIDES = [part for key, value in SETTINGS.items() for part in (f"MODEL.REGIONSPOT.{key}", value)]


@pytest.fixture(scope="module")
def original():
    cfg = tiny_config(*OVERRIDES)
    predictor = RegionSpotPredictor(cfg)
    predictor.set_vocabulary(NAMES)
    spread_tokens(predictor.recognizer, as_inputs(0))
    return predictor


@pytest.fixture(scope="module")
def exported(original, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "model"
    cfg = tiny_config(*OVERRIDES)

    def check(written):
        return check_export(original.recognizer, written, "onnx", "float32")

    export_recognizer(original.recognizer, cfg, directory, check=check)
    return directory


@pytest.fixture
def predictor(exported):
    return OnnxRegionPredictor(exported)


def assert_same(actual, expected):
    assert actual.class_names == expected.class_names and actual.vocabulary == expected.vocabulary
    assert actual.image_size == expected.image_size and np.array_equal(actual.unknown, expected.unknown)
    for field in ("boxes", "scores", "top_scores", "logits", "embeddings", "predicted_ious"):
        value, reference = getattr(actual, field), getattr(expected, field)
        assert value.shape == reference.shape and value.dtype == reference.dtype, field
        assert np.allclose(value, reference, atol=1e-3), field
    assert np.array_equal(actual.top_classes, expected.top_classes)
    assert actual.masks.shape == expected.masks.shape
    assert (actual.masks != expected.masks).sum() <= 1e-3 * expected.masks.size


@pytest.mark.parametrize("size", [(48, 64), (97, 61), (40, 200)], ids=str)
def test_boxes_match_the_predictor(original, predictor, size):
    image, boxes, _ = draw_scene(3, size)
    boxes[0] += [-9, -9, 0, 0]  # partly outside
    results = []
    for each in (original, predictor):
        each.set_image(image)
        results.append(each.predict(boxes=boxes, top_k=3))
    assert_same(results[1], results[0])


def test_regions_differ_and_some_are_unknown(original, predictor):
    """What ``assert_same`` compares is not all the same."""
    image, boxes, _ = draw_scene(0)
    predictor.set_image(image)
    result = predictor.predict(boxes=boxes)
    assert len(set(result.class_names)) > 1 and np.ptp(result.scores) > 0.01
    predictor.description["unknown_threshold"] = float(np.median(result.scores)) + 1e-6
    names = predictor.predict(boxes=boxes).class_names
    assert "unknown" in names and set(names) > {"unknown"}


def test_points_match_the_predictor(original, predictor):
    image, boxes, _ = draw_scene(0)
    points = np.stack([boxes[:, :2] + 2, boxes[:, 2:] - 2], axis=1)
    labels = np.ones(points.shape[:2], int)
    labels[0, 1], labels[1, 1] = -1, 0
    for prompts in (
        {"points": points},
        {"points": points, "point_labels": labels},
        {"points": points, "point_labels": labels, "boxes": boxes},
    ):
        results = []
        for each in (original, predictor):
            each.set_image(image)
            results.append(each.predict(**prompts))
        assert_same(results[1], results[0])


def test_no_boxes(original, predictor):
    results = []
    for each in (original, predictor):
        each.set_image(draw_scene(0)[0])
        results.append(each.predict(boxes=[]))
    assert_same(results[1], results[0])
    assert len(results[1]) == 0


@pytest.mark.parametrize("orientation", [1, 6])
def test_image_files_match_the_predictor(original, predictor, tmp_path, orientation):
    image, boxes, _ = draw_scene(1, (60, 60))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image[:, :50]).convert("L").save(tmp_path / "image.png", exif=exif)
    boxes = np.array([[5, 5, 30, 40], [10, 20, 45, 49]])
    results = []
    for each in (original, predictor):
        each.set_image(tmp_path / "image.png")
        results.append(each.predict(boxes=boxes))
    assert_same(results[1], results[0])


def test_copied_file_needs_no_torch(original, exported, tmp_path):
    image, boxes, _ = draw_scene(2, (80, 120))
    Image.fromarray(image).save(tmp_path / "image.png")
    (exported / "without_torch.py").write_text(WITHOUT_TORCH)
    printed = run(tmp_path, sys.executable, exported / "without_torch.py", "image.png", json.dumps(boxes.tolist()))
    names, scores, areas = json.loads(printed.splitlines()[-1])
    original.set_image(image)
    expected = original.predict(boxes=boxes)
    assert names == expected.class_names and np.allclose(scores, expected.scores, atol=1e-3)
    assert np.allclose(areas, expected.masks.sum(axis=(1, 2)), atol=image[..., 0].size * 1e-3)


def test_vocabularies(original, predictor):
    image, boxes, _ = draw_scene(0)
    features, own = predictor.encode(image), original.encode(image)
    subset = [NAMES[2], NAMES[0]]
    result = predictor.predict(boxes=boxes, vocabulary=subset, features=features)
    assert_same(result, original.predict(boxes=boxes, vocabulary=subset, features=own))
    assert predictor.vocabulary == NAMES  # of this call only
    with pytest.raises(ValueError, match=r"no text embedding of dog .* --vocabulary"):
        predictor.predict(boxes=boxes, vocabulary="dog,red square", features=features)
    names, embeddings = original.recognizer.encode_vocabulary(["dog", "tea cup", "car"])
    predictor.set_vocabulary(names, embeddings.numpy())
    result = predictor.predict(boxes=boxes, features=features)
    assert_same(result, original.predict(boxes=boxes, vocabulary=names, features=own))
    predictor.set_image(image)
    predictor.predict(boxes=boxes, vocabulary=subset)
    assert predictor.vocabulary == subset  # from now on


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "no prompts"),
        ({"boxes": [[5, 5, 5, 9]]}, "number 0"),
        ({"boxes": [[0, 0, 9, 9], [70, 0, 80, 9]]}, "number 1"),
        ({"boxes": [[0, 0, float("nan"), 9]]}, "number 0"),
        ({"boxes": [1, 2, 3, 4]}, "shape"),
        ({"points": [[[64, 5]]]}, "outside"),
        ({"points": [[[5, 5]]], "point_labels": [[-1]]}, "point_labels"),
        ({"points": [[[5, 5]]], "boxes": [[0, 0, 9, 9]] * 2}, "as many"),
        ({"boxes": [[0, 0, 9, 9]], "top_k": 0}, "top_k"),
    ],
)
def test_invalid_prompts_are_refused(predictor, prompts, message):
    with pytest.raises(RuntimeError, match="set_image"):
        predictor.predict(boxes=[[0, 0, 9, 9]])
    predictor.set_image(draw_scene(0)[0])  # 48 x 64
    with pytest.raises(ValueError, match=message):
        predictor.predict(**prompts)


def test_description(original, exported):
    description = json.loads((exported / "model.json").read_text())
    assert description["names"] == NAMES and description["background"] == BACKGROUND
    assert description["check"]["num_boxes"] == [1, 7, 100] and description["check"]["num_names"] == [4, 5]
    assert max(x["relative"] for x in description["check"]["differences"].values()) < 1e-3
    stored = np.load(exported / "text_embeddings.npy", allow_pickle=False)
    assert np.allclose(stored, original.recognizer.encode_vocabulary(NAMES + BACKGROUND)[1], atol=1e-6)
    for name, entry in description["models"].items():
        model = onnx.load(exported / entry["file"])
        onnx.checker.check_model(model, full_check=True)
        assert [opset.version for opset in model.opset_import if not opset.domain] == [description["opset"]]
        for value in model.graph.input:
            shape = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            assert shape == entry["inputs"][value.name], (name, value.name)
        assert [value.name for value in model.graph.output] == entry["outputs"]
    for path in exported.iterdir():  # no paths of the machine that wrote it
        assert str(ROOT).encode() not in path.read_bytes(), path.name


def test_examples_score_as_in_the_predictor(original, exported, tmp_path):
    image, boxes, _ = draw_scene(1)
    Image.fromarray(image).save(tmp_path / "image.png")
    entry = {"name": "mine", "examples": [{"image": str(tmp_path / "image.png"), "box": boxes[0].tolist()}]}
    with original.recognizer.using_vocabulary(["cup", entry]):
        assert (original.recognizer.classifier.embeddings[1].norm() - 1).abs() > 0.1  # its length counts
        check_export(original.recognizer, exported, "onnx", "float32", num_boxes=(3,))


def test_check_refuses_another_model(original, exported):
    other = tiny_model(*OVERRIDES)
    other.load_state_dict(original.model.state_dict())
    check_export(other.recognizer, exported, "onnx", "float32", num_boxes=(1,))
    with torch.no_grad():
        other.recognizer.knowledge_integration.projector.bias += 0.1
    with pytest.raises(ValueError, match="differs from PyTorch's"):
        check_export(other.recognizer, exported, "onnx", "float32", num_boxes=(1,))


def test_fp16_stays_near_float32(original, tmp_path):
    traced = trace(original.recognizer, "fp16", ["region_classifier"])["region_classifier"]
    save_onnx(traced, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    features = original.encode(draw_scene(0)[0])
    prompts = Prompts(boxes=torch.tensor([[9.0, 9, 40, 40], [0, 0, 20, 30]]))
    [output] = original.recognizer.locate(features, [prompts])
    embeddings = original.recognizer.classifier.embeddings
    inputs = {"tokens": output.tokens, "text_embeddings": embeddings, "feature_map": features.feature_map}
    logits, _ = session.run(None, {key: value.numpy() for key, value in inputs.items()})
    [expected] = original.recognizer.classify([output.tokens], features.feature_map)
    assert 0 < np.abs(logits - expected.detach().numpy()).max() < 0.1  # not as in float32
    num_weights = sum(x.numel() for x in original.recognizer.knowledge_integration.parameters())
    assert 2 * num_weights < (tmp_path / "model.onnx").stat().st_size < 3 * num_weights
