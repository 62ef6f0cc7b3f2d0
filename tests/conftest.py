import pytest


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """Keep each test's cache apart from the user's and from the others'."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("REGIONSPOT_CACHE", str(folder))
    return folder
