"""Names all regions of an index."""

import csv
import logging
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from regionspot.index import IndexClassifier, RegionIndex
from regionspot.index.region_table import RegionTable
from regionspot.modeling.postprocessing import DetectionRule
from regionspot.modeling.region_predictions import UNKNOWN
from regionspot.utils.command_line import printable
from regionspot.utils.files import atomic_path
from regionspot_cli.search import load_predictor

SHOWN = 20  # names whose counts are printed


def named_columns(index: RegionIndex, classifier: IndexClassifier, names: list[str], top_k: int) -> Iterator[dict]:
    """Yield the table of regions, a chunk at a time."""
    labels = np.array([*names, UNKNOWN], dtype=object)
    images = iter(index.region_images())
    for chunk in classifier.classify(top_k):
        best = np.where(chunk.unknown, len(names), chunk.top_classes[:, 0])
        columns: dict[str, Any] = {"region": np.arange(chunk.first, chunk.first + len(best))}
        columns["image"] = np.array([next(images) for _ in best], dtype=object)
        columns |= dict(zip(("x0", "y0", "x1", "y1"), chunk.boxes.T))
        columns |= {"name": labels[best], "score": chunk.top_scores[:, 0], "detection_score": chunk.detection_scores}
        for k in range(1, chunk.top_classes.shape[1]):
            columns |= {f"name_{k + 1}": labels[chunk.top_classes[:, k]], f"score_{k + 1}": chunk.top_scores[:, k]}
        yield columns


def main(args: Namespace) -> None:
    setup_logger(name="regionspot").setLevel(logging.WARNING)
    index = RegionIndex(args.index)
    predictor = load_predictor(args, index)
    recognizer = predictor.recognizer
    names, embeddings = recognizer.encode_vocabulary(args.vocabulary)
    background = recognizer.background and recognizer.encode_vocabulary(recognizer.background)[1]
    rule: DetectionRule = recognizer.rule
    device = str(predictor.model.device)
    classifier = IndexClassifier(
        index, embeddings, background if isinstance(background, torch.Tensor) else None, rule, device
    )
    counts: Counter[str] = Counter()
    start = time.perf_counter()
    with RegionTable(args.output) as table, tqdm(total=len(index), desc="names", unit="region") as bar:
        for columns in named_columns(index, classifier, names, args.top_k):
            table.write(columns)
            counts.update(columns["name"].tolist())
            bar.update(len(columns["name"]))
    seconds = time.perf_counter() - start
    if args.counts:
        with atomic_path(args.counts) as path, path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("name", "regions"), *counts.most_common()])
    for name, count in counts.most_common(SHOWN):
        print(f"{count:12,}  {printable(name)}")
    if len(counts) > SHOWN:
        print(f"{'':12}  and {len(counts) - SHOWN} more names")
    print(f"{printable(args.output)}: {len(index):,} regions of {len(names):,} names in {seconds:.1f} s")
