"""The heart of it: a RegionSpot-BB from a file in the released layout computes the golden numbers."""

import numpy as np
import pytest

from .golden_numbers import EXPECTED, NAMES, compute


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("golden")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGIONSPOT_CACHE", str(directory))
        return compute(directory, "cpu")


@pytest.mark.parametrize("name", NAMES)
def test_agrees_to_a_thousandth_of_the_spread(computed, name):
    expected = EXPECTED[name]
    assert computed[name].shape == expected.shape
    assert np.abs(computed[name] - expected).max() <= 1e-3 * np.ptp(expected)


def test_classes_and_mask_areas_agree(computed):
    assert computed["classes"].tolist() == EXPECTED["classes"].tolist()
    np.testing.assert_allclose(computed["mask_area"], EXPECTED["mask_area"], rtol=0.005)
