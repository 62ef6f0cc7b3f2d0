"""The localizers by ``transformers`` against the library's own forward pass, and against official packages."""

import copy
import importlib
import json

import pytest
import torch
import transformers

from regionspot.checkpoint.fetch import KNOWN_WEIGHTS
from regionspot.checkpoint.loading import load_weights
from regionspot.export.modules import parts_of
from regionspot.modeling.localizers import (
    EdgeTamLocalizer,
    Sam2Localizer,
    Sam3TrackerLocalizer,
    SamHqLocalizer,
    build_localizer,
)
from regionspot.modeling.localizers.transformers_decoder import pack_features, unpack_features
from regionspot.structures import ImageFeatures, Prompts

from ...helpers import as_inputs, deterministic_array, tiny_config, tiny_model
from .test_members import BOXES, MEMBERS, PROMPTS, SPOT, TINY, build, set_weights

FAMILIES = {name: overrides for name, overrides in MEMBERS if name not in ("sam", "mobile_sam")}
LIBRARY = {
    "sam2": ("Sam2Model", "Sam2Config", "Sam2ImageProcessor"),
    "sam_hq": ("SamHQModel", "SamHQConfig", "SamImageProcessor"),
    "edgetam": ("EdgeTamModel", "EdgeTamConfig", "Sam2ImageProcessor"),
    "sam3_tracker": ("Sam3TrackerModel", "Sam3TrackerConfig", "Sam3ImageProcessor"),
}
OFFICIAL = json.loads((TINY / "official.json").read_text())
# of the image path alone, in the packages of their authors
OFFICIAL_PARAMETERS = {"tiny": 31440721, "small": 38538577, "base_plus": 73328401, "large": 216924865}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def library_model(family, localizer, **decoder_options):
    """Return the library's own model, built from the same file without our code, with the localizer's weights."""
    content = json.loads((TINY / f"{family}.json").read_text())
    content = content.get("tracker_config", content)
    content["mask_decoder_config"].update(decoder_options)
    model = getattr(transformers, LIBRARY[family][0])(getattr(transformers, LIBRARY[family][1])(**content)).eval()
    model.load_state_dict(localizer.sam.state_dict())
    return model


def processor(family, side):
    square = {"height": side, "width": side}
    size = {"size": {"longest_edge": side}, "pad_size": square} if family == "sam_hq" else {"size": square}
    return getattr(transformers, LIBRARY[family][2])(**size)


def image_of(localizer):
    """An image that fills the localizer's input, which then is not resized."""
    return as_inputs(0, (localizer.image_size, localizer.image_size))["image"]


def run_library(model, pixels, prompts, multimask):
    """Return the library's output for N prompts of one image, and the tokens behind its two-way transformer.

    Masks are made of the image behind the transformer, as in SAM, SAM 2 and the authors' SAM-HQ. The library's SAM-HQ
    takes the one before it, with rows and columns exchanged.
    """
    hidden, images = [], []

    def keep(module, inputs, outputs):
        hidden.append(outputs[0])
        images.append(outputs[1].flatten(0, 1).transpose(1, 2))  # (N, C, h * w)

    def replace_image(module, inputs):
        return images[0].reshape(inputs[0].shape)

    handles = [model.mask_decoder.transformer.register_forward_hook(keep)]
    handles.append(model.mask_decoder.upscale_conv1.register_forward_pre_hook(replace_image))
    points, labels, boxes = (
        None if x is None else x[None] for x in (prompts.points, prompts.point_labels, prompts.boxes)
    )
    masks = prompts.masks
    if masks is not None:  # the library has one mask an image
        pixels = pixels.expand(len(masks), -1, -1, -1)
        boxes = None if boxes is None else boxes[0][:, None]
    with torch.no_grad():
        output = model(
            pixel_values=pixels,
            input_points=points,
            input_labels=labels,
            input_boxes=boxes,
            input_masks=masks,
            multimask_output=multimask,
        )
    for handle in handles:
        handle.remove()
    flatten = (output.iou_scores, output.pred_masks, hidden[0])
    return [x.flatten(0, 1) for x in flatten]


def mask_tokens(model, hidden):
    first = 2 if hasattr(model.mask_decoder, "obj_score_token") else 1
    return hidden[:, first:]


KINDS = [*PROMPTS, "masks", "boxes and masks"]


@pytest.mark.parametrize("multimask", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_library(family, kind, multimask):
    localizer = build(FAMILIES[family], SPOT + "SAM.MULTIMASK", multimask, SPOT + "SAM.PROMPT_CHUNK", 2)
    model = library_model(
        family, localizer, **({} if family == "sam_hq" else {"dynamic_multimask_via_stability": False})
    )
    image, side = image_of(localizer), localizer.mask_prompt_size[0]
    if "masks" in kind:
        masks = torch.from_numpy(deterministic_array("masks", (2, 1, side, side)))
        prompts = Prompts(boxes=BOXES[:2] if "boxes" in kind else None, masks=masks)
    else:
        prompts = PROMPTS[kind]
    pixels = processor(family, localizer.image_size)(image, return_tensors="pt")["pixel_values"]
    ious, masks, hidden = run_library(model, pixels, prompts, multimask)
    stages = ("transformer", "mlp")
    [output] = localizer(localizer.encode_images([image]), [prompts], True, stages, True)
    rows, best = torch.arange(len(prompts)), ious.argmax(dim=1)
    torch.testing.assert_close(output.iou, ious[rows, best], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.masks, masks[rows, best], atol=2e-5, rtol=1e-5)
    tokens = mask_tokens(model, hidden)
    if multimask:  # SAM-HQ sorts its masks by IoU
        all_ious = model.mask_decoder.iou_prediction_head(hidden[:, 1 if family != "sam_hq" else 0])
        best = 1 + all_ious[:, 1:].argmax(dim=1)
    torch.testing.assert_close(output.stage_tokens["transformer"], tokens[rows, best], atol=1e-5, rtol=1e-5)
    mlps = model.mask_decoder.output_hypernetworks_mlps
    kernels = torch.stack([mlps[index](token) for index, token in zip(best.tolist(), tokens[rows, best])])
    torch.testing.assert_close(output.stage_tokens["mlp"], kernels.detach(), atol=1e-5, rtol=1e-5)


def test_prompt_encoder_token_is_the_mean(family):
    localizer = build(FAMILIES[family], SPOT + "TOKEN_STAGE", "prompt_encoder")
    embeddings = localizer.encode_images([image_of(localizer)])
    for kind, counts in (("boxes", [2] * 5), ("points", [2, 1]), ("boxes and points", [4, 4])):
        prompts = PROMPTS[kind]
        points, labels, boxes = (
            None if x is None else x[None] for x in (prompts.points, prompts.point_labels, prompts.boxes)
        )
        sparse, _ = localizer.sam.prompt_encoder(points, labels, boxes, None)
        expected = [embedding[:count].mean(dim=0) for embedding, count in zip(sparse[0], counts)]
        [output] = localizer(embeddings, [prompts])
        torch.testing.assert_close(output.tokens, torch.stack(expected))


@pytest.mark.parametrize("size", [(130, 90), (300, 200), (20, 30), (48, 64)])
def test_preprocessing_equals_the_library(family, size):
    """PIL's resizing and torchvision's differ by one of 256 levels, at the most."""
    localizer = build(FAMILIES[family])
    image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = processor(family, localizer.image_size)(image, return_tensors="pt")["pixel_values"][0]
    actual = localizer._preprocess(image)
    assert actual.shape == expected.shape == (3, localizer.image_size, localizer.image_size)
    assert ((actual - expected) * localizer.pixel_std * 255).abs().max() <= 1.01
    height, width = localizer.input_size(size)
    assert (actual[:, height:] == 0).all() and (actual[:, :, width:] == 0).all()


def test_square_input_scales_x_and_y_apart():
    model = tiny_model(*FAMILIES["sam2"]).recognizer
    set_weights(model.localizer.sam)
    image = as_inputs(0, (32, 128))["image"]
    features = ImageFeatures(model.localizer.encode_images([image]), None, [(32, 128)])
    [output] = model.locate(features, [Prompts(boxes=BOXES * torch.tensor([2, 0.5, 2, 0.5]))], with_masks=True)
    [expected] = model.localizer(features.embeddings, [Prompts(boxes=BOXES)], with_masks=True)
    torch.testing.assert_close(output.tokens, expected.tokens)


@pytest.mark.parametrize("size", [(40, 90), (130, 50)])
def test_masks_are_resized_as_in_the_library(family, size):
    localizer = build(FAMILIES[family])
    logits = torch.from_numpy(deterministic_array("logits", (3, *localizer.mask_prompt_size)))
    image_processor = processor(family, localizer.image_size)
    arguments = {"reshaped_input_sizes": [localizer.input_size(size)]} if family == "sam_hq" else {}
    if family == "sam_hq":
        arguments["pad_size"] = {"height": localizer.image_size, "width": localizer.image_size}
    [expected] = image_processor.post_process_masks([logits[None]], [size], **arguments)
    masks = localizer.upsample_masks(logits, size, size)
    assert (masks != expected[0]).float().mean() < 1e-3 and 0.2 < masks.float().mean() < 0.8


def test_unstable_single_masks_are_not_replaced():
    """The library's rule takes another mask for an unstable one; here token and mask stay those of one output."""
    localizer = build(FAMILIES["sam2"])
    image = image_of(localizer)
    pixels = processor("sam2", 64)(image, return_tensors="pt")["pixel_values"]
    results = []
    for options in ({"dynamic_multimask_stability_thresh": 1.1}, {"dynamic_multimask_via_stability": False}):
        results.append(run_library(library_model("sam2", localizer, **options), pixels, PROMPTS["boxes"], False))
    (_, replaced, hidden), (_, single, _) = results
    assert (replaced - single).abs().max() > 0.1  # the rule was at work
    [output] = localizer(localizer.encode_images([image]), [PROMPTS["boxes"]], with_masks=True)
    torch.testing.assert_close(output.masks, single[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.tokens, hidden[:, 2], atol=1e-5, rtol=1e-5)


def test_no_memory_embedding_is_of_the_decoded_level():
    """With SAM 3's four levels as with three; ``Sam3TrackerModel`` adds it to the last, ``...VideoModel`` as here."""
    localizer = build(FAMILIES["sam3_tracker"])
    content = json.loads((TINY / "sam3_tracker.json").read_text())["tracker_config"]
    content["vision_config"]["scale_factors"] = [4.0, 2.0, 1.0, 0.5]
    four = Sam3TrackerLocalizer(sam=transformers.Sam3TrackerModel(transformers.Sam3TrackerConfig(**content)))
    four.sam.load_state_dict(localizer.sam.state_dict(), strict=False)
    image, config = image_of(localizer), transformers.Sam3TrackerVideoConfig(**copy.deepcopy(content), image_size=56)
    embeddings = four.encode_images([image])
    torch.testing.assert_close(embeddings, localizer.encode_images([image]))
    video = transformers.Sam3TrackerVideoModel(config).eval()
    video.load_state_dict(four.sam.state_dict(), strict=False)
    with torch.no_grad():
        expected = video.get_image_embeddings(four._preprocess(image)[None])
    torch.testing.assert_close(embeddings, pack_features(expected[-1], expected[:-1]), atol=1e-5, rtol=1e-5)


def test_packing_is_exact():
    embeddings, fine, middle = torch.randn(2, 32, 4, 4), torch.randn(2, 4, 16, 16), torch.randn(2, 8, 8, 8)
    packed = pack_features(embeddings, [fine, middle])
    assert packed.shape == (2, 32 + 64 + 32, 4, 4)
    unpacked, features = unpack_features(packed, 32, [(4, 4), (8, 2)])
    assert torch.equal(unpacked, embeddings) and torch.equal(features[0], fine) and torch.equal(features[1], middle)


def test_masks_only_on_request(family, monkeypatch):
    localizer = build(FAMILIES[family])
    monkeypatch.setattr(localizer.decoder_class, "predict_masks", lambda *_: pytest.fail("a mask was computed"))
    embeddings = localizer.encode_images([image_of(localizer)])
    assert localizer(embeddings, [PROMPTS["boxes"]])[0].masks is None


def test_images_are_decoded_together():
    """As on a GPU: the prompts of several images in one call, each with the features of its own image."""
    localizer = build(FAMILIES["sam2"])
    embeddings = localizer.encode_images([as_inputs(i)["image"] for i in range(3)])
    prompts = [PROMPTS["boxes"], Prompts(boxes=torch.zeros(0, 4)), PROMPTS["boxes"][:2]]
    alone = localizer(embeddings, prompts, with_masks=True)
    together = localizer._forward(embeddings, prompts, True, (), False)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.tokens, other.tokens, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.masks, other.masks, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files_give_official_numbers(name, tmp_path):
    """Keys, shapes, tokens, IoUs and masks of a tiny model in the official package, whose predictor made them."""
    content, recorded = json.loads((TINY / f"{name}.json").read_text()), OFFICIAL[name]
    options = {"hidden_size": 32} if name == "sam2" else {"layer_norm_eps": 1e-5}  # these are fixed in the packages
    content["mask_decoder_config"] = options if name == "sam2" else {**content["mask_decoder_config"], **options}
    (tmp_path / "size.json").write_text(json.dumps(content))
    weights = {
        key: torch.from_numpy(deterministic_array(key, tuple(shape))) for key, shape in recorded["shapes"].items()
    }
    torch.save({"model": weights} if name == "sam2" else weights, tmp_path / "official.pt")
    recognizer = tiny_model(*FAMILIES[name][:2], SPOT + "SAM.NAME", str(tmp_path / "size.json")).recognizer
    load_weights(recognizer, "", {"sam": str(tmp_path / "official.pt"), "clip_model": ""})
    localizer, boxes = recognizer.localizer, torch.tensor(recorded["boxes"])
    embeddings = localizer.encode_images([image_of(localizer)])
    [output] = localizer(embeddings, [Prompts(boxes=boxes)], True, ("transformer",), True)
    torch.testing.assert_close(output.tokens, torch.tensor(recorded["tokens"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.iou, torch.tensor(recorded["iou"])[:, 0], atol=1e-5, rtol=0)
    step = 7 if name == "sam2" else 29
    torch.testing.assert_close(output.masks.flatten(1)[:, ::step], torch.tensor(recorded["masks"]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "video"), [("sam2", "Sam2Video"), ("edgetam", "EdgeTamVideo")])
def test_video_models_files_are_read(family, video):
    """The hub's files are of video models: what they have beside the image path is left out."""
    localizer = build(FAMILIES[family])
    content = json.loads((TINY / f"{family}.json").read_text())
    content.pop("model_type")
    with torch.device("meta"):
        model = getattr(transformers, f"{video}Model")(getattr(transformers, f"{video}Config")(**content))
    assert any(key.startswith("memory_") for key in model.state_dict())
    renamed = localizer.rename_official_keys(model.state_dict())
    expected = localizer.sam.state_dict()
    assert {key: value.shape for key, value in renamed.items()} == {key: x.shape for key, x in expected.items()}
    own = localizer.rename_official_keys(expected)
    assert own.keys() == expected.keys() and all(torch.equal(own[key], value) for key, value in expected.items())


def test_sam3_file_is_read():
    localizer = build(FAMILIES["sam3_tracker"])
    expected, state = localizer.sam.state_dict(), {"detector_model.detr_encoder.a": torch.zeros(1)}
    for key, value in expected.items():
        for old, new in (("vision_encoder.backbone.", "detector_model."), ("vision_encoder.neck.", "tracker_neck.")):
            if key.startswith(old):
                state[f"{new}{key}" if new == "detector_model." else new + key.removeprefix(old)] = value
        if not key.startswith("vision_encoder."):
            state[f"tracker_model.{key}"] = value
    state["tracker_model.memory_encoder.a"] = torch.zeros(1)
    renamed = localizer.rename_official_keys(state)
    assert renamed.keys() == expected.keys() and all(
        torch.equal(renamed[key], value) for key, value in expected.items()
    )


def test_known_sizes_build_and_have_weights():
    for kind in (Sam2Localizer, SamHqLocalizer, EdgeTamLocalizer, Sam3TrackerLocalizer):
        assert set(kind.sizes) <= set(KNOWN_WEIGHTS)
    with torch.device("meta"):
        sizes = {name: sum(x.numel() for x in Sam2Localizer.build(name).parameters()) for name in Sam2Localizer.sizes}
    assert sizes["sam2_hiera_tiny"] == sizes["sam2.1_hiera_tiny"] == OFFICIAL_PARAMETERS["tiny"]
    assert [sizes[f"sam2.1_hiera_{name}"] for name in OFFICIAL_PARAMETERS] == list(OFFICIAL_PARAMETERS.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is no JSON file"),
        ("[]", "expected a JSON object"),
        ('{"vision_config": {"model_type": "no_such_model"}}', "is no config of a EdgeTamModel"),
        ('{"vision_config": {"backbone_config": {"architecture": "hf-hub:a/b"}}}', "'architecture' is refused"),
        ('{"vision_config": {"auto_map": {"AutoModel": "code.py"}}}', "'auto_map' is refused"),
        ('{"attn_implementation": "kernels-community/flash-attn2"}', "'attn_implementation' is refused"),
        ('{"vision_config": [{"auto_map": {"AutoModel": "code.py"}}]}', "'auto_map' is refused"),
        ('{"vision_config": {"backbone": "a/b"}}', "'backbone' is refused"),
    ],
)
def test_invalid_files_are_refused(content, message, tmp_path):
    path = tmp_path / "size.json"
    path.write_text(content)
    overrides = (*FAMILIES["edgetam"][:2], SPOT + "SAM.NAME", str(path))
    with pytest.raises(ValueError, match=message):
        build_localizer(tiny_config(*overrides))


def test_unknown_size_is_refused():
    with pytest.raises(ValueError, match="SAM.NAME: expected one of sam2.1_hiera_tiny, .*JSON file.*; got 'vit_b'"):
        build_localizer(tiny_config(*FAMILIES["sam2"][:2], SPOT + "SAM.NAME", "vit_b"))


@pytest.mark.parametrize(("family", "package"), [("sam2", "transformers"), ("edgetam", "timm")])
def test_missing_package_is_named(family, package, monkeypatch):
    original = importlib.import_module

    def import_module(name, *arguments):
        if name == package:
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ImportError, match=rf"needs the package {package}: pip install 'regionspot\[models\]'"):
        build_localizer(tiny_config(*FAMILIES[family]))


def test_export_refuses_other_localizers():
    with pytest.raises(ValueError, match="export: expected SAM and CLIP as the frozen parts, got Sam2Localizer and"):
        parts_of(tiny_model(*FAMILIES["sam2"]).recognizer)


def test_encoder_is_compiled_on_request(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: lambda *inputs: calls.append(inputs) or function(*inputs))
    calls, plain = [], build(FAMILIES["sam2"])
    compiled = copy.deepcopy(build(FAMILIES["sam2"], SPOT + "COMPILE", True))
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    image = image_of(plain)
    assert torch.equal(compiled.encode_images([image]), plain.encode_images([image]))
    assert [encoder for encoder, _ in calls] == [compiled.sam.vision_encoder]
