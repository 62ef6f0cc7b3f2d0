"""A trained module moves from SAM to SAM 2: the map alone, a short fine-tune, and training from scratch."""

import json
import logging
from argparse import Namespace
from pathlib import Path

from detectron2.config import CfgNode
from tqdm import tqdm

from miniworld import experiment
from miniworld.tables import format_runs
from miniworld.trained import load_trained
from regionspot.checkpoint.checkpointer import RegionSpotCheckpointer, load_model
from regionspot.data.tokens import TokenStore
from regionspot.engine.token_transfer import pairs_of_stores, transfer
from regionspot.utils.files import write_json

TARGET = experiment.CONFIGS / "models" / "SAM2-mini.yaml"
TOKEN_STAGE = "transformer"


def run_seed(args: Namespace, seed: int) -> dict[str, dict[str, float]]:
    """Return the numbers of all rows by the model of a seed."""
    directory, features = args.output / "transfer" / str(seed), args.output / "features"
    source, source_cfg = load_trained(args, seed)
    cfg = experiment.miniworld_config(TARGET, directory, seed, args.opts)
    old, new = (TokenStore(experiment.extract(x, features), TOKEN_STAGE) for x in (source_cfg, cfg))
    model = load_model(cfg)
    fitted = transfer(source.recognizer, model.recognizer, pairs_of_stores(old, new, args.images))
    logging.getLogger(__name__).info("seed %d: explained variance %.3f", seed, fitted.explained_variance)
    RegionSpotCheckpointer(model, str(directory)).save("start", is_last=False)

    def tune(weights: str, name: str) -> dict[str, float]:
        short = short_config(cfg, args.steps, directory / name, weights)
        return experiment.measure(short, experiment.train(short, features), args.split, args.test)

    whole = Namespace(**{**vars(args), "config_file": TARGET})
    return {
        "SAM, as trained": measure_trained(args, seed),
        "SAM 2, the map alone": experiment.measure(cfg, model, args.split, args.test)
        | {"explained_variance": fitted.explained_variance},
        f"SAM 2, the map and {args.steps} iterations": tune(str(directory / "start.pth"), "tuned"),
        f"SAM 2, {args.steps} iterations from scratch": tune("", "scratch"),
        "SAM 2, the whole training from scratch": measure_trained(whole, seed),
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


def measure_trained(args: Namespace, seed: int) -> dict[str, float]:
    """Return the numbers of the full model of a config and a seed, which is trained unless it is there."""
    predictor, cfg = load_trained(args, seed)
    return experiment.measure(cfg, predictor.model, args.split, args.test)


def main(args: Namespace) -> None:
    logging.basicConfig(level=logging.WARNING)
    experiment.draw_data(args.output / "data", {"train": args.train, args.split: args.test}, args.workers)
    results = []
    for seed in tqdm(range(args.seeds), desc="transfer", unit="seed"):
        path: Path = args.output / "transfer" / f"{args.split}-{seed}.json"
        if not path.is_file():
            write_json(path, run_seed(args, seed))
        results.append(json.loads(path.read_text()))
    print(f"\n{format_runs({name: [result[name] for result in results] for name in results[0]})}")
