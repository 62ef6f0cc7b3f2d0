"""What holds for all tests. It imports no PyTorch: pytest-xdist's main process, which runs no test, starts at once."""

import gc
import itertools
import os
import signal
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests run on the CPU wherever they run; before CUDA is looked for
os.environ["OMP_NUM_THREADS"] = "1"  # networks as small as these are faster so, and forked processes need it
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background

NUMBERS = itertools.count()
# Files that take longest, the longest first: they train models, start processes, or build full-size networks.
SLOW = [
    "miniworld/test_miniature.py",
    "engine/test_train_net.py",
    "projects/test_rcnn.py",
    "prediction/test_ray_map.py",
    "prediction/test_run.py",
    "test_docs.py",
    "test_golden.py",
    "app/test_browser.py",
    "engine/test_trainer.py",
    "engine/test_oracle.py",
    "engine/test_stop.py",
    "projects/test_miniworld_detection.py",
    "projects/test_dense.py",
    "engine/test_evaluate.py",
    "tools/test_benchmark.py",
    "device/test_miniworld.py",
    "device/test_training.py",
    "device/test_inference.py",
    "device/test_benchmark.py",
    "modeling/test_meta_arch.py",
    "modeling/roi_heads/test_roi_heads.py",
    "test_serve.py",
    "export/test_onnx.py",
    "export/test_modules.py",
    "tools/test_gpu_check.py",
    "test_package.py",
    "data/coco_io/test_results.py",
    "checkpoint/test_checkpointer.py",
    "data/tokens/test_store.py",
    "engine/test_train_loop.py",
    "data/test_proposal_damage.py",
    "evaluation/test_prediction_log.py",
    "engine/test_schedule.py",
    "app/test_command.py",
    "utils/test_command_line.py",
    "report/test_report.py",
    "prediction/test_outputs.py",
    "engine/test_token_transfer.py",
    "checkpoint/test_fetch.py",
    "tools/test_visualize.py",
    "tools/test_find.py",
    "modeling/localizers/test_transformers_sam.py",
    "modeling/vision_language/test_open_clip.py",
    "modeling/test_compile.py",
    "data/tokens/test_jitter.py",
    "miniworld/test_world.py",
    "engine/test_region_logs.py",
    "projects/test_guide.py",
]


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Import the modules without garbage collection, and keep what they made out of all later ones."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of slow files, and start with them, so that no worker is left with one at the end."""
    order = {Path(__file__).parent / name: position for position, name in enumerate(SLOW)}
    for item in items:
        if item.path in order:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(autouse=True, scope="session")
def session_cache(tmp_path_factory):
    """Keep what fixtures of whole modules cache apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGIONSPOT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def cache_directory(tmp_path_factory, monkeypatch):
    """Keep each test's cache apart from the user's and from the others'."""
    directory = tmp_path_factory.getbasetemp() / "caches" / str(next(NUMBERS))  # mktemp would list all others first
    directory.mkdir(parents=True)
    monkeypatch.setenv("REGIONSPOT_CACHE", str(directory))
    return directory


@pytest.fixture
def register():
    """Return a function that registers data sets as ``register_json_dataset`` does; they are forgotten afterwards."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from regionspot.data import register_json_dataset

    names = []

    def add(name, *args, **kwargs):
        names.append(name)
        register_json_dataset(name, *args, **kwargs)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
