"""Starting a run on one process or many: Detectron2's ``launch``, and ``torchrun``."""

import argparse
import multiprocessing
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch import distributed

from regionspot.utils.command_line import run_process
from regionspot.utils.signals import Interrupted, forwarded_to_children


def launch(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace, device: str) -> None:
    """Run ``main(args)`` in as many processes as were asked for, on GPUs or on CPUs.

    Under ``torchrun`` the processes are there already: each joins the group that the environment describes. Else
    they are started as Detectron2's arguments (``--num-gpus``, ``--num-machines``, ...) say.

    Args:
        main: what a process does.
        args: of the command line.
        device: of the loaded config, such as its ``MODEL.DEVICE``: with "cpu" no process sees a GPU, and they are
            joined by gloo instead of NCCL.

    Raises:
        ValueError: more processes than GPUs.
    """
    on_gpu = torch.device(device).type == "cuda"
    if not on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # wherever Detectron2 sees a GPU it joins processes by NCCL
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        check_gpus(args.num_gpus, device)
        machines = (args.num_machines, args.machine_rank)
        several = args.num_gpus * args.num_machines > 1  # else it runs in this process, which handles signals itself
        with forwarded_to_children() if several else nullcontext():
            detectron2_launch(_run, args.num_gpus, *machines, dist_url=args.dist_url, args=(main, args))
        return
    check_gpus(int(os.environ["LOCAL_WORLD_SIZE"]), device)
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    _run(main, args)


def _run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    fork_workers()
    try:  # one process of several tells the first what went wrong; one alone raises it
        result = run_process(main, args) if comm.get_world_size() > 1 else main(args)
    except Interrupted:  # all processes agreed on it
        if distributed.is_initialized():
            distributed.destroy_process_group()
        raise
    if distributed.is_initialized():  # a process that leaves with the group's threads at work may be aborted
        comm.synchronize()
        distributed.destroy_process_group()
    return result


def check_gpus(processes: int, device: str) -> None:
    """Refuse more ``processes`` on this machine than it has GPUs, where ``device`` is one."""
    if torch.device(device).type == "cuda" and processes > torch.cuda.device_count():
        raise ValueError(
            f"{processes} processes on {device}: this machine has {torch.cuda.device_count()} GPUs; start as many, or "
            "set MODEL.DEVICE cpu"
        )


def fork_workers() -> None:
    """Let loader workers be forked, to share the annotations; in a spawned process Python would spawn them."""
    if "fork" in multiprocessing.get_all_start_methods():
        multiprocessing.set_start_method("fork", force=True)
