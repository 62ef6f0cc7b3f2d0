#!/usr/bin/env python
"""Make the ODinW sets' annotations_without_background.json where only Roboflow's are there, and check all of them.

Below --root/odinw, the benchmark's archive unpacked. Roboflow's `_annotations.coco.json` begins with a category that
stands for all others and has no boxes; it is left out. Says what each split holds, and what is missing.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from regionspot.data.datasets import JsonDataset
from regionspot.data.datasets.builtin import odinw_paths
from regionspot.utils.command_line import run_command
from regionspot.utils.files import atomic_path

MADE, SOURCE = "annotations_without_background.json", "_annotations.coco.json"


def remove_background(source: Path, target: Path) -> None:
    """Write ``source`` without category 0, if that is the supercategory of all others and no annotation uses it."""
    try:
        content: dict[str, Any] = msgspec.json.decode(source.read_bytes())
        categories = content["categories"]
        background = next((c["name"] for c in categories if c["id"] == 0), None)
        others = [c for c in categories if c["id"] != 0]
        is_used = any(annotation["category_id"] == 0 for annotation in content["annotations"])
        if others and not is_used and all(c.get("supercategory") == background for c in others):
            content["categories"] = others
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"annotations {source}: expected Roboflow's COCO JSON; {error!r}") from error
    with atomic_path(target) as temporary:
        temporary.write_bytes(msgspec.json.encode(content))
        JsonDataset(temporary, target.parent)


def check(json_file: Path, image_root: Path) -> str:
    """Return what a split holds, and how many of its images are missing on the disk."""
    dataset = JsonDataset(json_file, image_root)
    missing = [name for name in map(dataset.file_name, range(len(dataset))) if not Path(name).is_file()]
    held = f"{len(dataset):,} images, {len(dataset.boxes):,} boxes, {len(dataset.class_names)} classes"
    return held + (f"; {len(missing):,} images are missing, such as {missing[0]}" if missing else "")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    parser.add_argument("--root", type=Path, default=root, help="default $DETECTRON2_DATASETS, or datasets")
    args = parser.parse_args(arguments)
    missing, wrong = [], []
    for name, (json_file, image_root) in tqdm(odinw_paths(args.root).items(), desc="ODinW", leave=False):
        source = json_file.with_name(SOURCE)
        try:
            made = not json_file.is_file() and json_file.name == MADE and source.is_file()
            if made:
                remove_background(source, json_file)
            if json_file.is_file():
                tqdm.write(f"{name}: {check(json_file, image_root)}{' (made now)' if made else ''}")
            else:
                missing.append(f"{name}: {json_file}")
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    for title, lines in (("missing", missing), ("wrong", wrong)):
        if lines:
            print(f"{title}:", *lines, sep="\n  ")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main, kept="what was made is kept")
