"""Starting a run on one process or many: Detectron2's ``launch``, and ``torchrun``."""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch import distributed

from regionspot.utils.command_line import Interrupted, install_handlers, restore_handlers, run_process


def launch(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace, device: str) -> None:
    """Run ``main(args)`` in as many processes as were asked for, on GPUs or on CPUs.

    Under ``torchrun`` the processes exist already: each joins the group that the environment describes. Otherwise
    they are started as Detectron2's arguments (``--num-gpus``, ``--num-machines``, ...) say.

    With the ``device`` "cpu" no process sees a GPU, and gloo joins them instead of NCCL.

    Raises:
        ValueError: more processes than GPUs.
    """
    on_gpu = torch.device(device).type == "cuda"
    if not on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Detectron2 takes NCCL whenever it sees a GPU
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        check_gpus(args.num_gpus, device)
        machines = (args.num_machines, args.machine_rank)
        # A single process is this one, which handles signals itself.
        has_children = args.num_gpus * args.num_machines > 1
        with _signals_forwarded() if has_children else nullcontext():
            detectron2_launch(_run, args.num_gpus, *machines, dist_url=args.dist_url, args=(main, args))
        return
    check_gpus(int(os.environ["LOCAL_WORLD_SIZE"]), device)
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    _run(main, args)


def _run(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    fork_workers()  # in each process: a spawned one inherits "spawn" as its start method
    try:
        result = run_process(main, args) if comm.get_world_size() > 1 else main(args)
    except Interrupted:  # in all processes at once
        if distributed.is_initialized():
            distributed.destroy_process_group()
        raise
    if distributed.is_initialized():
        comm.synchronize()  # a process that exits while the group's threads are busy may be aborted
        distributed.destroy_process_group()
    return result


@contextmanager
def _signals_forwarded() -> Iterator[None]:
    """Forward signals to the processes that are started, and joined, inside the block; then raise Interrupted."""
    received: list[int] = []

    def forward(number: int, _: Any) -> None:
        received.append(number)
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, number)

    previous = install_handlers(forward)
    try:
        yield
    except Exception as error:
        if received:  # the processes failed because the signal ended them
            raise Interrupted(number=received[0]) from error
        raise
    finally:
        restore_handlers(previous)
    if received:
        raise Interrupted(number=received[0])


def check_gpus(processes: int, device: str) -> None:
    """Refuse more ``processes`` than this machine has GPUs, if ``device`` is one."""
    if torch.device(device).type == "cuda" and processes > torch.cuda.device_count():
        raise ValueError(
            f"{processes} processes on {device}: this machine has {torch.cuda.device_count()} GPUs; start as many, or "
            "set MODEL.DEVICE cpu"
        )


def fork_workers() -> None:
    """Fork loader workers, so that they share the annotations; a spawned process would spawn them."""
    if "fork" in multiprocessing.get_all_start_methods():
        multiprocessing.set_start_method("fork", force=True)
