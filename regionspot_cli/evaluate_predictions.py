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


def describe_protocol(truth: GroundTruth, results: Results, args: Namespace) -> dict[str, str]:
    """Return what the numbers depend on."""
    annotations, predictions = (
        f"{path.name} (sha256 {sha256_of_file(path)[:12]})" for path in (args.annotations, args.predictions)
    )
    return {
        "limit": LIMITS[args.protocol].format("all" if args.max_dets == -1 else args.max_dets),
        "images with detections": f"{len(np.unique(results.image_ids))} of {len(truth.image_ids)} evaluated",
        "predictions": predictions,
        "annotations": annotations,
    }


def protocol_line(protocol: dict[str, str], args: Namespace) -> str:
    """Return what the numbers mean, in one line."""
    parts = [
        f"protocol {args.protocol}",
        f"task {' '.join(args.task)}",
        protocol["limit"],
        f"images with detections {protocol['images with detections']}",
        f"{protocol['predictions']} on {protocol['annotations']}",
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
    protocol = describe_protocol(truth, results, args)
    print(protocol_line(protocol, args))
    print(format_table({task: evaluation.metrics() for task, evaluation in evaluations.items()}), end="\n\n")
    print(format_table({task: evaluation.average_recalls() for task, evaluation in evaluations.items()}), end="\n\n")
    if args.output:
        write_evaluations(args.output, truth, evaluations)
        EvaluationRecord(
            annotations=str(args.annotations.absolute()),
            predictions=str(args.predictions.absolute()),
            metric=args.protocol,
            max_dets=args.max_dets,
            segm_areas=args.segm_areas,
            protocol=dict(protocol),
        ).write(args.output)
        print(f"written to {args.output}")
