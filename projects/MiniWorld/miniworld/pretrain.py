"""Trains the frozen parts of the miniature world, SAM and CLIP, from scratch."""

import json
import math
import pkgutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from miniworld.packing import pack_weights
from regionspot.checkpoint.formats import load_checkpoint_file
from regionspot.utils.files import atomic_path, sha256_of_file

# Imported when they are chosen: sam2 and siglip need the extra "models".
TASKS = {
    "clip": "miniworld.pretrain_clip:ClipPretraining",
    "sam": "miniworld.pretrain_sam:SamPretraining",
    "sam2": "miniworld.pretrain_sam2:Sam2Pretraining",
    "siglip": "miniworld.pretrain_siglip:SiglipPretraining",
}


def learning_rate(iteration: int, steps: int, peak: float) -> float:
    """Return the rate of an iteration: 200 to warm up, then a cosine to a hundredth."""
    warm = min(1.0, (iteration + 1) / 200)
    return peak * warm * (0.505 + 0.495 * math.cos(math.pi * iteration / steps))


def train(task: Any, args: Namespace, checkpoint: Path) -> None:
    """Train ``task`` to the end, from the checkpoint if there is one."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    task.to(device).train()
    optimizer = torch.optim.AdamW(task.parameters(), lr=args.lr, weight_decay=0.05, betas=(0.9, 0.98))
    start = 0
    if checkpoint.is_file():
        saved = load_checkpoint_file(checkpoint)
        task.load_state_dict(saved["task"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["iteration"]
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.model)
    mean = float("nan")
    for iteration in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, args.steps, args.lr)
        batch = task.batch(iteration, iteration / args.steps, args.batch)
        moved = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.amp):
            loss = task(**moved)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
        bar.set_postfix(loss=f"{mean:.3f}")
        if (iteration + 1) % args.save_every == 0 or iteration + 1 == args.steps:
            state = {"task": task.state_dict(), "optimizer": optimizer.state_dict(), "iteration": iteration + 1}
            with atomic_path(checkpoint) as temporary:
                torch.save(state, temporary)
            task.eval()
            report = task.report()
            task.train()
            tqdm.write(f"{iteration + 1}: loss {mean:.3f}, " + ", ".join(f"{k} {v:.3f}" for k, v in report.items()))


def main(args: Namespace) -> None:
    torch.manual_seed(args.seed)
    task = pkgutil.resolve_name(TASKS[args.model])(args.output, args.seed, args.images, args.workers)
    train(task, args, args.output / f"{args.model}.pth")
    with atomic_path(args.output / f"{args.model}.safetensors") as temporary:
        save_file(pack_weights(task.state()), temporary)
    task.eval()
    report = {
        "command": f"miniworld pretrain {args.model} --steps {args.steps} --batch {args.batch} --lr {args.lr} "
        f"--images {args.images} --seed {args.seed}",
        "sha256": sha256_of_file(args.output / f"{args.model}.safetensors"),
        "versions": {"numpy": np.__version__, "torch": torch.__version__},
        **task.report(),
    }
    with atomic_path(args.output / f"{args.model}.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1))
    print(f"weights and their report are in {args.output / args.model}.safetensors and .json")
