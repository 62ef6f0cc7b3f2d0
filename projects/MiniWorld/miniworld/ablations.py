"""The paper's ablations in the miniature world: every config with several seeds, a table beside the paper's column."""

import json
import logging
import multiprocessing
import os
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from miniworld import experiment
from miniworld.tables import format_runs
from miniworld.trained import load_trained, settings_suffix
from regionspot.utils.files import atomic_path

# Config, what it changes, and the paper's AP on LVIS with GLIP boxes (BL; arXiv 2311.01373), where it has one. The
# paper's 18.5 is the first rung of a cumulative ladder (18.5, 22.1, 23.7), not the full model less one thing.
ROWS = [
    ("RegionSpot-mini", "full model", "23.7"),
    ("ablations/token-prompt_encoder", "token of the prompt encoder", "18.6"),
    ("ablations/token-mlp", "token of the MLP", "20.4"),
    ("ablations/features-none", "no CLIP vision", "8.0"),
    ("ablations/features-feature_map", "feature map, no class token", "22.1"),
    ("ablations/depth-1", "depth 1", "23.2"),
    ("ablations/depth-6", "depth 6", "22.8"),
    ("ablations/one-box-ladder", "one box at a time, bare names, no class token", "18.5"),
    ("ablations/one-box", "one box at a time", ""),
    ("ablations/templates-one", "one prompt template", ""),
    ("ablations/templates-none", "bare names", "22.1"),
    ("ablations/scores-sigmoid", "sigmoid scores", ""),
    # beyond the paper
    ("plus/mask-pooling", "mask pooling", ""),
    ("plus/mask-pooling-depth-1", "mask pooling, depth 1", ""),
    ("plus/pre-norm-depth-6", "depth 6, pre-norm", ""),
    ("plus/ensemble", "geometric ensemble", ""),
    ("plus/ensemble-base-novel", "geometric ensemble, exponents of base and novel names", ""),
    ("plus/box-jitter", "jittered boxes", ""),
    ("plus/mask-pooling-depth-1-jitter", "mask pooling, depth 1, jittered boxes", ""),
    ("models/SAM2-mini", "SAM 2 and CLIP", ""),
    ("models/SigLIP-mini", "SAM and SigLIP", ""),
    ("models/SAM2-SigLIP-mini", "SAM 2 and SigLIP", ""),
]
# Rows that differ from another one at inference alone are evaluated with its weights, so nothing else moves them.
WEIGHTS_OF = {
    "ablations/scores-sigmoid": "RegionSpot-mini",
    "plus/ensemble": "RegionSpot-mini",
    "plus/ensemble-base-novel": "RegionSpot-mini",
}


def run_once(name: str, seed: int, args: Namespace) -> None:
    """Train a config with a seed, unless it is trained, and evaluate it and the rows that share its weights."""
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(max((os.cpu_count() or 1) // args.jobs, 1))
    # the scenes exist: this registers them
    experiment.draw_data(args.output / "data", {"train": args.train, args.split: args.test}, 1)
    trained = Namespace(**vars(args), config_file=experiment.CONFIGS / f"{name}.yaml")
    for row in sharing_weights(name):
        predictor, cfg = load_trained(trained, seed, experiment.CONFIGS / f"{row}.yaml")
        numbers = experiment.measure(cfg, predictor.model, args.split, args.test)
        with atomic_path(result_path(row, seed, args)) as temporary:
            temporary.write_text(json.dumps(numbers))


def run_in_process(name: str, seed: int, args: Namespace) -> None:
    """Do ``run_once`` in a process of its own; a ``RuntimeError`` says that it failed, after its own message."""
    process = multiprocessing.get_context("spawn").Process(target=run_once, args=(name, seed, args))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{name} with seed {seed}: its process ended with exit code {process.exitcode}")


def sharing_weights(name: str) -> list[str]:
    """Return a row that is trained, and those that are evaluated with its weights."""
    return [name, *(row for row, trained in WEIGHTS_OF.items() if trained == name)]


def result_path(name: str, seed: int, args: Namespace) -> Path:
    directory = "results" if args.split == "test" else f"results-{args.split}"
    return args.output / directory / f"{name.replace('/', '-')}-{seed}{settings_suffix(args)}.json"


def table(args: Namespace) -> str:
    """Return mean and standard deviation of the finished runs."""
    runs, published = {}, {}
    for name, what, paper in ROWS:
        paths = [path for seed in range(args.seeds) if (path := result_path(name, seed, args)).is_file()]
        if paths:
            runs[what], published[what] = [json.loads(path.read_text()) for path in paths], paper
    return format_runs(runs, published=published)


def main(args: Namespace) -> None:
    if unknown := set(args.rows or ()) - {name for name, _, _ in ROWS}:
        raise ValueError(
            f"--rows: expected some of {', '.join(name for name, _, _ in ROWS)}; got {', '.join(sorted(unknown))}"
        )
    experiment.draw_data(args.output / "data", {"train": args.train, args.split: args.test}, args.jobs)
    chosen = {WEIGHTS_OF.get(name, name) for name in args.rows or [name for name, _, _ in ROWS]}
    rows = [name for name, _, _ in ROWS if name in chosen]
    tasks = [(name, seed) for name in rows for seed in range(args.seeds)]
    tasks = [
        (name, seed)
        for name, seed in tasks
        if not all(result_path(row, seed, args).is_file() for row in sharing_weights(name))
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(run_in_process, *task, args) for task in tasks]
        try:
            for done in tqdm(as_completed(runs), total=len(runs), desc="ablations", unit="run"):
                done.result()
                with atomic_path(args.output / "table.md") as temporary:
                    temporary.write_text(table(args) + "\n", encoding="utf-8")
        except BaseException:
            pool.shutdown(cancel_futures=True)  # the error is reported before other runs end
            raise
    print(f"\n{table(args)}")
