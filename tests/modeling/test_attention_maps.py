"""Attention weights against those of PyTorch's own modules, in float64."""

import pytest
import torch
from torch import nn

from regionspot.modeling.attention_maps import cross_attention_weights
from regionspot.modeling.knowledge_integration import KnowledgeIntegration

SIZES = {"token_dim": 8, "clip_width": 32, "text_dim": 16, "num_heads": 4, "ffn_dim": 48, "depth": 3}


def module(**arguments):
    torch.manual_seed(0)
    model = KnowledgeIntegration(**{**SIZES, **arguments}).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def pytorch_weights(model, tokens, feature_map, layer, region_attention):
    """Return the weights that PyTorch's decoder, with the same parameters, has in a layer."""
    arguments = (SIZES["clip_width"], SIZES["num_heads"], SIZES["ffn_dim"])
    norm = nn.LayerNorm(SIZES["clip_width"])
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(*arguments, batch_first=True), 3, norm).double().eval()
    decoder.load_state_dict(model.decoder.state_dict())
    calls = []
    attention = decoder.layers[layer].multihead_attn
    attention.register_forward_hook(lambda module, args, output: calls.append(args[0]))
    mask = None if region_attention else ~torch.eye(len(tokens), dtype=torch.bool)
    with torch.no_grad():
        output = decoder(model.to_clip(tokens)[None], feature_map, tgt_mask=mask)
        _, weights = attention(calls[0], feature_map, feature_map, need_weights=True, average_attn_weights=False)
    return weights[0], output[0]


@pytest.mark.parametrize("region_attention", [True, False])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_weights_match_multihead_attention(layer, region_attention):
    model = module(region_attention=region_attention)
    tokens, feature_map = torch.randn(5, 8).double(), torch.randn(1, 10, 32).double()
    expected, _ = pytorch_weights(model, tokens, feature_map, layer, region_attention)
    weights = cross_attention_weights(model, tokens, feature_map, layer=layer)
    assert weights.shape == (4, 5, 10)
    torch.testing.assert_close(weights, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, 5).double(), atol=1e-12, rtol=0)
    chosen = cross_attention_weights(model, tokens, feature_map, [3, 1], layer)
    torch.testing.assert_close(chosen, weights[:, [3, 1]], atol=1e-12, rtol=0)


def test_model_without_features_is_refused():
    with pytest.raises(ValueError, match="no feature map"):
        cross_attention_weights(module(with_features=False), torch.randn(3, 8).double(), torch.zeros(1, 10, 32))


def test_compiled_module_has_the_same_weights():
    """A compiled function calls no hooks of the modules that it was compiled with."""
    model = module()
    tokens, feature_map = torch.randn(5, 8).double(), torch.randn(1, 10, 32).double()
    expected = cross_attention_weights(model, tokens, feature_map)

    def without_hooks(x, change, norm, dropout):
        return nn.functional.layer_norm(x + dropout(change), norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    for layer in model.decoder.layers:
        layer.residual = without_hooks
    torch.testing.assert_close(cross_attention_weights(model, tokens, feature_map), expected, atol=1e-12, rtol=0)
    assert all(layer.residual is without_hooks for layer in model.decoder.layers)
