"""Writes the report of evaluations as one HTML file."""

from argparse import Namespace

from tqdm import tqdm

from regionspot.checkpoint.checkpointer import load_model
from regionspot.config import load_config
from regionspot.report import AttentionMaps, write_report
from regionspot.report.analysis import STAGES
from regionspot.utils.command_line import printable


def main(args: Namespace) -> None:
    attend = None
    if args.config_file:
        attend = AttentionMaps(load_model(load_config(args.config_file, args.opts)).recognizer)
    with tqdm(total=len(STAGES) * len(args.evaluations), unit="stage") as bar:

        def progress(stage: str) -> None:
            bar.set_description(stage)
            bar.update()

        write_report(args.evaluations, args.output, args.worst, args.images, attend, progress)
    size = args.output.stat().st_size / 1e6
    print(f"{printable(args.output)}: {size:.1f} MB, opens in any browser without a network")
