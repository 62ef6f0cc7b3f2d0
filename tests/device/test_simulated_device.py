"""The simulated accelerator refuses and takes what CUDA does, and differentiates."""

import numpy as np
import pytest
import torch

from ..simulated_device import MixedDevicesError, SimulatedTensor


def test_device_refuses_what_cuda_refuses(device):
    there, here = torch.arange(3.0).to(device), torch.ones(3)
    assert there.device == device and (2 * there).tolist() == [0, 2, 4] and here.device.type == "cpu"
    for mix in (
        lambda: there + here,
        lambda: here[there.long()],
        lambda: here.add_(there[0]),
        lambda: torch.stack([there[0], torch.tensor(1.0)]),
        lambda: there.masked_scatter_(there > 0, here),
        lambda: torch.from_numpy(np.ones(3, np.float32)) * there,
        lambda: there.index_put_((torch.tensor([0]),), here[:1]),
        lambda: torch.nn.functional.linear(there[None], here[None]),
        lambda: torch.full((), 2.0).add_(there.sum()),
    ):
        with pytest.raises(MixedDevicesError):
            mix()
    for bridge in (np.asarray, SimulatedTensor.numpy, lambda x: np.add(x, 1)):
        with pytest.raises(TypeError, match="numpy"):
            bridge(there)


def test_device_takes_what_cuda_takes(device):
    there = torch.tensor([1.0, 2.0, 3.0], device=device)
    assert there[torch.tensor([0, 2])].tolist() == [1, 3] and there[torch.tensor([True, False, True])].tolist() == [
        1,
        3,
    ]
    assert (there * torch.tensor(2.0)).tolist() == [2, 4, 6] and (torch.tensor(2.0) * there).device == device
    assert torch.tensor([there[0], there[1] + 1]).tolist() == [1, 3]
    here = torch.zeros(3)
    here.copy_(there)
    there[1:] += 1  # a view shares its values
    assert here.tolist() == there.cpu().tolist()[:1] + [2, 3] and there.tolist() == [1, 3, 4]
    assert there.new_zeros(1).device == torch.zeros_like(there).device == torch.ones(1, device=device).device == device
    assert f"{there[0]:.1f}" == "1.0" and int(there[0]) == 1 and bool(there[0])


def test_device_differentiates(device):
    torch.manual_seed(0)
    layer, inputs = torch.nn.Linear(3, 2), torch.randn(4, 3)
    gradients = []
    for place in ("cpu", device):
        layer.zero_grad()
        layer.to(place)(inputs.to(place))[1:].square().sum().backward()
        gradients.append(layer.weight.grad.cpu())
    assert isinstance(layer.weight.grad, SimulatedTensor) and torch.equal(*gradients)
