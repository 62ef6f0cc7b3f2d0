"""Starting processes on the device of the loaded config, also on machines with GPUs."""

import json
import os
import runpy
import sys
from argparse import Namespace
from functools import partial

import pytest
import torch
from torch import distributed

from regionspot.engine import launch

from ..helpers import ROOT, TINY, load_program

NO_DATA = "DATASETS: {TRAIN: [], TEST: []}\n"


@pytest.fixture
def two_gpus(monkeypatch):
    """Pretend that this machine has two GPUs, unless the environment hides them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    visible = lambda: os.environ["CUDA_VISIBLE_DEVICES"] != ""  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 if visible() else 0)


def write_backend(args):
    path = args.directory / str(distributed.get_rank())
    path.write_text(json.dumps([distributed.get_backend(), os.environ["CUDA_VISIBLE_DEVICES"]]))


def test_cpu_processes_use_gloo_beside_gpus(two_gpus, tmp_path, monkeypatch):
    forked = partial(torch.multiprocessing.start_processes, start_method="fork")  # saves the imports
    monkeypatch.setattr(torch.multiprocessing, "start_processes", forked)
    args = Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto", directory=tmp_path)
    launch(write_backend, args, "cpu")
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in (0, 1)] == [["gloo", ""]] * 2


@pytest.mark.parametrize(
    ("tool", "config"),
    [
        ("tools/train_net.py", f"_BASE_: {TINY}\n"),
        ("projects/RegionSpotRCNN/train_net.py", f"_BASE_: {ROOT}/tests/tiny_rcnn.yaml\n{NO_DATA}"),
        ("projects/RegionSpotDense/train_net.py", "train = dict(device='cpu', output_dir='out')\n"),
    ],
)
def test_device_from_config_file(two_gpus, tmp_path, monkeypatch, tool, config):
    backends = []

    def reached(*_):
        backends.append(distributed.get_backend())
        raise KeyboardInterrupt

    path = tmp_path / ("config.py" if "train = " in config else "config.yaml")
    path.write_text(config)  # the base says cpu
    group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "TORCHELASTIC_RUN_ID": "test"}
    group |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    for name, value in group.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("regionspot_cli.train.set_up_run", reached)
    for module in (ROOT / tool).parent.glob("*_training.py"):  # a project's work, imported from beside the script
        monkeypatch.setitem(sys.modules, module.stem, load_program(module))
        monkeypatch.setattr(sys.modules[module.stem], "set_up_run", reached)
    monkeypatch.setattr("detectron2.utils.comm._LOCAL_PROCESS_GROUP", None)
    monkeypatch.setattr(sys, "argv", [tool, "--config-file", str(path)])
    monkeypatch.chdir(tmp_path)
    try:
        with pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / tool), run_name="__main__")
        assert backends == ["gloo"]
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def test_more_processes_than_gpus_are_refused(two_gpus):
    with pytest.raises(ValueError, match="3 processes on cuda: this machine has 2 GPUs; start as many, or"):
        launch(write_backend, Namespace(num_gpus=3), "cuda")
