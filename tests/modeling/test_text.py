"""Text: trimming, templates, cache; vision features against CLIP's own forward pass."""

import clip
import pytest
import torch
from torch.nn import functional as F

from regionspot.modeling.text_encoder import TextEncoder, encode_tokens
from regionspot.modeling.vision_language import encode_patches

from ..helpers import NAMES, tiny_model


@pytest.fixture(scope="module")
def clip_model():
    return tiny_model(names=None).recognizer.vision_language.clip_model


def test_trimmed_context_equals_the_full_one(clip_model):
    tokens = clip.tokenize(["a cup", "a photo of a very long wooden table.", "spoon"])
    longest = int(tokens.argmax(dim=1).max()) + 1
    with torch.no_grad():
        trimmed, full = encode_tokens(clip_model, tokens[:, :longest]), clip_model.encode_text(tokens)
    assert longest < 15
    torch.testing.assert_close(trimmed, full, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("templates", "number"), [("all", 81), ("one", 1), ("none", 1)])
def test_embedding_is_the_normalised_mean_of_the_prompts(clip_model, templates, number):
    encoder = TextEncoder(clip_model, templates, batch_size=7)
    assert len(encoder.templates) == number
    names = ["zebra", "arctic_(type_of_shoe)", "cup"]
    with torch.no_grad():
        expected = [
            F.normalize(
                clip_model.encode_text(clip.tokenize([t.format(name) for t in encoder.templates])).mean(dim=0), dim=0
            )
            for name in names
        ]
    torch.testing.assert_close(encoder(names), torch.stack(expected), atol=1e-5, rtol=0)


def test_second_call_is_read_from_the_cache(clip_model, monkeypatch):
    first = TextEncoder(clip_model, "one")(NAMES)
    monkeypatch.setattr(TextEncoder, "encode", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(TextEncoder(clip_model, "one")(NAMES), first)


@pytest.mark.parametrize("change", ["templates", "names", "style", "weights"])
def test_cache_key_tells_apart_what_changes_the_embeddings(clip_model, change, cache_folder):
    TextEncoder(clip_model, "one")(["a_b"])
    names, templates, style, model = ["a_b"], "one", "dataset", clip_model
    if change == "templates":
        templates = "none"
    elif change == "names":
        names = ["a_c"]
    elif change == "style":
        style = "readable"
    else:
        model = tiny_model(
            "MODEL.REGIONSPOT.CLIP.CUSTOM.TEXT_LAYERS", 1, names=None
        ).recognizer.vision_language.clip_model
    TextEncoder(model, templates, style)(names)
    assert len(list(cache_folder.glob("text/*.safetensors"))) == 2


def test_damaged_cache_is_encoded_again(clip_model, cache_folder):
    first = TextEncoder(clip_model, "one")(NAMES)
    [path] = cache_folder.glob("text/*.safetensors")
    path.write_bytes(b"damaged")
    assert torch.equal(TextEncoder(clip_model, "one")(NAMES), first)
    assert path.stat().st_size > 100


def test_autocast_and_inference_mode_do_not_reach_the_embeddings(clip_model):
    plain = TextEncoder(clip_model, "one").encode(NAMES)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        inside = TextEncoder(clip_model, "one")(NAMES)
    assert torch.equal(plain, inside) and not inside.is_inference()


def test_a_cache_that_cannot_be_written_is_done_without(clip_model, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REGIONSPOT_CACHE", str(tmp_path / "file" / "below"))
    assert TextEncoder(clip_model, "one")(NAMES).shape == (4, 32)


def test_too_long_name_is_named(clip_model):
    with pytest.raises(ValueError, match="'endless .* too long"):
        TextEncoder(clip_model, "one")(["cup", "endless " * 80])


def test_patches_lead_to_clips_own_image_feature(clip_model):
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        patches = encode_patches(clip_model.visual, images)
        feature = clip_model.visual.ln_post(patches[:, 0]) @ clip_model.visual.proj
        torch.testing.assert_close(feature, clip_model.encode_image(images), atol=1e-5, rtol=0)
    assert patches.shape == (2, 1 + 4 * 4, 64)


@pytest.mark.parametrize(("features", "length"), [("none", None), ("feature_map", 16), ("feature_map+class_token", 17)])
def test_feature_choices(features, length):
    model = tiny_model("MODEL.REGIONSPOT.CLIP.FEATURES", features).recognizer
    feature_map = model.vision_language.encode_images([torch.zeros(3, 20, 50, dtype=torch.uint8)])
    assert feature_map is None if length is None else feature_map.shape == (1, length, 64)
    [logits] = model.classify([torch.randn(3, 32)], feature_map)
    assert logits.shape == (3, 4)
