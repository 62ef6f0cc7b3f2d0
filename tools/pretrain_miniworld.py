#!/usr/bin/env python
"""Train the frozen parts of the miniature world, SAM and CLIP, from nothing.

Run again after an interruption it goes on from its last checkpoint.

Examples:
    tools/pretrain_miniworld.py clip --output output/pretrain
    tools/pretrain_miniworld.py sam --output output/pretrain
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

# steps, batch, learning rate, pictures
RECIPES = {"clip": (6000, 64, 1e-3, 40000), "sam": (5000, 8, 1e-3, 6000)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(RECIPES), help="which part")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="checkpoint, pictures and result")
    parser.add_argument("--steps", type=int, help="iterations")
    parser.add_argument("--batch", type=int, help="pictures in a batch")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--pictures", type=int, help="pictures to draw")
    parser.add_argument("--seed", type=int, default=0, help="of pictures, weights and batches")
    parser.add_argument("--device", help="default: cuda, where there is one")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that draw")
    parser.add_argument("--save-every", type=int, default=250, help="iterations between checkpoints")
    args = parser.parse_args()
    for key, value in zip(("steps", "batch", "lr", "pictures"), RECIPES[args.what]):
        if getattr(args, key) is None:
            setattr(args, key, value)
    return args


if __name__ == "__main__":
    from startup import answer_first

    answer_first(parse_arguments)

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "datasets"))

from miniworld.pretrain_clip import ClipPretraining
from miniworld.pretrain_sam import SamPretraining
from miniworld.weights import pack_weights
from regionspot.checkpoint.formats import load_checkpoint_file
from regionspot.utils.command_line import run_command
from regionspot.utils.files import atomic_path, sha256_of_file

TASKS: dict[str, type[ClipPretraining] | type[SamPretraining]] = {"clip": ClipPretraining, "sam": SamPretraining}


def learning_rate(iteration: int, steps: int, peak: float) -> float:
    """Return the rate of an iteration: 200 to warm up, then a cosine to a hundredth."""
    warm = min(1.0, (iteration + 1) / 200)
    return peak * warm * (0.505 + 0.495 * math.cos(math.pi * iteration / steps))


def train(task: ClipPretraining | SamPretraining, args: argparse.Namespace, checkpoint: Path) -> None:
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
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.what)
    mean = float("nan")
    for iteration in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, args.steps, args.lr)
        batch = task.batch(iteration, iteration / args.steps, args.batch)
        moved = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        with torch.autocast(device.type, dtype=torch.bfloat16):
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


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    task = TASKS[args.what](args.output, args.seed, args.pictures, args.workers)
    train(task, args, args.output / f"{args.what}.pth")
    with atomic_path(args.output / f"{args.what}.safetensors") as temporary:
        save_file(pack_weights(task.state()), temporary)
    task.eval()
    report = {
        "command": f"tools/pretrain_miniworld.py {args.what} --steps {args.steps} --batch {args.batch} --lr {args.lr} "
        f"--pictures {args.pictures} --seed {args.seed}",
        "sha256": sha256_of_file(args.output / f"{args.what}.safetensors"),
        "versions": {"numpy": np.__version__, "torch": torch.__version__},
        **task.report(),
    }
    with atomic_path(args.output / f"{args.what}.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1))
    print(f"weights and their report are in {args.output / args.what}.safetensors and .json")


if __name__ == "__main__":
    run_command(main, kept="the last checkpoint is kept")
