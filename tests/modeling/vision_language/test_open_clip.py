"""open_clip's models against their own forward passes, tokenizers and files."""

import json
import logging
import socket

import open_clip
import pytest
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from safetensors.torch import save_file

from regionspot import RegionSpotPredictor
from regionspot.checkpoint.loading import load_weights
from regionspot.export.modules import parts_of
from regionspot.index import IndexClassifier, build_index
from regionspot.modeling.identity import describe_clip, describe_text
from regionspot.modeling.vision_language.open_clip import encode_patches
from regionspot.modeling.vision_language.open_clip_models import build_open_clip, read_open_clip_config
from regionspot.modeling.vision_language.text_encoder import TextEncoder

from ...helpers import NAMES, as_inputs, tiny_config, tiny_model
from ...index.conftest import write_images
from .members import CLIP, OPEN_CLIP, SENTENCES, VISION_LANGUAGE, model_config, write_config, write_tokenizer

TEMPLATES = ["a photo of a {}.", "{}."]
ODD_NAMES = [
    "cup",
    "Red_square",
    "arctic (type of shoe)",
    "o'clock",
    "10",
    "#2",
    "caf\u00e9",
    "R&amp;B",
    "a  b",
    "\U0001f600",
]


@pytest.fixture(params=OPEN_CLIP, scope="module")
def member(request, overrides):
    return request.param, tiny_model(*overrides[request.param], names=None).recognizer.vision_language


def build(directory, name, **changes):
    """Build the vision-language model of a changed config."""
    chosen = write_config(directory / "changed.json", model_config(name, **changes))
    return tiny_model(*chosen, names=None).recognizer.vision_language


def inputs_of(vision, number=2):
    return torch.stack([vision.preprocess(as_inputs(i)["image"]) for i in range(number)])


@torch.no_grad()
def test_feature_map_is_the_last_blocks_output(member):
    """And the pooled output in place of SigLIP's class token."""
    name, vision = member
    visual, seen = vision.clip_model.visual, []
    block = visual.trunk.blocks[-1] if hasattr(visual, "trunk") else visual.transformer.resblocks[-1]
    handle = block.register_forward_hook(lambda *args: seen.append(args[-1]))
    embeddings = vision.clip_model.encode_image(inputs_of(vision))
    handle.remove()
    feature_map = vision.encode_images([as_inputs(i)["image"] for i in range(2)])
    [expected] = seen
    if name == "siglip":
        assert expected.shape == (2, 16, 64)
        expected = torch.cat([embeddings[:, None], expected], dim=1)
    torch.testing.assert_close(feature_map, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(vision.embed_images(inputs_of(vision)), embeddings, atol=1e-5, rtol=0)


@torch.no_grad()
def test_text_is_the_librarys(member):
    name, vision = member
    tokens, lengths = vision.tokenize(NAMES, TEMPLATES)
    longest = int(lengths.max())
    embeddings = vision.encode_tokens(tokens[:, :longest])
    torch.testing.assert_close(embeddings, vision.clip_model.encode_text(tokens), atol=1e-5, rtol=0)
    assert (longest == vision.context_length) == (name == "siglip")  # only SigLIP attends to padding
    assert embeddings.shape == (8, vision.text_dim)


@torch.no_grad()
def test_padding_matters_where_it_is_kept(overrides):
    siglip = tiny_model(*overrides["siglip"], names=None).recognizer.vision_language
    tokens, _ = siglip.tokenize(["cup"], ["{}"])
    changed = tokens.clone()
    changed[0, -1] = 5
    assert not torch.allclose(siglip.encode_tokens(tokens), siglip.encode_tokens(changed), atol=1e-4)


def test_tokens_are_those_of_open_clip(member, overrides):
    name, vision = member
    config = model_config(name)["text_cfg"]
    if "hf_tokenizer_name" in config:
        directory = json.loads(json.dumps(vision.config.tokenizer))
        options = config.get("tokenizer_kwargs", {})
        tokenizer = HFTokenizer(directory, context_length=vision.context_length, local_files_only=True, **options)
    else:
        tokenizer = SimpleTokenizer(context_length=vision.context_length)
    tokens, lengths = vision.tokenize(ODD_NAMES, TEMPLATES)
    expected = tokenizer([template.format(x) for x in ODD_NAMES for template in TEMPLATES])
    assert torch.equal(tokens.long(), expected)
    for row, length in zip(expected, lengths):
        assert length == len(row) or len(set(row[length:].tolist())) == 1


def test_same_weights_as_openais_clip(overrides):
    """In quick GELU's model: OpenAI's weights, maps, embeddings and logits, exactly those of the other class."""
    openai, model = tiny_model(), tiny_model(*overrides["quickgelu"])
    official = openai.recognizer.vision_language.clip_model.state_dict()
    renamed = model.recognizer.vision_language.rename_official_keys(official)
    assert renamed.keys() == official.keys() == model.recognizer.vision_language.clip_model.state_dict().keys()
    state = {f"vision_language.clip_model.{key}": x for key, x in renamed.items()}
    model.recognizer.load_state_dict({**openai.recognizer.state_dict(), **state})
    images = [as_inputs(i)["image"] for i in range(2)]
    one, other = (x.recognizer.vision_language for x in (model, openai))
    torch.testing.assert_close(one.encode_images(images), other.encode_images(images), atol=1e-5, rtol=0)
    with torch.no_grad():
        embeddings = [x.embed_images(inputs_of(x)) for x in (one, other)]
    torch.testing.assert_close(*embeddings, atol=1e-5, rtol=0)
    texts = [x.recognizer.classifier.embeddings for x in (model, openai)]
    torch.testing.assert_close(*texts, atol=1e-5, rtol=0)
    [output], [expected] = model([as_inputs(0)]), openai([as_inputs(0)])
    torch.testing.assert_close(output["instances"].scores, expected["instances"].scores, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["plain", "wrapped", "safetensors", "openai"])
@pytest.mark.parametrize("name", ["openclip", "siglip"])
def test_official_files(overrides, tmp_path, layout, name, monkeypatch):
    """Files of open_clip, wrapped or not, and in OpenAI's layout without "text."; no network is needed."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("network"))
    model = tiny_model(*overrides[name], names=None).recognizer
    original = {key: torch.randn_like(x) for key, x in model.vision_language.clip_model.state_dict().items()}
    path, state = tmp_path / "weights.pt", {key: x.clone() for key, x in original.items()}
    state["logit_scale"] = state["logit_scale"].reshape(1)
    if layout == "openai":
        state = {key.removeprefix("text."): x for key, x in state.items()} | {"context_length": torch.tensor(77)}
    if layout == "wrapped":
        torch.save({"state_dict": {f"module.{key}": x for key, x in state.items()}, "epoch": 3}, path)
    elif layout == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    else:
        torch.save(state, path)
    load_weights(model, "", {"sam": "", "clip_model": str(path)})
    for key, value in model.vision_language.clip_model.state_dict().items():
        assert torch.equal(value, original[key]), key


def test_other_models_weights_are_refused(overrides, tmp_path):
    model = tiny_model(*overrides["eva"], names=None).recognizer
    torch.save(tiny_model(names=None).recognizer.vision_language.clip_model.state_dict(), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="does not fit the configured model"):
        load_weights(model, "", {"sam": "", "clip_model": str(tmp_path / "clip.pt")})


@pytest.mark.parametrize("change", ["activation", "tokenizer", "cleaning"])
def test_text_of_another_setup_is_not_taken_from_the_cache(overrides, tmp_path, change, cache_directory):
    """The same weights give other embeddings."""
    write_tokenizer(tmp_path / "tokenizer", [*SENTENCES, "zebra"] if change == "tokenizer" else SENTENCES)
    name = "openclip" if change == "activation" else "metaclip2"
    one = tiny_model(*overrides[name], names=None).recognizer.vision_language
    changes = {
        "activation": {"quick_gelu": True},
        "tokenizer": {},
        "cleaning": {"text_cfg": {**model_config(name)["text_cfg"], "tokenizer_kwargs": {"clean": "lower"}}},
    }
    other = build(tmp_path, name, **changes[change])
    other.load_state_dict(one.state_dict())
    first, second = (TextEncoder(vision, "one")(["Cup", "zebra"]) for vision in (one, other))
    assert not torch.equal(first, second) and len(list(cache_directory.glob("text/*/*.safetensors"))) == 2


def test_image_setup_is_part_of_the_identity(overrides, tmp_path):
    one = tiny_model(*overrides["openclip"], names=None).recognizer
    chosen = write_config(tmp_path / "other.json", model_config("openclip", quick_gelu=True))
    other = tiny_model(*chosen, names=None).recognizer
    other.load_state_dict(one.state_dict())
    for describe in (describe_clip, describe_text):
        assert describe(one)["fingerprint"] != describe(other)["fingerprint"]


def test_crops_are_scored_as_the_library_does(overrides):
    """``CropBaseline``: one box over the whole image."""
    inputs = as_inputs(0, num_objects=1)
    inputs["instances"].gt_boxes.tensor[:] = torch.tensor([[0.0, 0.0, 64.0, 48.0]])
    model = tiny_model(*overrides["siglip"], "MODEL.META_ARCHITECTURE", "CropBaseline", f"{CLIP}TEMPLATES", "none")
    [output] = model([inputs])
    vision = model.recognizer.vision_language
    with torch.no_grad():
        image, text = vision.preprocess(inputs["image"])[None], vision.tokenize(NAMES, ["{}"])[0]
        logits, _ = vision.clip_model.get_logits(image, text)
    best = logits.softmax(dim=1).max()
    torch.testing.assert_close(output["instances"].scores.max(), best, atol=1e-5, rtol=0)


def test_index_scores_with_scale_and_bias(overrides, tmp_path):
    (tmp_path / "images").mkdir()
    cfg = tiny_config(*overrides["siglip"], "MODEL.REGIONSPOT.SCORE_FUNCTION", "sigmoid")
    predictor = RegionSpotPredictor(cfg)
    predictor.set_vocabulary(NAMES)
    images = write_images(tmp_path / "images", 1)
    classifier = IndexClassifier(
        build_index(predictor, cfg, images, tmp_path / "index", show_progress=False),
        predictor.recognizer.classifier.embeddings,
    )
    [(_, columns, logits)] = classifier.logits()
    expected = predictor.recognizer.score(columns["embeddings"].float())
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)
    assert (expected < 9).all()  # as high as the scale alone could make it: the bias is in it


def test_image_encoder_is_compiled(overrides, monkeypatch):
    """The whole of it; tracing it would take ten seconds here."""
    run = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *args: run.append(f) or f(*args))
    model = tiny_model(*overrides["openclip"], "MODEL.REGIONSPOT.COMPILE", True, names=None)
    model.recognizer.vision_language.encode_images([as_inputs(0)["image"]])
    assert run == [encode_patches]


def test_export_is_refused(overrides):
    with pytest.raises(
        ValueError, match="export: expected SAM and CLIP .* SamLocalizer and OpenClipVisionLanguageModel"
    ):
        parts_of(tiny_model(*overrides["openclip"], names=None).recognizer)


def test_pixels_and_activation_follow_the_weights(caplog):
    with caplog.at_level(logging.WARNING):
        assert read_open_clip_config("ViT-B-16-SigLIP").mean == (0.5, 0.5, 0.5)
        assert read_open_clip_config("ViT-B-16").mean == open_clip.OPENAI_DATASET_MEAN
        laion, openai = (read_open_clip_config("ViT-L-14", f"ViT-L-14/{x}") for x in ("laion2b_s32b_b82k", "openai"))
    assert laion.mean == (0.5, 0.5, 0.5) and openai.mean == open_clip.OPENAI_DATASET_MEAN and not caplog.text
    assert not laion.model["quick_gelu"] and openai.model["quick_gelu"]
    assert read_open_clip_config("ViT-B-16", "ViT-B-16-quickgelu/dfn2b").model["quick_gelu"]
    assert read_open_clip_config("ViT-B-16", "ViT-B/16").model["quick_gelu"]  # OpenAI's, by the name it has here
    assert "need QuickGELU" not in caplog.text
    read_open_clip_config("ViT-B-16", "my.pt")
    assert "need QuickGELU" in caplog.text
    read_open_clip_config("ViT-L-14", "my.pt")
    assert "weights of ViT-L-14 have different means" in caplog.text


def test_pixels_of_a_json_file(tmp_path):
    content = {"model_cfg": model_config("openclip"), "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}}
    vision = tiny_model(
        *write_config(tmp_path / "open_clip_config.json", content), names=None
    ).recognizer.vision_language
    white = vision.preprocess(torch.full((3, 20, 30), 255, dtype=torch.uint8))
    torch.testing.assert_close(white.mean(dim=(1, 2)), torch.tensor([0.9, 0.4, 0.7 / 3]))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        (
            "ViT-B/16",
            "",
            r"CLIP.NAME: expected a model of open_clip.list_models\(\), such as ViT-B-16, .*; got 'ViT-B/16'",
        ),
        ("ViT-B-16", "ViT-L-14/openai", "CLIP.WEIGHTS: expected weights of ViT-B-16, .* got 'ViT-L-14/openai'"),
        ("RN50", "", "RN50 has a ResNet"),
        ("coca_ViT-B-32", "", "coca_ViT-B-32 is a CoCa"),
        ("roberta-ViT-B-32", "", "has the text encoder roberta-base of transformers"),
        ("ViT-L-14-CLIPA", "", "has a tokenizer with options that are not supported"),
        ("convnext_base", "", "has the image encoder ConvNeXt, expected one with patch tokens"),
    ],
)
def test_models_without_what_is_needed_are_refused(name, weights, message):
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        build_open_clip(read_open_clip_config(name, weights))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_cfg": {"timm_model_name": "hf-hub:a/b"}}, "'hf-hub:a/b', which is none of timm's models"),
        ({"vision_cfg": {"widht": 3}}, "open_clip cannot build .*widht"),
        ({"vision_cfg": {"image_size": [32, 64], "layers": 1, "width": 64, "patch_size": 8}}, "expected a square"),
    ],
)
def test_wrong_json_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, "openclip", **change)


def test_damaged_json_is_refused(tmp_path):
    for content, message in (
        ("{", "damaged, or not JSON"),
        ("[1]", "expected embed_dim"),
        ('{"a": 1}', "expected embed_"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_open_clip_config(str(tmp_path / "bad.json"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_open_clip_config(str(tmp_path / "absent.json"))


def test_missing_class_token_is_refused(tmp_path):
    """A trunk that neither has one nor pools; with the patches alone it works."""
    trunk = {"image_size": 32, "timm_model_name": "tiny_siglip", "timm_pool": "", "timm_proj": "none"}
    chosen = write_config(tmp_path / "unpooled.json", model_config("siglip", vision_cfg=trunk))
    with pytest.raises(ValueError, match="has no class token; set CLIP.FEATURES"):
        tiny_model(*chosen, names=None)
    model = tiny_model(*chosen, f"{CLIP}FEATURES", "feature_map", names=None)
    assert model.recognizer.vision_language.encode_images([as_inputs(0)["image"]]).shape == (1, 16, 64)


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"the model ViT-B-16 needs open_clip: pip install 'regionspot\[models\]'"):
        tiny_model(VISION_LANGUAGE, "OpenClipVisionLanguageModel", f"{CLIP}NAME", "ViT-B-16")


def test_hub_tokenizer_is_fetched_once_or_put_there(tmp_path, monkeypatch, cache_directory):
    def no_network(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    vision = build(tmp_path, "siglip")  # beside this file is no directory "tokenizer"
    directory = cache_directory / "hub" / "tokenizer"
    address = "https://huggingface.co/tokenizer/resolve/main/tokenizer_config.json"
    with pytest.raises(
        FileNotFoundError, match=f"could not fetch {address} .* put it at {directory}/tokenizer_config.json"
    ):
        vision.tokenize(["cup"], ["{}"])
    write_tokenizer(directory)
    assert int(vision.tokenize(["cup"], ["{}"])[0][0, -1]) == 1


def test_damaged_tokenizer_is_refused(tmp_path):
    vision = build(tmp_path, "siglip")
    write_tokenizer(tmp_path / "tokenizer")
    vision = build(tmp_path, "siglip")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a pad_token that tokenizer.json knows, got None"):
        vision.tokenize(["cup"], ["{}"])
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"pad_token": {"content": "<pad>"}}')
    with pytest.raises(ValueError, match="tokenizer.json cannot be read as a tokenizer"):
        vision.tokenize(["cup"], ["{}"])
