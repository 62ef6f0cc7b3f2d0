"""MODEL.REGIONSPOT.COMPILE: the same model, captured as graphs; no compiler is needed here."""

import copy
from functools import partial

import pytest
import torch

from ..helpers import as_inputs, tiny_model

SIZES = [(48, 64), (60, 40), (50, 50)]


@pytest.fixture
def captured(monkeypatch):
    """Compile without the machine's compiler; return the graphs that were captured."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    return graphs


def batch(sizes=SIZES):
    return [as_inputs(i, size) for i, size in enumerate(sizes)]


def test_same_keys_and_detections(captured):
    plain, compiled = tiny_model(), tiny_model("MODEL.REGIONSPOT.COMPILE", True)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    compiled.load_state_dict(plain.state_dict())
    for images in (batch(), batch(SIZES[:1]), batch()):  # batches of other sizes, too
        for one, other in zip(plain(images), compiled(images)):
            torch.testing.assert_close(one["instances"].scores, other["instances"].scores, atol=1e-5, rtol=0)
    encoders = [graph for graph in captured if "scaled_dot_product_attention" in graph.code]
    norms = [graph for graph in captured if "layer_norm" in graph.code and graph not in encoders]
    assert encoders and norms  # both encoders' blocks, and what follows the attention module's


def test_same_gradients_and_copies(captured):
    losses, gradients = [], []
    for is_compiled in (False, True):
        overrides = ("MODEL.REGIONSPOT.COMPILE", is_compiled, "MODEL.REGIONSPOT.INTEGRATION.DROPOUT", 0.0)
        model = copy.deepcopy(tiny_model(*overrides)).train()
        loss = model(batch())["loss_cls"]
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in model.recognizer.knowledge_integration.parameters()])
    assert captured
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)
