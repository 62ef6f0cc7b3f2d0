import os
import signal

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests run on the CPU wherever they run; before CUDA is looked for
os.environ["OMP_NUM_THREADS"] = "1"  # networks as small as these are faster so, and forked processes need it

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from regionspot.data import register_json_dataset

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background


@pytest.fixture(autouse=True, scope="session")
def session_cache(tmp_path_factory):
    """Keep what fixtures of whole modules cache apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGIONSPOT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def cache_directory(tmp_path_factory, monkeypatch):
    """Keep each test's cache apart from the user's and from the others'."""
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("REGIONSPOT_CACHE", str(directory))
    return directory


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
