"""Training: the loader, the step, and both together, against the plain way; and its memory with a large data set."""

import copy
import itertools
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from regionspot.config import load_config
from regionspot.data import build_train_loader
from regionspot.engine import RegionSpotTrainer
from regionspot.engine.train_loop import TrainLoop
from regionspot.modeling import RegionRecognizer
from regionspot.modeling.frozen import get_dtype
from regionspot.modeling.vision_language.clip import get_clip_size
from tools.benchmarks.data import DATASET, SIZE, per_second, write_dataset, write_store
from tools.benchmarks.measure import GIGA, Meter
from tools.benchmarks.model import random_boxes
from tools.benchmarks.plain import PlainRecognizer, plain_loss
from tools.benchmarks.table import Table

NUM_BOXES = 10  # of an image
NUM_CLASSES = 365  # of the data set


def memory_of_processes() -> float:
    """Return the memory of this process and its children in bytes; what they share counts once (Linux)."""
    total, pending = 0, [Path("/proc/self")]
    while pending:
        process = pending.pop()
        try:
            rollup = (process / "smaps_rollup").read_text()
            children = (process / "task" / process.resolve().name / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
        pending += [Path("/proc") / child for child in children]
    return total


class MeasuredTrainer(RegionSpotTrainer):
    """The trainer with random tokens and weights, and measurements of its steps."""

    def __init__(self, cfg: CfgNode, warm_up: int) -> None:
        """``warm_up`` is the number of steps that are not timed."""
        self.measured = _MeasuredSteps(warm_up)
        super().__init__(cfg)

    def build_hooks(self) -> list[HookBase]:
        return [self.measured, *super().build_hooks()]

    def _check_token_stores(self) -> None:
        """The tokens are random: they are of no SAM."""


class _MeasuredSteps(HookBase):
    """Times the steps after the first ones, and looks at the memory of all processes after these and the last.

    Attributes:
        seconds: from the end of the last step that is not timed to the end of the last one.
        data_seconds: of these, spent waiting for the loader.
        most: bytes.
    """

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.start = warm_up, 0.0
        self.seconds = self.data_seconds = self.most = 0.0

    def after_step(self) -> None:
        done, device = self.trainer.iter + 1, self.trainer.loop.device
        if device.type == "cuda" and done in (self.warm_up, self.trainer.max_iter):  # others overlap with the next step
            torch.cuda.synchronize(device)
        if self.warm_up < done == self.trainer.max_iter:
            self.seconds = time.perf_counter() - self.start
            waits = self.trainer.storage.history("data_time").values()
            self.data_seconds = sum(seconds for seconds, iteration in waits if iteration >= self.warm_up)
        if done <= self.warm_up or done == self.trainer.max_iter:  # it takes time
            self.most = max(self.most, memory_of_processes())
        if done == self.warm_up:
            self.start = time.perf_counter()


def training_config(cfg: CfgNode, directory: Path, steps: int, workers: int) -> CfgNode:
    """Return a config that trains from the generated data set and the store of it in ``directory``."""
    overrides: dict[str, Any] = {
        "DATASETS.TRAIN": (DATASET,),
        "DATASETS.TEST": (),
        "DATASETS.TOKEN_STORES_TRAIN": (str(directory / "tokens"),),
        "SOLVER.MAX_ITER": steps,
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.STEPS": (),
        "DATALOADER.NUM_WORKERS": workers,
        "OUTPUT_DIR": str(directory / "output"),
        "MODEL.REGIONSPOT.CLIP.TEMPLATES": "none",  # how the embeddings come about does not matter here
    }
    cfg = cfg.clone()
    cfg.merge_from_list([part for item in overrides.items() for part in item])
    return cfg


def token_dim(cfg: CfgNode) -> int:
    node = cfg.MODEL.REGIONSPOT.SAM
    return node.CUSTOM.PROMPT_DIM if node.NAME == "custom" else 256


class PlainTraining:
    """The same step with PyTorch's decoder and an optimizer that takes parameter by parameter, all in float32."""

    def __init__(self, cfg: CfgNode, recognizer: RegionRecognizer, batch: list[dict[str, Any]]) -> None:
        self.cfg, self.batch, self.plain = cfg, batch, PlainRecognizer(cfg, recognizer)
        self.embeddings = recognizer.classifier.get(DATASET)[1]
        for name in ("to_clip", "decoder", "projector"):  # what learns must not be shared
            setattr(self.plain, name, copy.deepcopy(getattr(self.plain, name)).train().requires_grad_())
        self.parameters = [x for x in self.plain.parameters() if x.requires_grad]
        options = {"lr": cfg.SOLVER.BASE_LR, "weight_decay": cfg.SOLVER.WEIGHT_DECAY}
        self.optimizer = torch.optim.AdamW(self.parameters, foreach=False, fused=False, **options)

    def loss(self) -> torch.Tensor:
        tokens = torch.stack([inputs["tokens"] for inputs in self.batch])
        if "feature_map" in self.batch[0]:
            feature_map = torch.stack([inputs["feature_map"] for inputs in self.batch])
        else:
            with torch.no_grad():
                feature_map = self.plain.map_features([inputs["image"] for inputs in self.batch])
        logits = self.plain.logits(tokens, feature_map, self.embeddings)
        return plain_loss(logits, [inputs["instances"].gt_classes for inputs in self.batch], self.cfg)

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE, foreach=False)
        self.optimizer.step()
        return loss.item()


def random_batch(recognizer: RegionRecognizer, size: int, dim: int, maps: tuple[int, int] | None) -> list[dict]:
    """Return a batch whose random tokens, and images or feature maps of ``maps``, are on the device already."""
    device, batch = recognizer.vision_language.pixel_mean.device, []
    for _ in range(size):
        fields = {"gt_boxes": Boxes(random_boxes(NUM_BOXES)), "gt_classes": torch.randint(NUM_CLASSES, (NUM_BOXES,))}
        inputs: dict[str, Any] = {"instances": Instances(SIZE, **fields), "vocabulary": DATASET}
        inputs["tokens"] = torch.randn(NUM_BOXES, dim, device=device)
        if maps:
            inputs["feature_map"] = torch.randn(*maps, device=device)
        else:
            inputs["image"] = torch.randint(256, (3, *SIZE), dtype=torch.uint8, device=device)
        batch.append(inputs)
    return batch


def benchmark_train(cfg: CfgNode, directory: Path, args: Namespace) -> Table:
    """Return rows of the loader alone, of the step alone beside the plain way, and of the trainer that has both.

    Args:
        cfg: of the model, its training and its precision; ``training_config`` sets its data.
        directory: for the generated data set, the store and the output.
        args: ``images`` of the data set, ``maps`` to also store feature maps, ``workers`` of the loader, ``steps`` that
            are timed, after ``warm_up``, and ``repeats`` of the step alone.
    """
    write_dataset(directory, args.images, NUM_BOXES)
    cfg = training_config(cfg, directory, args.warm_up + args.steps, args.workers)
    maps = map_size(cfg) if args.maps else None
    write_store(directory / "tokens", token_dim(cfg), maps=maps)
    meter = Meter(torch.device(cfg.MODEL.DEVICE), args.repeats, bool(cfg.MODEL.REGIONSPOT.get("COMPILE")))
    rate = per_second(iter(build_train_loader(cfg)), 10 * args.steps) * cfg.SOLVER.IMS_PER_BATCH

    trainer = MeasuredTrainer(cfg, args.warm_up)
    precision = trainer.loop.precision or get_dtype(cfg.MODEL.REGIONSPOT.PRECISION)
    table = Table(meter, cfg.SOLVER.IMS_PER_BATCH, precision)
    table.append({"part": f"loader alone, {args.workers} workers", "unit": "images", **_rate(rate)})
    for name, names in trainer.vocabularies.items():
        trainer.recognizer.set_vocabulary(names, name)
    _measure_step(cfg, trainer, maps, table)

    meter.reset_peak()
    trainer.train()
    measured, step = trainer.measured, table.rows[-1]
    row = _rate(args.steps * cfg.SOLVER.IMS_PER_BATCH / measured.seconds)
    row |= {"part": "trainer", "unit": "images", "data_share": measured.data_seconds / measured.seconds}
    row["total_gigabytes"] = (meter.peak() if meter.is_cuda else measured.most) / GIGA
    table.append(row | ({"flops": step["flops"]} if "flops" in step else {}))
    return table


def _rate(per_second: float) -> dict[str, Any]:
    return {"seconds": 1 / per_second, "per_second": per_second}


def map_size(cfg: CfgNode) -> tuple[int, int]:
    """Return the (L, width) of CLIP's feature map."""
    size = get_clip_size(cfg)
    return 1 + (size.image_size // size.patch_size) ** 2, size.width


def _measure_step(cfg: CfgNode, trainer: MeasuredTrainer, maps: tuple[int, int] | None, table: Table) -> None:
    batch = random_batch(trainer.recognizer, table.batch, token_dim(cfg), maps)
    batches: Any = itertools.repeat(batch)
    loop = TrainLoop(trainer.model, batches, trainer.optimizer, 0, 1, trainer.loop.precision)
    plain = PlainTraining(cfg, trainer.recognizer, batch)
    with EventStorage(0):
        table.add("step alone, data on the device", loop.run_step, plain.step, plain_batch=table.batch)


def benchmark_memory(cfg: CfgNode, directory: Path, boxes: int, workers: int, iterations: int) -> list[tuple[str, str]]:
    """Train from the store of a large annotation file; return the memory when it was loaded and at the most."""
    write_dataset(directory, boxes // NUM_BOXES, NUM_BOXES)
    write_store(directory / "tokens", token_dim(cfg), shard_images=2048)
    cfg = training_config(cfg, directory, iterations, workers)
    before, start = memory_of_processes(), time.perf_counter()
    loader = build_train_loader(cfg)
    seconds, loaded = time.perf_counter() - start, memory_of_processes()
    del loader
    trainer = MeasuredTrainer(cfg, warm_up=iterations)
    trainer.train()
    return [
        ("before anything is loaded", f"{before / GIGA:.2f} GB"),
        (f"{boxes} boxes loaded, in {seconds:.1f} s", f"{loaded / GIGA:.2f} GB"),
        (f"training with {workers} workers, at the most", f"{trainer.measured.most / GIGA:.2f} GB"),
    ]


def main(args: Namespace) -> dict[str, Any]:
    cfg = load_config(args.config_file, args.opts)
    with tempfile.TemporaryDirectory() as directory:
        if args.benchmark == "memory":
            rows = benchmark_memory(cfg, Path(directory), args.boxes, args.workers, args.iterations)
            print(tabulate(rows, headers=["memory of all processes together", ""], disable_numparse=True))
            return dict(rows)
        table = benchmark_train(cfg, Path(directory), args)
    amp = cfg.SOLVER.AMP.DTYPE if cfg.SOLVER.AMP.ENABLED else "float32"
    return table.finish(args, precision=cfg.MODEL.REGIONSPOT.PRECISION, training_precision=amp)
