"""Draws the annotated splits of the miniature world, or one sheet that shows what it is like."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
from PIL import Image

from miniworld.annotate import write_split
from miniworld.generator import draw_captioned, draw_scene


def draw_sheet(path: Path, seed: int) -> None:
    """Draw a row of scenes above a row of captioned images, and print the captions."""
    scenes = [draw_scene("val", i, seed) for i in range(5)]
    captioned = [draw_captioned(i, seed) for i in range(5)]
    rows = [np.concatenate([scene.image for scene in row], axis=1) for row in (scenes, captioned)]
    Image.fromarray(np.concatenate(rows)).save(path)
    print(f"{path}; the captions of the lower row: {'; '.join(scene.caption for scene in captioned)}")


def main(args: Namespace) -> None:
    if args.sheet:
        draw_sheet(args.sheet, args.seed)
        return
    for split in ("train", "val", "test"):
        path = write_split(args.root / "miniworld", split, getattr(args, split), args.seed, args.workers)
        content = json.loads(path.read_text())
        categories = {annotation["category_id"] for annotation in content["annotations"]}
        print(
            f"{path}: {len(content['images'])} images, {len(content['annotations'])} boxes of "
            f"{len(categories)} categories"
        )
