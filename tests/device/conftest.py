import pytest

from ..simulated_device import simulated_device


@pytest.fixture(autouse=True)
def device():
    """Let MODEL.DEVICE meta be a simulated accelerator."""
    with simulated_device() as device:
        yield device
