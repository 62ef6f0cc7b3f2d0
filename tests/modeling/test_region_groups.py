"""Grouping of images by their numbers of regions."""

import pytest
import torch

from regionspot.modeling import region_groups
from regionspot.modeling.region_groups import RegionGroups


@pytest.mark.parametrize("lengths", [[3], [2, 2], [5, 1, 0, 8], [0, 0, 1], [1, 40, 3, 2, 39, 0, 7]], ids=str)
def test_what_is_padded_comes_back(lengths):
    groups, regions = RegionGroups(lengths, torch.device("cpu")), torch.randn(sum(lengths), 2, 3)
    assert groups.longest == max(lengths)
    assert torch.equal(groups.unpad(groups.pad(regions)), regions)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [5, 1, 0, 8], [1, 40, 3, 2, 39, 0, 7]], ids=str)
def test_each_row_has_the_regions_of_its_image(lengths):
    owners = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    groups, seen = RegionGroups(lengths, torch.device("cpu")), []
    for i, (padded, mask) in enumerate(zip(groups.pad(owners), groups.masks)):
        images = groups.select(torch.arange(len(lengths)), i)
        is_region = torch.ones_like(padded, dtype=torch.bool) if mask is None else mask[:, 0, 0]
        assert torch.equal(padded, images[:, None].expand_as(padded))
        assert is_region.sum(dim=1).tolist() == [lengths[image] for image in images]
        assert padded.numel() <= 2 * is_region.sum()
        seen += images.tolist()
    assert sorted(seen) == [image for image, length in enumerate(lengths) if length]


def test_large_images_are_groups_of_their_own(monkeypatch):
    monkeypatch.setattr(region_groups, "MAX_PADDED", 6)
    groups = RegionGroups([7, 6, 8, 5], torch.device("cpu"))
    assert [x.shape[:2] for x in groups.pad(torch.zeros(26, 1))] == [(1, 8), (1, 7), (2, 6)]
