"""A trained module moves from SAM to SAM 2: the map alone, a short fine-tune, and training from scratch."""

import json
import logging
from argparse import Namespace
from pathlib import Path

from detectron2.config import CfgNode
from tqdm import tqdm

from miniworld import experiment
from miniworld.tables import COLUMNS, format_runs
from miniworld.trained import load_trained
from regionspot.checkpoint.checkpointer import RegionSpotCheckpointer, load_model
from regionspot.data.tokens import TokenStore
from regionspot.engine.token_transfer import pairs_of_stores, transfer
from regionspot.utils.files import write_json

TARGET = experiment.CONFIGS / "models" / "SAM2-mini.yaml"
TOKEN_STAGE = "transformer"
# What the numbers of a seed depend on; a finished one is kept if all are the same.
SETTINGS = ("train", "test", "split", "images", "steps", "opts")


def run_seed(args: Namespace, seed: int) -> dict[str, dict[str, float]]:
    """Return the numbers of all rows by the model of a seed."""
    directory, features = args.output / "transfer" / str(seed), args.output / "features"
    (source, source_cfg), (whole, whole_cfg) = (
        load_trained(Namespace(**vars(args), config_file=path), seed) for path in (experiment.CONFIG, TARGET)
    )
    cfg = experiment.miniworld_config(TARGET, directory, seed, args.opts)
    old, new = (TokenStore(experiment.extract(x, features), TOKEN_STAGE) for x in (source_cfg, cfg))
    model = load_model(cfg)
    fitted = transfer(source.recognizer, model.recognizer, pairs_of_stores(old, new, args.images))
    RegionSpotCheckpointer(model, str(directory)).save("start", is_last=False)

    def tune(weights: str, name: str) -> dict[str, float]:
        short = short_config(cfg, args.steps, directory / name, weights)
        return experiment.measure(short, experiment.train(short, features), args.split, args.test)

    return {
        "SAM, as trained": experiment.measure(source_cfg, source.model, args.split, args.test),
        "SAM 2, the map alone": experiment.measure(cfg, model, args.split, args.test)
        | {"explained_variance": fitted.explained_variance},
        "SAM 2, the map and a fine-tune": tune(str(directory / "start.pth"), "tuned"),
        "SAM 2, as many iterations from scratch": tune("", "scratch"),
        "SAM 2, the whole training from scratch": experiment.measure(whole_cfg, whole.model, args.split, args.test),
    }


def short_config(cfg: CfgNode, steps: int, output: Path, weights: str) -> CfgNode:
    """Return the config of a short training, from a checkpoint at a third of the learning rate."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER = weights, str(output), steps
    cfg.SOLVER.WARMUP_ITERS = min(cfg.SOLVER.WARMUP_ITERS, steps // 4)
    if weights:
        cfg.SOLVER.BASE_LR /= 3
    cfg.freeze()
    return cfg


def main(args: Namespace) -> None:
    logging.basicConfig(level=logging.WARNING)
    experiment.draw_data(args.output / "data", {"train": args.train, args.split: args.test}, args.workers)
    settings = {key: getattr(args, key) for key in SETTINGS}
    runs: list[dict[str, dict[str, float]]] = []
    for seed in tqdm(range(args.seeds), desc="transfer", unit="seed"):
        path: Path = args.output / "transfer" / f"{args.split}-{seed}.json"
        content = json.loads(path.read_text()) if path.is_file() else {}
        if content.get("settings") != settings:
            content = {"settings": settings, "results": run_seed(args, seed)}
            write_json(path, content)
        runs.append(content["results"])
    columns = {**COLUMNS, "explained_variance": "explained variance"}
    print(f"\n{format_runs({row: [run[row] for run in runs] for row in runs[0]}, columns)}")
