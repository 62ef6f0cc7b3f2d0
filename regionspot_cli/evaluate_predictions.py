"""Evaluates a file of COCO or LVIS results."""

import logging
import sys
from argparse import Namespace

import numpy as np

from regionspot.data.coco_io import Results, read_results
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.record import EvaluationRecord
from regionspot.evaluation.report import evaluate_task, format_table, write_evaluations
from regionspot.utils.files import sha256_of_file

LIMITS = {
    "lvis": "{} detections per image",
    "fixed": "10000 detections per class",
    "coco": "100 detections per image and class",
}


def protocol_line(truth: GroundTruth, results: Results, args: Namespace) -> str:
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


def main(args: Namespace) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    truth, results = GroundTruth(args.annotations), read_results(args.predictions)
    args.protocol = args.protocol or ("lvis" if truth.is_lvis else "coco")
    # Masks that are there but incomplete end the command only if --task asks for them.
    is_task_chosen = bool(args.task)
    args.task = args.task or (["bbox", "segm"] if results.regions is not None else ["bbox"])
    evaluations = {}
    for task in args.task:
        try:
            evaluations[task] = evaluate_task(truth, results, task, args.protocol, args.max_dets, args.segm_areas)
        except ValueError as error:
            if is_task_chosen or task == "bbox":
                raise
            print(f"masks are not evaluated: {error}", file=sys.stderr)
    args.task = list(evaluations)
    print(protocol_line(truth, results, args))
    print(format_table({task: evaluation.metrics() for task, evaluation in evaluations.items()}), end="\n\n")
    print(format_table({task: evaluation.average_recalls() for task, evaluation in evaluations.items()}), end="\n\n")
    if args.output:
        write_evaluations(args.output, truth, evaluations)
        annotations, predictions = (str(path.absolute()) for path in (args.annotations, args.predictions))
        EvaluationRecord(annotations, predictions, args.protocol, args.max_dets, args.segm_areas).write(args.output)
        print(f"written to {args.output}")
