"""The paper's claims in miniature: train RegionSpot in a drawn world, evaluate it on classes without annotations."""

import json
import logging
import os
import platform
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image

from miniworld import experiment
from miniworld.categories import NAMES, NOVEL
from miniworld.drawing import draw_predictions
from miniworld.trained import index_split
from regionspot import RegionSpotPredictor
from regionspot.modeling.crop_baseline import CropRecognizer
from regionspot.report import write_report
from regionspot.utils.files import atomic_path
from regionspot_cli.commands import COMMANDS

NUM_WORST = 12  # images of the report
QUERY = NAMES[NOVEL[0]]  # what is searched for
NUM_SIMILAR = 12  # regions


class Stages:
    """Announces each stage and measures its time."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, what: str) -> Iterator[None]:
        print(f"\n== {what}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def evaluate(cfg: Any, model: Any, scenes: list, output: Path, stage: Stages) -> dict[str, Any]:
    """Return the metrics of the summary."""
    recognizer = model.recognizer
    summary: dict[str, Any] = {}
    with stage("regions", "top-1 and top-5 of the test regions, by true and by jittered boxes"):
        summary.update(experiment.region_accuracies(recognizer, scenes))
    with stage("crops", "the same regions by CLIP on box crops and on mask crops"):
        for kind in ("box", "mask"):
            baseline = CropRecognizer.sharing(recognizer, masked=kind == "mask")
            crops = experiment.recognize_scenes(baseline, scenes)
            summary.update(crops.accuracies(f"crop_{kind}_"))
    with stage("lvis", "LVIS AP of boxes and masks, by true boxes and by a proposal file"):
        summary.update(experiment.average_precision(cfg, model, "test"))
        experiment.write_proposals(scenes, output / "proposals.json")
        summary["proposal_file"] = experiment.average_precision(cfg, model, "test", output / "proposals.json")
    return summary


def search(cfg: CfgNode, output: Path) -> None:
    """Build the index of the test regions, and search it as a user would."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(output / "training" / "model_final.pth")
    cfg.TEST.BATCH_SIZE = 8
    shutil.rmtree(output / "index", ignore_errors=True)  # of another training
    index_split(RegionSpotPredictor(cfg), cfg, "miniworld_test", output / "index")
    options = ("--top-k", NUM_SIMILAR, "--output", output / "search")
    COMMANDS["search"].call("--index", output / "index", "--text", QUERY, *options)


def table(summary: dict[str, Any]) -> str:
    """Return the results as text."""
    rows = {"RegionSpot, true boxes": "", "RegionSpot, jittered boxes": "jittered_"}
    rows |= {"CLIP on box crops": "crop_box_", "CLIP on mask crops": "crop_mask_"}
    lines = [f"{'top-1 over all 120 names':30}  base   novel"]
    lines += [f"{name:30}  {summary[f'{p}base_top1']:.3f}  {summary[f'{p}novel_top1']:.3f}" for name, p in rows.items()]
    lines.append(f"novel regions over the 36 novel names: {summary['novel_top1_novel_vocabulary']:.3f}")
    for title, values in (("true boxes", summary), ("a proposal file", summary["proposal_file"])):
        lines.append(
            f"LVIS, {title}: " + ", ".join(f"{k} {values[k]:.1f}" for k in ("AP", "APr", "APc", "APf", "mask_AP"))
        )
    return "\n".join(lines)


def main(args: Namespace) -> None:
    logging.basicConfig(level=logging.WARNING)
    stage, root = Stages(), args.output / "data"
    with stage("draw", f"drawing {args.train} training and {args.test} test scenes"):
        experiment.draw_data(root, {"train": args.train, "test": args.test}, args.workers)
    cfg = experiment.miniworld_config(args.config_file, args.output / "training", args.seed, args.opts)
    with stage(
        "train", "extracting SAM's tokens and CLIP's feature maps, and training the attention module on base classes"
    ):
        model = experiment.train(cfg, args.output / "features")
    scenes = experiment.test_scenes("test", args.test)
    summary = evaluate(cfg, model, scenes, args.output, stage)
    with stage("images", "images of test scenes, novel classes marked, and the attention of two regions"):
        for name, image in draw_predictions(model.recognizer, scenes[:6]).items():
            with atomic_path(args.output / f"{name}.png") as temporary:
                Image.fromarray(image).save(temporary, format="PNG")
    with stage("report", "the two evaluations as one HTML file"):
        write_report([args.output / "training", args.output / "proposals"], args.output / "report.html", NUM_WORST)
    with stage("index", f"an index of the test regions, and those that are most like {QUERY!r}"):
        search(cfg, args.output)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    summary.update(seconds=stage.seconds, seed=args.seed, world_seed=0, versions=versions)
    with atomic_path(args.output / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=1))
    print(f"\n{table(summary)}\n\n{sum(stage.seconds.values()):.0f} s; images and summary.json are in {args.output}")
    print(f"\nWhat to try next:\n{next_steps(args, QUERY)}")


def next_steps(args: Namespace, query: str) -> str:
    """Return a line for each thing that a user may want to do with the output."""
    weights = f"MODEL.WEIGHTS {args.output / 'training' / 'model_final.pth'}"
    program, index = f"{sys.executable} -m regionspot_cli", args.output / "index"
    return (
        f"  look: open {args.output / 'report.html'} in a browser: AP, errors by kind, confusions, the worst images\n"
        f"  search: {program} search --index {index} --text {query!r} --output {args.output / 'search'}\n"
        f"  name: {program} predict --config-file {os.path.relpath(args.config_file)} --input IMAGE.png "
        f'--vocabulary "striped red star,plain blue ring" --output output/mine {weights}'
    )
