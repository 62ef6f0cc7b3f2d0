"""The parts in export form give what the recognizer gives, in all variants; they trace for all numbers of regions."""

import zipfile

import pytest
import torch

from regionspot.export import check_export, check_options, export_recognizer
from regionspot.export import modules as export_modules
from regionspot.export.modules import ImageEncoders, RegionClassifier, RegionDecoder
from regionspot.export.torch_export import trace
from regionspot.structures import Prompts

from ..helpers import ROOT, as_inputs, draw_scene, tiny_config, tiny_model

VARIANTS = {
    "plain": (),
    "multimask mlp": ("MODEL.REGIONSPOT.SAM.MULTIMASK", True, "MODEL.REGIONSPOT.TOKEN_STAGE", "mlp"),
    "multimask": ("MODEL.REGIONSPOT.SAM.MULTIMASK", True),
    "prompt_encoder": ("MODEL.REGIONSPOT.TOKEN_STAGE", "prompt_encoder"),
    "mlp": ("MODEL.REGIONSPOT.TOKEN_STAGE", "mlp"),
    "no features": ("MODEL.REGIONSPOT.CLIP.FEATURES", "none"),
    "no class token": ("MODEL.REGIONSPOT.CLIP.FEATURES", "feature_map"),
    "regions alone": ("MODEL.REGIONSPOT.INTEGRATION.REGION_ATTENTION", False),
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_variants_equal_the_recognizer(overrides):
    recognizer = tiny_model(*overrides).recognizer
    decoder, classifier = (kind(recognizer, torch.float32) for kind in (RegionDecoder, RegionClassifier))
    features = recognizer.encode_images([as_inputs(0, (64, 48))["image"]])
    boxes = torch.tensor([[3.0, 4, 30, 40], [1, 1, 20, 20], [10, 10, 47, 45]])
    points = torch.tensor([[[5.0, 5], [9, 9]], [[3, 30], [0, 0]], [[20, 20], [30, 30]]])
    labels = torch.tensor([[1, 0], [1, -1], [1, 1]])
    padding, corners = torch.zeros(3, 1, 2), torch.tensor([[2, 3]] * 3)
    for prompts, coords, codes in (
        (Prompts(boxes=boxes), boxes.view(3, 2, 2), corners),
        (
            Prompts(points=points, point_labels=labels),
            torch.cat([points, padding], dim=1),
            torch.cat([labels, torch.full((3, 1), -1)], dim=1),
        ),
        (
            Prompts(boxes=boxes, points=points, point_labels=labels),
            torch.cat([points, boxes.view(3, 2, 2)], dim=1),
            torch.cat([labels, corners], dim=1),
        ),
    ):
        [expected] = recognizer.localizer(features.embeddings, [prompts], with_masks=True, with_iou=True)
        tokens, ious, masks = decoder(features.embeddings, coords, codes)
        torch.testing.assert_close(tokens, expected.tokens)
        torch.testing.assert_close(ious, expected.iou)
        torch.testing.assert_close(masks, expected.masks)
        [logits] = recognizer.classify([expected.tokens], features.feature_map)
        actual, semantic = classifier(tokens, recognizer.classifier.embeddings, features.feature_map)
        torch.testing.assert_close(actual, logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(semantic.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("max_matrix", [1 << 20, 1], ids=["heads together", "head by head"])
@pytest.mark.parametrize("features", ["none", "feature_map", "feature_map+class_token"])
@torch.no_grad()
def test_image_encoders_equal_the_recognizer(monkeypatch, max_matrix, features):
    monkeypatch.setattr(export_modules, "MAX_MATRIX", max_matrix)
    recognizer = tiny_model("MODEL.REGIONSPOT.CLIP.FEATURES", features).recognizer
    image = torch.from_numpy(draw_scene(0, (64, 64))[0]).permute(2, 0, 1)
    # SAM's input size, so that nothing is resized or padded
    sam_image = recognizer.localizer.sam.preprocess(image.float())[None]
    inputs = [sam_image] if features == "none" else [sam_image, recognizer.vision_language.preprocess(image)[None]]
    actual = ImageEncoders(recognizer, torch.float32)(*inputs)
    expected = recognizer.encode_images([image])
    torch.testing.assert_close(actual[0], expected.embeddings, atol=1e-4, rtol=1e-4)
    if features != "none":
        torch.testing.assert_close(actual[1], expected.feature_map, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_torch_programs_of_a_variant(tmp_path):
    overrides = [part for name in ("multimask mlp", "no features", "regions alone") for part in VARIANTS[name]]
    overrides += ["MODEL.REGIONSPOT.INTEGRATION.DEPTH", 2]
    recognizer, cfg = tiny_model(*overrides).recognizer, tiny_config(*overrides)
    programs = trace(recognizer)

    def check(written):
        return check_export(recognizer, written, "torch", "float32")

    description = export_recognizer(recognizer, cfg, tmp_path / "model", "torch", check=check, programs=programs)
    assert max(x["relative"] for x in description["check"]["differences"].values()) < 1e-3
    assert description["clip"] is None and description["config"]["multimask"]

    for path in (tmp_path / "model").glob("*.pt2"):  # no paths of the machine that wrote it
        with zipfile.ZipFile(path) as archive:
            assert all(str(ROOT).encode() not in archive.read(name) for name in archive.namelist())

    def refuse(written):
        assert (written / "region_decoder.pt2").is_file()
        raise ValueError("differs")

    with pytest.raises(ValueError, match="differs"):
        export_recognizer(recognizer, cfg, tmp_path / "other", "torch", check=refuse, programs=programs)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # whole or not at all


@torch.no_grad()
def test_fp16_modules_keep_the_recognizer(monkeypatch):
    recognizer = tiny_model().recognizer
    before = {key: value.dtype for key, value in recognizer.state_dict().items()}
    decoder = RegionDecoder(recognizer, torch.float16)
    assert decoder.decoder.mask_tokens.weight.dtype == torch.float16
    assert decoder.point_encoding.positional_encoding_gaussian_matrix.dtype == torch.float32  # of coordinates
    assert before == {key: value.dtype for key, value in recognizer.state_dict().items()}
    features = recognizer.encode_images([as_inputs(0)["image"]], with_feature_map=False)
    boxes = torch.tensor([[3.0, 4, 30, 40], [1, 1, 20, 20]])
    [expected] = recognizer.localizer(features.embeddings, [Prompts(boxes=boxes)], with_masks=True)
    outputs = decoder(features.embeddings, boxes.view(2, 2, 2), torch.tensor([[2, 3]] * 2))
    assert all(output.dtype == torch.float32 for output in outputs)
    difference = (outputs[0] - expected.tokens).abs().max()
    assert 0 < difference < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("onnx", "float32", 17), "--opset: expected 18 to 23, got 17"),
        (("tflite", "float32", 20), "--format"),
        (("onnx", "int8", 20), "--precision"),
    ],
)
def test_wrong_options_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        check_options(tmp_path / "model", *arguments)


def test_existing_directory_is_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export_recognizer(tiny_model().recognizer, tiny_config(), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_other_precisions_are_refused(tmp_path):
    recognizer = tiny_model("MODEL.REGIONSPOT.PRECISION", "bf16").recognizer
    with pytest.raises(ValueError, match="PRECISION float32"):
        export_recognizer(recognizer, tiny_config(), tmp_path / "model")
