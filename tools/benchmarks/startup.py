"""What ``import regionspot`` costs and what of it is RegionSpot's own, and how soon a command answers ``--help``."""

import re
import subprocess
import sys
import time
from argparse import Namespace

from tabulate import tabulate

IMPORT = [sys.executable, "-X", "importtime", "-c", "import regionspot"]
HELP = [sys.executable, "-m", "regionspot_cli", "train", "--help"]


def time_imports() -> tuple[float, float]:
    """Return the seconds of ``import regionspot`` in a new process, and those in RegionSpot's own modules."""
    report = subprocess.run(IMPORT, check=True, capture_output=True, text=True).stderr
    rows = re.findall(r"import time: +(\d+) \| +(\d+) \| +(\S+)", report)  # microseconds: of the module itself, in all
    own = sum(int(itself) for itself, _, module in rows if module.split(".")[0] == "regionspot")
    [whole] = [int(total) for _, total, module in rows if module == "regionspot"]
    return whole / 1e6, own / 1e6


def time_help() -> float:
    """Return the seconds of a command's ``--help``."""
    start = time.perf_counter()
    subprocess.run(HELP, check=True, capture_output=True)
    return time.perf_counter() - start


def main(args: Namespace) -> None:
    whole, own = min(time_imports() for _ in range(args.repeats))
    rows = [
        ("import regionspot", f"{whole:.2f} s"),
        ("of it RegionSpot's own modules", f"{own:.2f} s"),
        ("regionspot train --help", f"{min(time_help() for _ in range(args.repeats)):.2f} s"),
    ]
    print(tabulate(rows, headers=["start-up", "time"], disable_numparse=True))
