import pytest


@pytest.fixture(scope="session")
def overrides(tmp_path_factory):
    """The config overrides that choose each of MEMBERS."""
    from .members import write_members

    return write_members(tmp_path_factory.mktemp("members"))
