#!/usr/bin/env python
"""Evaluate a file of COCO or LVIS results, ours or another's, and say by which protocol.

Examples:
    tools/evaluate_predictions.py --annotations lvis_v1_val.json --predictions results.json --output out
    tools/evaluate_predictions.py --annotations lvis_v1_val.json --predictions results.jsonl --protocol fixed
"""

import argparse
import logging
import sys
from pathlib import Path

PROTOCOLS = ("lvis", "fixed", "coco")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotations", required=True, type=Path, metavar="JSON", help="in LVIS or COCO format")
    parser.add_argument(
        "--predictions", required=True, type=Path, metavar="JSON", help="results; a list, or JSON lines"
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, help="by default lvis or coco, by what the annotations have")
    parser.add_argument("--task", nargs="+", choices=["bbox", "segm"], help="by default those that predictions allow")
    parser.add_argument("--max-dets", type=int, default=300, metavar="N", help="per image, of protocol lvis; -1: all")
    parser.add_argument(
        "--segm-areas",
        choices=["masks", "boxes"],
        default="masks",
        help="what small, medium and large detected masks are told by: masks as Detectron2, boxes as the lvis package",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="for metrics.json and per_class_<task>.csv")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    from startup import answer_first

    answer_first(parse_arguments)

import numpy as np

from regionspot.data.coco_io import Results, read_results
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.report import evaluate_task, format_table, write_outcomes
from regionspot.utils.command_line import run_command
from regionspot.utils.files import sha256_of_file

LIMITS = {
    "lvis": "{} detections per image",
    "fixed": "10000 detections per class",
    "coco": "100 detections per image and class",
}


def protocol_line(truth: GroundTruth, results: Results, args: argparse.Namespace) -> str:
    """Return what the numbers mean, in one line."""
    files = (f"{path.name} (sha256 {sha256_of_file(path)[:12]})" for path in (args.annotations, args.predictions))
    parts = [
        f"protocol {args.protocol}",
        f"task {' '.join(args.task)}",
        LIMITS[args.protocol].format("all" if args.max_dets == -1 else args.max_dets),
        f"images with detections {len(np.unique(results.image_ids))} of {len(truth.image_ids)} evaluated",
        " on ".join(reversed(list(files))),
    ]
    return " | ".join(parts)


def run(args: argparse.Namespace) -> None:
    truth, results = GroundTruth(args.annotations), read_results(args.predictions)
    args.protocol = args.protocol or ("lvis" if truth.is_lvis else "coco")
    asked = bool(args.task)
    args.task = args.task or (["bbox", "segm"] if results.regions is not None else ["bbox"])
    outcomes = {}
    for task in args.task:
        try:
            outcomes[task] = evaluate_task(truth, results, task, args.protocol, args.max_dets, args.segm_areas)
        except ValueError as error:
            if asked or task == "bbox":
                raise
            print(f"masks are not evaluated: {error}", file=sys.stderr)
    args.task = list(outcomes)
    print(protocol_line(truth, results, args))
    for part in ("metrics", "recalls"):
        print(format_table({task: getattr(outcome, part) for task, outcome in outcomes.items()}), end="\n\n")
    if args.output:
        write_outcomes(args.output, truth, outcomes)
        print(f"written to {args.output}")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    run(args)


if __name__ == "__main__":
    run_command(main)
