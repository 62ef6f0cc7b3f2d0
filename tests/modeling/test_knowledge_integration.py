"""The trained module against PyTorch's own transformer, and its memory with many regions."""

import pytest
import torch
from torch import nn

from regionspot.config import load_config
from regionspot.modeling import knowledge_integration
from regionspot.modeling.knowledge_integration import KnowledgeIntegration

from ..helpers import ROOT, extra_memory, tiny_config

SIZES = {"token_dim": 8, "clip_width": 32, "text_dim": 16, "num_heads": 4, "ffn_dim": 48, "depth": 2}


def module(**arguments):
    torch.manual_seed(0)
    model = KnowledgeIntegration(**{**SIZES, **arguments})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def pytorch_decoder(model, with_features):
    """Return PyTorch's decoder with the weights of ``model``, whose keys must be PyTorch's."""
    arguments = (SIZES["clip_width"], SIZES["num_heads"], SIZES["ffn_dim"])
    norm = nn.LayerNorm(SIZES["clip_width"])
    if with_features:
        decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(*arguments, batch_first=True), 2, norm)
    else:
        layer = nn.TransformerEncoderLayer(*arguments, batch_first=True)
        decoder = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)
    decoder.load_state_dict(model.decoder.state_dict())
    return decoder.eval()


@pytest.mark.parametrize("max_queries", [3, 1024])
@pytest.mark.parametrize("region_attention", [True, False])
@pytest.mark.parametrize("with_features", [True, False])
def test_matches_pytorch_transformer(with_features, region_attention, max_queries, monkeypatch):
    monkeypatch.setattr(knowledge_integration, "MAX_QUERIES", max_queries)
    model = module(with_features=with_features, region_attention=region_attention)
    decoder = pytorch_decoder(model, with_features)
    tokens = [torch.randn(number, 8) for number in (5, 1, 0, 8)]
    feature_map = torch.randn(4, 7, 32) if with_features else None
    with torch.no_grad():
        results = model(tokens, feature_map)
    for i, result in enumerate(results):
        assert result.shape == (len(tokens[i]), 16)
        if not len(tokens[i]):
            continue
        x = model.to_clip(tokens[i])[None]
        mask = None if region_attention else ~torch.eye(x.shape[1], dtype=torch.bool)
        expected = decoder(x, feature_map[i : i + 1], tgt_mask=mask) if with_features else decoder(x, mask=mask)
        torch.testing.assert_close(result, model.projector(expected)[0], atol=1e-5, rtol=1e-5)


def test_gradients_match_pytorch_transformer(monkeypatch):
    monkeypatch.setattr(knowledge_integration, "MAX_QUERIES", 3)
    model = module(dropout=0.0)
    tokens, feature_map = torch.randn(7, 8), torch.randn(1, 7, 32)
    model([tokens], feature_map)[0].square().sum().backward()
    decoder = pytorch_decoder(model, True)
    model.projector(decoder(model.to_clip(tokens)[None].detach(), feature_map))[0].square().sum().backward()
    expected = dict(decoder.named_parameters())
    for name, parameter in model.decoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("with_features", "region_attention"), [(True, True), (True, False), (False, True)])
def test_memory_is_linear_in_regions(with_features, region_attention):
    model = module(with_features=with_features, region_attention=region_attention)
    tokens, feature_map = torch.randn(3500, 8), torch.randn(2, 7, 32) if with_features else None
    with torch.no_grad():
        used = extra_memory(lambda: model([tokens, tokens[:3]], feature_map))
    assert used < 40e6  # a table of all pairs is 49 MB a head, and a mask of them 49 MB as well


def test_dropout_is_applied_in_training_only():
    model = module(dropout=0.5)
    tokens, feature_map = [torch.randn(4, 8)], torch.randn(1, 7, 32)
    assert torch.equal(model(tokens, feature_map)[0], model(tokens, feature_map)[0])
    model.train()
    assert not torch.allclose(model(tokens, feature_map)[0], model(tokens, feature_map)[0], atol=1e-3)


@pytest.mark.parametrize(("features", "norms"), [("none", 2), ("feature_map", 3)])
def test_settings_reach_the_layers(features, norms):
    keys = {"DEPTH": 2, "NUM_HEADS": 2, "FFN_DIM": 96, "DROPOUT": 0.3}
    overrides = [part for key, value in keys.items() for part in (f"MODEL.REGIONSPOT.INTEGRATION.{key}", value)]
    cfg = tiny_config(*overrides, "MODEL.REGIONSPOT.CLIP.FEATURES", features)
    layers = KnowledgeIntegration(cfg, token_dim=32, clip_width=64, text_dim=32).decoder.layers
    kinds = [(m.num_heads, m.dropout) for m in layers.modules() if isinstance(m, nn.MultiheadAttention)]
    assert kinds == [(2, 0.3)] * 2 * (norms - 1)
    assert len(layers) == 2 and {layer.linear1.out_features for layer in layers} == {96}
    assert sum(isinstance(m, nn.LayerNorm) for m in layers.modules()) == 2 * norms
    assert {m.p for m in layers.modules() if isinstance(m, nn.Dropout)} == {0.3}


@pytest.mark.parametrize("depth", [0, 2**70])
def test_impossible_depth_is_refused(depth):
    with pytest.raises(ValueError, match="expected DEPTH of 1 to 100"):
        module(depth=depth)


def test_sizes_default_to_the_paper():
    node = load_config(ROOT / "configs/RegionSpot-BB.yaml").MODEL.REGIONSPOT.INTEGRATION
    assert (node.DEPTH, node.NUM_HEADS, node.FFN_DIM, node.DROPOUT) == (3, 8, 2048, 0.1)
