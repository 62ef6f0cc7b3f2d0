"""Finds the score below which a region is unknown."""

from argparse import Namespace

import numpy as np
import torch
from tqdm import tqdm

from regionspot.checkpoint.checkpointer import load_model
from regionspot.config import load_config
from regionspot.data import build_test_loader, dataset_vocabulary
from regionspot.data.build import check_registered


def threshold_of(scores: np.ndarray, keep: float) -> float:
    """Return the score that the share ``keep`` of regions exceeds; ``scores`` (N,) are those of their best classes."""
    return float(np.quantile(scores.astype(np.float64), 1 - keep))  # torch.quantile takes 16 million numbers at most


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
    threshold = threshold_of(torch.cat(best).numpy(), args.keep)
    print(f"MODEL.REGIONSPOT.UNKNOWN.THRESHOLD {threshold:.6f}")
    return threshold
