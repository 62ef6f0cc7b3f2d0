#!/usr/bin/env python
"""Draw the annotated splits of the miniature world into $DETECTRON2_DATASETS/miniworld, in LVIS format."""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))

from miniworld.annotate import write_split  # noqa: E402
from miniworld.generator import draw_captioned, draw_scene  # noqa: E402
from regionspot.utils.command_line import run_command  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(os.environ.get("DETECTRON2_DATASETS", "datasets")))
    parser.add_argument("--train", type=int, default=4000, help="scenes")
    parser.add_argument("--val", type=int, default=300, help="scenes")
    parser.add_argument("--test", type=int, default=300, help="scenes")
    parser.add_argument("--seed", type=int, default=0, help="of the world")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="only draw scenes above captioned pictures")
    args = parser.parse_args()
    if args.picture:
        scenes = [draw_scene("val", i, args.seed) for i in range(5)]
        captioned = [draw_captioned(i, args.seed) for i in range(5)]
        rows = [np.concatenate([scene.image for scene in row], axis=1) for row in (scenes, captioned)]
        Image.fromarray(np.concatenate(rows)).save(args.picture)
        print(f"{args.picture}; the captions of the lower row: {'; '.join(scene.caption for scene in captioned)}")
        return
    for split in ("train", "val", "test"):
        path = write_split(args.root / "miniworld", split, getattr(args, split), args.seed, args.workers)
        content = json.loads(path.read_text())
        held = len({annotation["category_id"] for annotation in content["annotations"]})
        print(f"{path}: {len(content['images'])} images, {len(content['annotations'])} boxes of {held} categories")


if __name__ == "__main__":
    run_command(main, kept="splits that were drawn are kept")
