#!/usr/bin/env python
"""Open-vocabulary detection in miniature: a small Faster R-CNN finds objects, RegionSpot names them, also novel ones.

Trains the detector twice, on base boxes of one class ("object") and as a closed-set detector of the base names, and
RegionSpot's attention module (or takes --weights), and evaluates on scenes with objects of classes without annotations.

Example:
    projects/RegionSpotRCNN/miniworld_detection.py --output output/rcnn --weights output/demo/training/model_final.pth
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger
from PIL import Image
from rcnn_training import Trainer
from tabulate import tabulate
from torch import nn

from miniworld import experiment
from miniworld.categories import NAMES, NOVEL
from miniworld.generator import Scene
from regionspot.checkpoint.checkpointer import SafeDetectionCheckpointer
from regionspot.drawing import draw_labels
from regionspot.utils.command_line import run_command
from regionspot.utils.files import atomic_path

CONFIGS = Path(__file__).resolve().parent / "configs" / "miniworld"


def register_host_data(split: str) -> None:
    """Register the training set with one class, and a split to test on as a detector of the base names sees it."""

    def objects() -> list[dict[str, Any]]:
        return [
            {**record, "annotations": [{**annotation, "category_id": 0} for annotation in record["annotations"]]}
            for record in DatasetCatalog.get("miniworld_train")
        ]

    DatasetCatalog.register("miniworld_train_objects", objects)
    MetadataCatalog.get("miniworld_train_objects").set(thing_classes=["object"])
    DatasetCatalog.get("miniworld_train"), DatasetCatalog.get(f"miniworld_{split}")  # names come with annotations
    train, test = MetadataCatalog.get("miniworld_train"), MetadataCatalog.get(f"miniworld_{split}")
    labels, test_labels = train.thing_dataset_id_to_contiguous_id, test.thing_dataset_id_to_contiguous_id
    others = [category for category in test_labels if category not in labels]  # the detector never predicts these
    DatasetCatalog.register(f"miniworld_{split}_closed", lambda: DatasetCatalog.get(f"miniworld_{split}"))
    MetadataCatalog.get(f"miniworld_{split}_closed").set(
        json_file=test.json_file,
        evaluator_type="lvis",
        thing_classes=[*train.thing_classes, *(test.thing_classes[test_labels[category]] for category in others)],
        thing_dataset_id_to_contiguous_id={**labels, **{x: len(labels) + k for k, x in enumerate(others)}},
    )


def train_host(name: str, args: argparse.Namespace) -> Path:
    """Train ``Host-<name>.yaml`` if it is not trained yet; return its weights."""
    output = args.output / f"host_{name}"
    cfg = experiment.miniworld_config(
        CONFIGS / f"Host-{name}.yaml", output, args.seed, ["DATASETS.TEST", "()", *args.opts]
    )
    if not (output / "model_final.pth").is_file():
        output.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()
    return output / "model_final.pth"


def train_recognizer(args: argparse.Namespace) -> Path:
    """Train RegionSpot's attention module as ``make demo`` does, if it is not trained yet; return its weights."""
    if args.weights:
        return args.weights
    output = args.output / "regionspot"
    if not (output / "model_final.pth").is_file():
        cfg = experiment.miniworld_config(experiment.CONFIG, output, args.seed, args.opts)
        experiment.train(cfg, args.output / "features")
    return output / "model_final.pth"


def build(config: str, args: argparse.Namespace, host: Path, head: Path) -> tuple[CfgNode, nn.Module]:
    """Return config and model of a host's weights with, in its head, RegionSpot's."""
    data = f"miniworld_{args.split}" + ("_closed" if config == "Host-closed-set" else "")
    overrides = ["MODEL.WEIGHTS", str(host), "MODEL.REGIONSPOT.HEAD.WEIGHTS", str(head)]
    overrides += ["DATASETS.TEST", f"('{data}',)", *args.opts]
    cfg = experiment.miniworld_config(CONFIGS / f"{config}.yaml", args.output / config, args.seed, overrides)
    model = build_model(cfg)
    SafeDetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return cfg, model.eval()


@torch.no_grad()
def draw_detections(model: nn.Module, scene: Scene, score: float = 0.3, scale: int = 3) -> np.ndarray:
    """Return an image of a scene with its detections, each object by its best name, novel ones with a star."""
    side = scene.image.shape[0] * scale
    named = model([{"image": experiment.to_tensor(scene), "height": side, "width": side}])[0]["instances"].to("cpu")
    first = {region: row for row, region in reversed(list(enumerate(named.region_indices.tolist())))}
    named = named[torch.tensor([row for row in sorted(first.values()) if named.scores[row] > score], dtype=torch.long)]
    labels = [f"{'*' if i in NOVEL else ''}{NAMES[i]}" for i in named.pred_classes.tolist()]
    large = np.asarray(Image.fromarray(scene.image).resize((side, side), Image.Resampling.BICUBIC))
    return draw_labels(large, named.pred_boxes.tensor.numpy(), None, labels)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/rcnn"), metavar="DIR")
    parser.add_argument("--weights", type=Path, help="RegionSpot's, such as those of make demo; trained by default")
    parser.add_argument("--train", type=int, default=3200, help="training scenes")
    parser.add_argument("--test", type=int, default=200, help="scenes to evaluate on")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="split of these scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="drawing processes")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    setup_logger()
    start = time.perf_counter()
    experiment.draw_data(args.output / "data", {"train": args.train, args.split: args.test}, args.workers)
    register_host_data(args.split)
    agnostic, closed = train_host("class-agnostic", args), train_host("closed-set", args)
    spot = train_recognizer(args)
    rows = {
        "the host, closed-set": ("Host-closed-set", closed),
        "class-agnostic host + RegionSpot": ("RegionSpot-head", agnostic),
        "closed-set host + RegionSpot for other names": ("RegionSpot-head-keep", closed),
    }
    results: dict[str, dict[str, Any]] = {}
    for title, (config, host) in rows.items():
        cfg, model = build(config, args, host, spot)
        results[title] = Trainer.test(cfg, model)
        if config == "RegionSpot-head":
            images = [draw_detections(model, scene) for scene in experiment.test_scenes(args.split, 6)]
    with atomic_path(args.output / "summary.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1))
    for index, image in enumerate(images):
        with atomic_path(args.output / f"scene_{index}.png") as temporary:
            Image.fromarray(image).save(temporary, format="PNG")
    columns = ("AP", "AP50", "APr", "APc", "APf")
    table = [
        [title, *(result["bbox"][column] for column in columns), result.get("segm", {}).get("AP")]
        for title, result in results.items()
    ]
    print(tabulate(table, ["", *columns, "mask AP"], floatfmt=".1f"))
    print(f"{time.perf_counter() - start:.0f} s; images and summary.json are in {args.output}")


if __name__ == "__main__":
    run_command(main, kept="the checkpoints so far are kept")
