import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests run on the CPU wherever they run; before CUDA is looked for

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from regionspot.data import register_json_dataset


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch):
    """Keep each test's cache apart from the user's and from the others'."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("REGIONSPOT_CACHE", str(folder))
    return folder


@pytest.fixture
def register():
    """Return a function that registers data sets as ``register_json_dataset`` does; they are forgotten afterwards."""
    names = []

    def add(name, *args, **kwargs):
        names.append(name)
        register_json_dataset(name, *args, **kwargs)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
