"""Extraction of tokens from a generated data set, through the real function, against SAM's own forward."""

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from regionspot.config import load_config
from regionspot.data.dataset_mapper import annotated_regions
from regionspot.engine.extract import Extraction, extract_tokens
from regionspot.modeling import RegionRecognizer
from regionspot.structures import Prompts
from regionspot.utils.images import decode_image
from tools.benchmarks.data import DATASET, SIZE, write_dataset
from tools.benchmarks.measure import Meter, count_flops
from tools.benchmarks.model import Models, random_boxes
from tools.benchmarks.plain import PlainRecognizer
from tools.benchmarks.table import Table

STAGES = {"encode_images": "encoding images", "locate": "decoding boxes"}  # by the recognizer's methods


class StageTimes:
    """Adds up the seconds that a recognizer spends in each stage, and in all, inside the block."""

    def __init__(self, recognizer: RegionRecognizer, meter: Meter) -> None:
        self.recognizer, self.meter = recognizer, meter
        self.seconds, self.whole = dict.fromkeys(STAGES, 0.0), 0.0

    def __enter__(self) -> "StageTimes":
        for name in STAGES:
            setattr(self.recognizer, name, partial(self._run, name, getattr(self.recognizer, name)))
        self.whole = -time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.whole += time.perf_counter()
        for name in STAGES:
            delattr(self.recognizer, name)  # the class's own method is seen again

    def _run(self, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        results: list[Any] = []
        self.seconds[name] += self.meter.time(lambda: results.append(method(*args, **kwargs)))
        return results[0]


def extract_plainly(plain: PlainRecognizer, num_images: int) -> None:
    """Compute the tokens of the first images, one image at a time, by SAM's own modules."""
    records = DatasetCatalog.get(DATASET)
    for index in range(num_images):
        pixels, _ = decode_image(records[index]["file_name"], "RGB")
        boxes = annotated_regions(records[index]).gt_boxes.tensor
        image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())  # Pillow's pixels are read-only
        tokens, _ = plain.decode(plain.embed(image), boxes, SIZE)
        tokens.half().cpu()


@torch.no_grad()
def benchmark_extract(cfg: CfgNode, directory: Path, args: Namespace) -> Table:
    """Return rows of the whole extraction beside the plain way, and of the share of each stage.

    Args:
        cfg: of the model.
        directory: for the generated data set and the stores.
        args: ``images`` of the data set, with ``boxes`` each; ``batch`` and ``workers`` of the extraction;
            ``plain_images``, the number of images that the plain way takes; ``repeats``.
    """
    write_dataset(directory, args.images, args.boxes)
    models = Models.from_config(cfg)
    recognizer, plain = models.recognizer, models.plain
    table = models.build_table(cfg, args.repeats, args.images)
    extraction = Extraction(batch_size=args.batch, workers=args.workers)
    image, prompts = torch.randint(256, (3, *SIZE), dtype=torch.uint8), [Prompts(boxes=random_boxes(args.boxes))]

    def run_stages() -> None:
        recognizer.locate(recognizer.encode_images([image], with_feature_map=False), prompts)

    flops = count_flops(run_stages)
    runs: list[StageTimes] = []

    def extract() -> None:
        with StageTimes(recognizer, table.meter) as times:
            extract_tokens(recognizer, DATASET, directory / f"store-{len(runs)}", extraction)
        runs.append(times)

    name = f"{args.boxes} boxes an image, batches of {args.batch}, {args.workers} workers"
    plainly, num_plain = partial(extract_plainly, plain, args.plain_images), args.plain_images
    table.add(name, extract, plainly, plain_batch=num_plain, flops=flops)
    shares = {stage: runs[-1].seconds[method] / runs[-1].whole for method, stage in STAGES.items()}
    for stage, share in [*shares.items(), ("reading images, writing the store, the rest", 1 - sum(shares.values()))]:
        table.append({"part": f"of it {stage}", "share": share})
    return table


def main(args: Namespace) -> dict[str, Any]:
    cfg = load_config(args.config_file, args.opts)
    with tempfile.TemporaryDirectory() as directory:
        table = benchmark_extract(cfg, Path(directory), args)
    return table.finish(args, precision=cfg.MODEL.REGIONSPOT.PRECISION)
