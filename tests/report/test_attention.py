"""Attention maps in the report, of a tiny model."""

import base64
import io

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes
from PIL import Image

from regionspot.drawing import draw_attention
from regionspot.modeling.attention_maps import cross_attention
from regionspot.report.attention import AttentionMaps
from regionspot.report.panels import make_panel
from regionspot.report.worst_images import ImageErrors, Region

from ..helpers import draw_scene, tiny_model


def errors_of(boxes, kinds):
    """Return an image whose objects are the (N, 4) XYXY ``boxes``."""
    objects = [
        Region((x0, y0, x1 - x0, y1 - y0), f"object {k}", kind)
        for k, ((x0, y0, x1, y1), kind) in enumerate(zip(boxes.tolist(), kinds))
    ]
    return ImageErrors(7, "scene.png", (48, 64), 1, 0, objects)


def decode(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))))


def test_maps_are_those_of_the_objects(tmp_path):
    recognizer = tiny_model().recognizer
    array, boxes, _ = draw_scene(3)
    assert len(boxes) >= 3
    image = errors_of(boxes, ["right", "right", "missed", "right"])
    maps = AttentionMaps(recognizer)(array, image)
    assert [x.caption for x in maps] == ["object 2", "object 0", "object 1", "object 3"][: len(boxes)]
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    with torch.no_grad():
        [tokens] = recognizer.position_tokens([tensor], [Boxes(torch.from_numpy(boxes))])
        feature_map = recognizer.vision_language.encode_images([tensor])
        weights = cross_attention(recognizer.knowledge_integration, tokens, feature_map)[2].numpy()
    expected = Image.fromarray(draw_attention(array, weights, boxes[2]))
    expected.thumbnail((320, 320), Image.Resampling.LANCZOS)
    assert np.abs(decode(maps[0].data).astype(int) - np.asarray(expected)).mean() < 4  # JPEG

    Image.fromarray(array).save(tmp_path / "scene.png")
    panel = make_panel(image, str(tmp_path), AttentionMaps(recognizer))
    assert [x.data for x in panel.attention] == [x.data for x in maps] and not panel.problem


def test_image_without_objects():
    assert AttentionMaps(tiny_model().recognizer)(draw_scene(0)[0], ImageErrors(1, "a.png", (48, 64), 0, 1)) == []


def test_model_without_features_is_refused():
    with pytest.raises(ValueError, match="no feature map to attend to"):
        AttentionMaps(tiny_model("MODEL.REGIONSPOT.CLIP.FEATURES", "none").recognizer)
