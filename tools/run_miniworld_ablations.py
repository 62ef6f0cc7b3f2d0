#!/usr/bin/env python
"""The paper's ablations in the miniature world: every config with several seeds, a table beside the paper's column.

A run that was cut goes on where it stopped: what is in DIR/results is not run again.

Example:
    tools/run_miniworld_ablations.py --output output/ablations
"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "datasets"))
sys.path.insert(0, str(ROOT / "tools"))

from miniworld_demo import draw_data  # noqa: E402

from miniworld import experiment  # noqa: E402
from regionspot.utils.files import atomic_path  # noqa: E402

# Config, what it changes, and the paper's AP on LVIS with GLIP boxes (BL; arXiv 2311.01373), where it has one.
ROWS = [
    ("RegionSpot-mini", "full model", "23.7"),
    ("ablations/token-prompt_encoder", "token of the prompt encoder", "18.6"),
    ("ablations/token-mlp", "token of the MLP", "20.4"),
    ("ablations/features-none", "no CLIP vision", "8.0"),
    ("ablations/features-feature_map", "feature map, no class token", "22.1"),
    ("ablations/depth-1", "depth 1", "23.2"),
    ("ablations/depth-6", "depth 6", "22.8"),
    ("ablations/one-box", "one box at a time", "18.5"),
    ("ablations/templates-one", "one prompt template", ""),
    ("ablations/templates-none", "bare names", "22.1"),
    ("ablations/scores-sigmoid", "sigmoid scores", ""),
]
COLUMNS = ("base_top1", "novel_top1", "novel_top1_novel_vocabulary", "AP", "APr")


def run(name: str, seed: int, args: argparse.Namespace, scenes: list) -> dict[str, Any]:
    """Return the numbers of a config and seed, from the file if it was run before."""
    path = args.output / "results" / f"{name.replace('/', '-')}-{seed}.json"
    if not path.is_file():
        output = args.output / "training" / f"{name.replace('/', '-')}-{seed}"
        cfg = experiment.miniworld_config(ROOT / "configs" / "miniworld" / f"{name}.yaml", output, seed, args.opts)
        model = experiment.train(cfg, args.output / "features")
        numbers = experiment.recognise_scenes(model.recognizer, scenes).accuracies()
        numbers.update(experiment.average_precision(cfg, model, "test"))
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(numbers))
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/ablations"), metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=3200, help="training scenes")
    parser.add_argument("--test", type=int, default=200, help="test scenes")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that draw")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    draw_data(args.output / "data", {"train": args.train, "test": args.test}, args.workers)
    scenes = experiment.test_scenes("test", args.test)
    lines = []
    for name, what, paper in ROWS:
        numbers = [run(name, seed, args, scenes) for seed in range(args.seeds)]
        scale = {column: 1 if column.startswith("AP") else 100 for column in COLUMNS}
        values = {column: [scale[column] * n[column] for n in numbers] for column in COLUMNS}
        lines.append([what, *(f"{np.mean(v):.1f} ± {np.std(v):.1f}" for v in values.values()), paper])
        headers = ["", "base top-1", "novel top-1", "novel of novel names", "AP", "APr", "the paper's AP"]
        text = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
        with atomic_path(args.output / "table.md") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}\n", flush=True)


if __name__ == "__main__":
    main()
