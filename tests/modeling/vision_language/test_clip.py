"""CLIP: feature maps and trimmed prompts against CLIP's own forward pass."""

import clip
import numpy as np
import pytest
import torch

from regionspot.modeling.vision_language.clip import encode_patches, encode_tokens

from ...helpers import as_inputs, tiny_model


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


def test_patches_lead_to_clips_image_feature(clip_model):
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        patches = encode_patches(clip_model.visual, images)
        feature = clip_model.visual.ln_post(patches[:, 0]) @ clip_model.visual.proj
        torch.testing.assert_close(feature, clip_model.encode_image(images), atol=1e-5, rtol=0)
    assert patches.shape == (2, 1 + 4 * 4, 64)


def bilinear(image, side):
    """Resize a (3, H, W) image to a square in plain NumPy: pixel centers aligned, no antialias."""

    def places(length):
        centers = np.clip((np.arange(side) + 0.5) * length / side - 0.5, 0, length - 1)
        low = np.floor(centers).astype(int)
        return low, np.minimum(low + 1, length - 1), centers - low

    (top, bottom, down), (left, right, along) = (places(length) for length in image.shape[1:])
    rows = image[:, top] * (1 - down)[:, None] + image[:, bottom] * down[:, None]
    return rows[:, :, left] * (1 - along) + rows[:, :, right] * along


@pytest.mark.parametrize("size", [(130, 90), (32, 32), (20, 50)], ids=["smaller", "as it is", "larger"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_preprocessing_is_bilinear_without_antialias(size, dtype):
    image = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = tiny_model(names=None).recognizer.vision_language.preprocess(image)
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    expected = (bilinear(image.double().numpy() / 255, 32) - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(seen.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(("features", "first"), [("feature_map", 1), ("feature_map+class_token", 0)])
def test_feature_map_is_before_ln_post(features, first):
    """CLIP puts its class token first: the feature map alone is all that follows it."""
    model = tiny_model("MODEL.REGIONSPOT.CLIP.FEATURES", features, names=None).recognizer.vision_language
    images, seen = [as_inputs(i)["image"] for i in (0, 1)], []
    visual = model.clip_model.visual
    handle = visual.transformer.register_forward_hook(lambda *args: seen.append(args[-1].transpose(0, 1)))
    with torch.no_grad():
        model.clip_model.encode_image(torch.stack([model.preprocess(image) for image in images]))
    handle.remove()
    torch.testing.assert_close(model.encode_images(images), seen[0][:, first:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("features", "length"), [("none", None), ("feature_map", 16), ("feature_map+class_token", 17)])
def test_feature_choices(features, length):
    model = tiny_model("MODEL.REGIONSPOT.CLIP.FEATURES", features).recognizer
    feature_map = model.vision_language.encode_images([torch.zeros(3, 20, 50, dtype=torch.uint8)])
    assert feature_map is None if length is None else feature_map.shape == (1, length, 64)
    [logits] = model.classify([torch.randn(3, 32)], feature_map)
    assert logits.shape == (3, 4)


def test_bf16_is_close_to_float32():
    """Layer norms and the logit scale stay in float32, as in CLIP's own half precision; keys stay, too."""
    exact = tiny_model(names=["cup", "spoon"]).recognizer
    rounded = tiny_model("MODEL.REGIONSPOT.PRECISION", "bf16", names=["cup", "spoon"]).recognizer
    dtypes = {key: value.dtype for key, value in rounded.vision_language.clip_model.state_dict().items()}
    assert dtypes.keys() == exact.vision_language.clip_model.state_dict().keys()
    assert dtypes["logit_scale"] == dtypes["ln_final.weight"] == torch.float32
    assert dtypes["text_projection"] == dtypes["visual.conv1.weight"] == torch.bfloat16
    assert torch.equal(rounded.vision_language.clip_model.logit_scale, exact.vision_language.clip_model.logit_scale)
    images = [as_inputs(0)["image"]]
    feature_map, expected = (x.vision_language.encode_images(images) for x in (rounded, exact))
    assert feature_map.dtype == torch.float32 and not torch.equal(feature_map, expected)
    torch.testing.assert_close(feature_map, expected, atol=0.1, rtol=0)
    embeddings, expected = rounded.classifier.embeddings, exact.classifier.embeddings
    assert embeddings.dtype == torch.float32 and not torch.equal(embeddings, expected)
    assert (embeddings * expected).sum(dim=1).min() > 0.99
