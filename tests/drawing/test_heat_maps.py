import numpy as np
import pytest
import torch

from regionspot.drawing import draw_attention, draw_sheet
from regionspot.modeling.attention_maps import cross_attention

from ..helpers import as_inputs, tiny_model


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
    assert drawing.shape == (300, 600, 3)
    assert drawing[225, 560].tolist() == [0, 229, 255]  # the box at 7.5 times the size, clipped


def test_sheet_holds_all_images_in_order():
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    cells = [(np.full((60, 60, 3), color, np.uint8), f"title $ {k}") for k, color in enumerate(colors)]
    sheet = draw_sheet(cells, columns=2)
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3
    centers = []
    for color in colors:
        rows, columns = np.nonzero((sheet == color).all(axis=2))
        assert len(rows) > 50_000
        centers.append((rows.mean(), columns.mean()))
    (y0, x0), (y1, x1), (y2, x2) = centers
    assert y0 == pytest.approx(y1, abs=2) and y2 > y0 + 300 and x1 > x0 + 300 and x2 == pytest.approx(x0, abs=2)
