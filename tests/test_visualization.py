import numpy as np
import pytest
import torch

from regionspot.visualization import cross_attention, draw_attention

from .helpers import as_inputs, tiny_model


@pytest.mark.parametrize("features", ["feature_map", "feature_map+class_token"])
def test_cross_attention_of_the_last_layer(features):
    recognizer = tiny_model("MODEL.REGIONSPOT.CLIP.FEATURES", features).recognizer
    feature_map = recognizer.vision_language.encode_images([as_inputs(0)["image"]])
    tokens = torch.randn(3, 32)
    maps = cross_attention(recognizer.knowledge_integration, tokens, feature_map)
    assert maps.shape == (3, 4, 4)
    total = maps.sum(dim=(1, 2))
    assert (total <= 1 + 1e-5).all() and (torch.allclose(total, torch.ones(3)) == (features == "feature_map"))
    chosen = cross_attention(recognizer.knowledge_integration, tokens, feature_map, [2])
    torch.testing.assert_close(chosen, maps[2:])


def test_cross_attention_needs_a_feature_map():
    recognizer = tiny_model("MODEL.REGIONSPOT.CLIP.FEATURES", "none").recognizer
    with pytest.raises(ValueError, match="no feature map"):
        cross_attention(recognizer.knowledge_integration, torch.randn(3, 32), torch.zeros(1, 16, 64))


def test_attention_is_bright_where_the_region_attends():
    image, attention = np.full((400, 800, 3), 100, np.uint8), np.zeros((4, 4))
    attention[3, 0] = 0.25  # bottom left
    drawing = draw_attention(image, attention, np.array([500, 50, 700, 150]))
    assert drawing.shape == (400, 800, 3) and drawing.dtype == np.uint8
    brightness = drawing.mean(axis=2)
    assert brightness[320:, :150].mean() > 120 > 60 > brightness[:200, 300:480].mean()
    assert drawing[50, 600].tolist() == drawing[100, 500].tolist() == [0, 229, 255]
    assert brightness[100, 600] < 60  # an outline, not an area


def test_small_images_are_enlarged():
    drawing = draw_attention(np.zeros((40, 80, 3), np.uint8), np.ones((2, 2)), np.array([70.0, 30, 90, 50]))
    assert drawing.shape == (200, 400, 3)
    assert drawing[150, 375].tolist() == [0, 229, 255]  # the box at five times the size, clipped
