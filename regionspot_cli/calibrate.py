"""Finds the score below which a region is unknown."""

from argparse import Namespace

import torch
from tqdm import tqdm

from regionspot.checkpoint.checkpointer import load_model
from regionspot.config import load_config
from regionspot.data import build_test_loader, dataset_vocabulary
from regionspot.data.build import check_registered


@torch.no_grad()
def main(args: Namespace) -> float:
    # Of annotated boxes, and without the threshold that is to be determined.
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
    # The share --keep of the regions has a greater score of its best class.
    threshold = float(torch.cat(best).double().quantile(1 - args.keep))
    print(f"MODEL.REGIONSPOT.UNKNOWN.THRESHOLD {threshold:.6f}")
    return threshold
