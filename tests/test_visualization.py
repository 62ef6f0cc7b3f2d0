import pytest
import torch

from regionspot.visualization import cross_attention

from .helpers import as_inputs, tiny_model


@pytest.mark.parametrize("features", ["feature_map", "feature_map+class_token"])
def test_cross_attention_of_the_last_layer(features):
    recognizer = tiny_model("MODEL.REGIONSPOT.CLIP.FEATURES", features).recognizer
    feature_map = recognizer.vision_language.encode_images([as_inputs(0)["image"]])
    maps = cross_attention(recognizer.knowledge_integration, torch.randn(3, 32), feature_map)
    assert maps.shape == (3, 4, 4)
    total = maps.sum(dim=(1, 2))
    assert (total <= 1 + 1e-5).all() and (torch.allclose(total, torch.ones(3)) == (features == "feature_map"))
    assert not recognizer.knowledge_integration.decoder.layers[-1].multihead_attn._forward_hooks


def test_cross_attention_needs_a_feature_map():
    recognizer = tiny_model("MODEL.REGIONSPOT.CLIP.FEATURES", "none").recognizer
    with pytest.raises(ValueError, match="no feature map"):
        cross_attention(recognizer.knowledge_integration, torch.randn(3, 32), torch.zeros(1, 16, 64))
