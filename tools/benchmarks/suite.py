"""The benchmarks of the guide on this machine, each in a process of its own, and their tables in the guide."""

import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from tools.benchmarks.report import write_tables

BB, BL = "configs/RegionSpot-BB.yaml", "configs/RegionSpot-BL.yaml"
MINI = "projects/MiniWorld/configs/RegionSpot-mini.yaml"
FLOAT32 = "SOLVER.AMP.ENABLED False"
BF16 = "MODEL.REGIONSPOT.PRECISION bf16"
COMPILE = "MODEL.REGIONSPOT.COMPILE True"
ENCODER_BATCH = "MODEL.REGIONSPOT.SAM.ENCODER_BATCH_SIZE 16"
RELEASE = "TEST.DETECTIONS_PER_IMAGE 900"  # as many as the published release has

# Chosen for less than ten minutes on two cores: what takes longest, the plain way, is left out where it is slowest.
SUITES = {
    "cpu": [
        f"model --boxes 1 10 100 --whole 100 --repeats 1 --config-file {BL} {RELEASE}",
        f"model --boxes 100 300 1000 --whole 100 300 --plain-boxes 0 --repeats 1 --config-file {BL} {RELEASE} {BF16}",
        f"text --names 2 --repeats 2 --config-file {BB}",
        f"train --steps 5 --warm-up 1 --images 64 --repeats 2 --config-file {BB} SOLVER.IMS_PER_BATCH 4 {FLOAT32}",
        f"train --maps --steps 10 --warm-up 2 --images 128 --repeats 2 --config-file {BB} {FLOAT32}",
        f"extract --images 2 --plain-images 1 --config-file {BB}",
        f"proposals --repeats 2 --config-file {MINI}",
        f"proposals --points 6 --repeats 2 --config-file {BB}",
    ],
    "cuda": [
        f"model --boxes 1 10 100 300 1000 --plain-boxes 1000 --config-file {BL} {RELEASE}",
        f"model --boxes 1 10 100 300 1000 --plain-boxes 1000 --config-file {BL} {RELEASE} {BF16} {COMPILE}",
        f"model --batch 8 --boxes 10 100 300 --config-file {BL} {RELEASE} {BF16} {COMPILE} {ENCODER_BATCH}",
        f"text --names 20 --config-file {BB}",
        f"train --steps 100 --warm-up 20 --workers 14 --config-file {BL} {BF16} {COMPILE} SOLVER.IMS_PER_BATCH 512 "
        "INPUT.REDUCED_JPEG 224",
        f"train --maps --steps 100 --warm-up 20 --workers 8 --config-file {BL} SOLVER.IMS_PER_BATCH 64",
        f"extract --images 2048 --batch 16 --workers 14 --config-file {BL} {BF16} {COMPILE} {ENCODER_BATCH}",
        f"proposals --config-file {BB}",
    ],
}


def run_in_process(arguments: list[str]) -> None:
    """Run a benchmark in a process of its own, so that the memory is its own."""
    subprocess.run([sys.executable, "-m", "tools.benchmarks", *arguments], check=True, cwd=Path(__file__).parents[2])


def run_suite(
    commands: list[str], output: Path, document: Path, run: Callable[[list[str]], None] = run_in_process
) -> None:
    """Run benchmarks, and write their tables into a document.

    Args:
        commands: of ``python -m tools.benchmarks``, without ``--json``.
        output: directory of the JSON files.
        document: see ``tools.benchmarks.report``.
        run: runs one of them.
    """
    output.mkdir(parents=True, exist_ok=True)
    files = []
    for number, command in enumerate(commands, 1):
        name, *arguments = command.split()
        files.append((output / f"{number}-{name}.json").resolve())
        print(f"\n[{number}/{len(commands)}] python -m tools.benchmarks {command}", flush=True)
        run([name, "--json", str(files[-1]), *arguments])
    write_tables(document, files)


def main(args: Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run_suite(SUITES[device], args.output, args.document)
