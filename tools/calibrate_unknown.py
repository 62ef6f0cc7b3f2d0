#!/usr/bin/env python
"""Find MODEL.REGIONSPOT.UNKNOWN.THRESHOLD: the one that keeps a share of a data set's annotated regions known.

Example:
    tools/calibrate_unknown.py --config-file configs/RegionSpot-BB.yaml --dataset lvis_v1_minival --keep 0.95 \
        MODEL.WEIGHTS regionspot_bb.pth
"""

import argparse


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="annotated regions of known classes")
    parser.add_argument("--keep", type=float, default=0.95, help="share of these regions that stay known")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides")
    args = parser.parse_args(arguments)
    if not 0 < args.keep < 1:
        parser.error(f"--keep: expected a share between 0 and 1, got {args.keep}")
    return args


if __name__ == "__main__":
    from startup import answer_first

    answer_first(parse_arguments)

import torch
from tqdm import tqdm

from regionspot.checkpoint.checkpointer import load_model
from regionspot.config import load_config
from regionspot.data import build_test_loader, dataset_vocabulary
from regionspot.data.build import check_registered
from regionspot.utils.command_line import run_command


@torch.no_grad()
def main(arguments: list[str] | None = None) -> float:
    args = parse_arguments(arguments)
    fixed = ["MODEL.REGIONSPOT.PROPOSALS.SOURCE", "gt", "MODEL.REGIONSPOT.UNKNOWN.THRESHOLD", "0.0"]
    cfg = load_config(args.config_file, [*args.opts, *fixed])
    check_registered([args.dataset], "--dataset")
    model = load_model(cfg)
    model.set_vocabulary(dataset_vocabulary(cfg, args.dataset))
    best = [
        output["regions"].top_scores[:, 0].cpu()
        for batch in tqdm(build_test_loader(cfg, args.dataset), desc=args.dataset, unit="image")
        for output in model(batch)
        if len(output["regions"])
    ]
    if not best:
        raise ValueError(f"--dataset {args.dataset}: no annotated regions")
    threshold = float(torch.cat(best).double().quantile(1 - args.keep))
    print(f"MODEL.REGIONSPOT.UNKNOWN.THRESHOLD {threshold:.6f}")
    return threshold


if __name__ == "__main__":
    run_command(main)
