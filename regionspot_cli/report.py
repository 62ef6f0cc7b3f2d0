"""Writes the report of evaluations as one HTML file."""

from argparse import Namespace
from collections.abc import Sequence

from tqdm import tqdm

from regionspot.report import Run, write_report
from regionspot.utils.command_line import printable


def main(args: Namespace) -> None:
    def progress(runs: Sequence[Run]) -> tqdm:
        return tqdm(runs, desc="evaluations", unit="run", disable=len(runs) == 1)

    write_report(args.evaluations, args.output, args.worst, args.images, progress=progress)
    size = args.output.stat().st_size / 1e6
    print(f"{printable(args.output)}: {size:.1f} MB, opens in any browser without a network")
