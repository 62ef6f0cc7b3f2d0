import pytest
import torch
from torch.nn import functional as F

from regionspot.modeling.losses import region_focal_loss


def plain_focal_loss(logits, target, alpha, gamma):
    """Lin et al. 2017, equation 5, one number at a time."""
    total = 0.0
    for row, label in zip(logits.tolist(), target.tolist()):
        for k, x in enumerate(row):
            p = 1 / (1 + torch.tensor(-x, dtype=torch.float64).exp().item())
            p_t, a_t = (p, alpha) if k == label else (1 - p, 1 - alpha)
            total -= a_t * (1 - p_t) ** gamma * torch.tensor(p_t, dtype=torch.float64).log().item()
    return total / len(logits)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(n, 5, generator=generator) * 3 for n in (4, 1, 7)]
    return logits, [torch.randint(5, (len(x),), generator=generator) for x in logits]


def test_equals_plain_implementation(batch):
    expected = sum(plain_focal_loss(x, y, 0.25, 2.0) for x, y in zip(*batch)) / 3
    assert region_focal_loss(*batch).item() == pytest.approx(expected, rel=1e-5)


def test_gamma_zero_is_weighted_cross_entropy(batch):
    expected = 0.0
    for x, y in zip(*batch):
        one_hot = F.one_hot(y, 5).float()
        weight = 0.25 * one_hot + 0.75 * (1 - one_hot)
        expected += F.binary_cross_entropy_with_logits(x, one_hot, weight, reduction="sum").item() / len(y) / 3
    assert region_focal_loss(*batch, gamma=0.0).item() == pytest.approx(expected, rel=1e-5)


def test_image_without_regions_adds_nothing(batch):
    logits, targets = batch
    with_empty = region_focal_loss([*logits, torch.zeros(0, 5)], [*targets, torch.zeros(0, dtype=torch.int64)])
    assert with_empty.item() == pytest.approx(region_focal_loss(logits, targets).item() * 3 / 4, rel=1e-6)


def test_autocast_changes_nothing(batch):
    expected = region_focal_loss(*batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(region_focal_loss(*batch), expected)
