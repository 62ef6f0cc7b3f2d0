"""Fixed AP of all classes of all boxes, from logits to the metrics, in memory and disk."""

import json
import threading
import time
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Instances
from tqdm import tqdm

from regionspot.data import register_json_dataset
from regionspot.evaluation import Protocol
from regionspot.evaluation.region_evaluator import RegionEvaluator
from regionspot.modeling.postprocessing import DetectionRule
from tools.benchmarks.case import SIZE, write_case
from tools.benchmarks.memory import process_memory

DATASET = "benchmark_fixed"
HEADERS = ["step", "CPU time", "memory, the most so far", "disk, the most so far"]


class Disk(threading.Thread):
    """Notes the most that a directory holds, by looking every second."""

    def __init__(self, directory: Path) -> None:
        super().__init__(daemon=True)
        self.directory, self.most, self.ended = directory, 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(1):
            self.look()

    def look(self) -> None:
        sizes = []
        for path in self.directory.glob("*"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:  # was removed just now
                continue
        self.most = max(self.most, sum(sizes))


def draw_detections(rule: DetectionRule, boxes: int, classes: int, generator: torch.Generator) -> Instances:
    """Return all (box, class) pairs of an image with its own likely classes, best first, by generated logits."""
    logits = 2 * torch.randn(boxes, classes, generator=generator) + 2 * torch.randn(classes, generator=generator)
    corners = torch.rand(boxes, 2, 2, generator=generator) * torch.tensor([SIZE[1], SIZE[0]])
    xyxy = torch.cat([corners.min(dim=1).values, corners.max(dim=1).values], dim=1)
    return rule.select(xyxy, rule.scores(rule.probabilities(logits), None), SIZE)


def benchmark_fixed(
    directory: Path, images: int, boxes: int, classes: int
) -> tuple[list[str], list[tuple[str, str, str, str]]]:
    """Return the headers and the rows of a table.

    Args:
        directory: for the generated annotations, the predictions and the results.
        images, classes: of the data set.
        boxes: of an image, each of which is a detection of every class.
    """
    json_file, _ = write_case(directory / "data", images, 1, classes)
    register_json_dataset(DATASET, json_file, directory, "lvis")
    ids = [image["id"] for image in json.loads(json_file.read_text())["images"]]
    DatasetCatalog.get(DATASET)
    protocol = Protocol("generated", "fixed", "generated", -1, -1, "", "", "", "", "")
    disk, rule, generator = Disk(directory / "out"), DetectionRule(top_k=-1), torch.Generator().manual_seed(0)
    rows, start = [], time.process_time()

    def note(step: str) -> None:
        disk.look()
        cells = (
            f"{time.process_time() - start:.0f} s",
            f"{process_memory('VmHWM') / 2**30:.2f} GB",
            f"{disk.most / 2**30:.2f} GB",
        )
        rows.append((step, *cells))

    note("before")
    evaluator = RegionEvaluator(DATASET, directory / "out", protocol, ("bbox",), images)
    disk.start()
    for number, image_id in enumerate(tqdm(ids, desc="evaluating", unit="image"), 1):
        instances = draw_detections(rule, boxes, classes, generator)
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
        if number in (images // 8, images // 4, images // 2, images):
            note(f"{number} images, {number * boxes * classes:,} detections")
    evaluator.evaluate()
    disk.ended.set()
    note("metrics")
    return HEADERS, rows
