"""Writes the report of evaluations as one HTML file."""

from argparse import Namespace
from collections.abc import Sequence

from tqdm import tqdm

from regionspot.checkpoint.checkpointer import load_model
from regionspot.config import load_config
from regionspot.report import AttentionMaps, Run, write_report
from regionspot.utils.command_line import printable


def main(args: Namespace) -> None:
    def progress(runs: Sequence[Run]) -> tqdm:
        return tqdm(runs, desc="evaluations", unit="run", disable=len(runs) == 1)

    attend = (
        AttentionMaps(load_model(load_config(args.config_file, args.opts)).recognizer) if args.config_file else None
    )
    write_report(args.evaluations, args.output, args.worst, args.images, attend, progress)
    size = args.output.stat().st_size / 1e6
    print(f"{printable(args.output)}: {size:.1f} MB, opens in any browser without a network")
