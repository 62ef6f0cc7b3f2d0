"""Starting a run on one process or many: Detectron2's ``launch``, and ``torchrun``."""

import argparse
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch import distributed


def launch(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Run ``main(args)`` in as many processes as were asked for, on GPUs or, without CUDA, on CPUs.

    Under ``torchrun`` the processes are there already: each joins the group that the environment describes. Else
    they are started as Detectron2's arguments (``--num-gpus``, ``--num-machines``, ...) say.
    """
    if "cpu" in args.opts[1::2] and "MODEL.DEVICE" in args.opts[::2]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else the processes would be joined by NCCL
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        machines = (args.num_machines, args.machine_rank)
        detectron2_launch(_run, args.num_gpus, *machines, dist_url=args.dist_url, args=(main, args))
        return
    local_rank, on_gpu = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    _run(main, args)


def _run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    fork_workers()
    result = main(args)
    if distributed.is_initialized():  # a process that leaves with the group's threads at work may be aborted
        comm.synchronize()
        distributed.destroy_process_group()
    return result


def fork_workers() -> None:
    """Let loader workers be forked, to share the annotations; in a spawned process Python would spawn them."""
    if "fork" in multiprocessing.get_all_start_methods():
        multiprocessing.set_start_method("fork", force=True)
