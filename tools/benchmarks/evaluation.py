"""Our evaluation against the lvis package and pycocotools, in time and memory."""

import json
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as mask_utils
from tabulate import tabulate
from torch.nn import functional as F

from regionspot.modeling.masks import MaskUpsampler, RegionMasks
from tools.benchmarks.case import SIZE, write_case
from tools.benchmarks.fixed import benchmark_fixed
from tools.benchmarks.measure import GIGA, Meter

HEADERS = ["case", "ours", "memory", "reference", "memory", "times as fast", "times less memory"]

# Run in a process of its own, so that the memory is its own. Time is the CPU's: both use one thread. Importing is not
# counted.
_PRELUDE = """
import json, re, sys, time
def peak():  # of this program; getrusage would count the one that started it, too
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\\s+(\\d+)", file.read())[1]) * 1024
"""
_OURS = """
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.report import evaluate_task
from regionspot.data.coco_io import read_results
before, start = peak(), time.process_time()
truth, results = GroundTruth(sys.argv[1]), read_results(sys.argv[2])
metrics = evaluate_task(truth, results, sys.argv[3], sys.argv[4], segm_areas="boxes").metrics()  # areas as lvis
"""
_LVIS = """
import lvis, logging, numpy
from lvis import LVISEval
numpy.float = float  # the package is older than NumPy 1.24
before, start = peak(), time.process_time()
evaluation = LVISEval(sys.argv[1], sys.argv[2], sys.argv[3])
evaluation.run()
metrics = {key: value * 100 for key, value in evaluation.get_results().items() if "AR" not in key}
"""
_COCO = """
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
before, start = peak(), time.process_time()
truth, found = COCO(sys.argv[1]), json.load(open(sys.argv[2]))
for entry in found if sys.argv[3] == "segm" else ():
    del entry["bbox"]
evaluation = COCOeval(truth, truth.loadRes(found), sys.argv[3])
evaluation.evaluate(), evaluation.accumulate(), evaluation.summarize()
metrics = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), (evaluation.stats[:6] * 100).tolist()))
"""
_EPILOGUE = """
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "before": before, "peak": peak(), "metrics": metrics}))
"""


def measure(code: str, annotations: Path, results: Path, task: str, protocol: str) -> dict:
    """Evaluate in a process of its own; return CPU seconds, bytes "before" (imports alone) and "peak", and metrics."""
    command = [sys.executable, "-c", _PRELUDE + code + _EPILOGUE, str(annotations), str(results), task, protocol]
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ).stdout
    return json.loads(output.splitlines()[-1])


def benchmark_eval(directory: Path, args: Namespace) -> list[tuple[str, ...]]:
    """Return rows of a table: what, seconds and memory of ours and the reference, and how many times as good ours is.

    Args:
        directory: for the generated files.
        args: ``images`` and ``categories`` of the data set, ``detections`` an image, ``task``, ``protocol``, and
            ``alone`` if the reference is not measured.
    """
    rows = []
    for number in dict.fromkeys((args.detections, args.detections if args.alone else max(1, args.detections // 100))):
        paths = write_case(directory / str(number), args.images, number, args.categories, "segm" in args.task)
        for task in args.task:
            result = measure(_OURS, *paths, task, args.protocol)
            row = [f"{args.protocol} {task}, {args.images} images, {args.images * number} detections", *_cells(result)]
            if not args.alone:
                reference = measure(_COCO if args.protocol == "coco" else _LVIS, *paths, task, args.protocol)
                _same(result["metrics"], reference["metrics"])
                row += [*_cells(reference), *_ratios(result, reference)]
            rows.append(tuple(row))
    return rows


def _cells(run: dict) -> list[str]:
    added, total = (run["peak"] - run["before"]) / 2**30, run["peak"] / 2**30
    return [f"{run['seconds']:.2f} s", f"{added:.2f} GB ({total:.2f})"]


def _ratios(result: dict, reference: dict) -> list[str]:
    def added(run: dict) -> float:
        return run["peak"] - run["before"]

    return [f"{reference['seconds'] / result['seconds']:.1f}", f"{added(reference) / max(added(result), 1):.1f}"]


def _same(result: dict, reference: dict) -> None:
    for key, value in result.items():
        expected = float("nan") if reference[key] < 0 else reference[key]
        if not np.isclose(value, expected, rtol=0, atol=1e-9, equal_nan=True):
            raise RuntimeError(f"{key}: ours {value}, reference {expected}")


def benchmark_masks(boxes: int = 100, detections: int = 300) -> tuple[str, ...]:
    """Return the table's row of the masks of an image's detections: each box's once, or a full-size mask for each."""
    torch.manual_seed(0)
    logits = F.interpolate(torch.randn(boxes, 1, 8, 8), (256, 256), mode="bicubic")[:, 0]
    rows, upsampler = torch.arange(detections) % boxes, MaskUpsampler(1024, (768, 1024), 0.0)
    counts: dict[str, list[str]] = {}

    def each_box_once() -> None:
        rles = RegionMasks(logits, rows, upsampler).to_rles(*SIZE)
        counts["once"] = [rle["counts"] for rle in rles]

    def each_detection() -> None:
        masks = upsampler(logits[rows], SIZE).numpy()
        rles = [mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks]
        counts["each"] = [rle["counts"].decode() for rle in rles]

    cells, figures = [], []
    for function in (each_box_once, each_detection):
        measured = Meter(torch.device("cpu"), 1).measure(function)
        cells += [f"{measured.seconds:.2f} s", f"{measured.added / GIGA:.2f} GB"]
        figures.append((measured.seconds, max(measured.added, 1)))
    if counts["once"] != counts["each"]:
        raise RuntimeError("the masks of both ways differ")
    ratios = [f"{plain / once:.1f}" for once, plain in zip(*figures)]
    return (f"masks of {detections} detections of {boxes} boxes, 480 x 640", *cells, *ratios)


def main(args: Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        if args.protocol == "fixed":
            headers, steps = benchmark_fixed(Path(directory), args.images, args.detections, args.categories)
            print(tabulate(steps, headers=headers, disable_numparse=True))
            return
        rows = benchmark_eval(Path(directory), args)
    print(tabulate(rows, headers=HEADERS[: len(rows[0])], disable_numparse=True))
    if not args.alone:
        print("the metrics agree to 1e-9")
        headers = ["masks of an image", "ours", "memory", "one a detection", *HEADERS[4:]]
        print("\n" + tabulate([benchmark_masks()], headers=headers, disable_numparse=True))
    print("time of the CPU; memory at the peak, what was added to the imports (and with them)")
