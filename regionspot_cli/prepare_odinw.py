"""Makes ODinW's annotations without the background category, and checks all its sets."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from regionspot.data.datasets import JsonDataset
from regionspot.data.datasets.builtin import odinw_paths
from regionspot.utils.files import atomic_path

MADE, SOURCE = "annotations_without_background.json", "_annotations.coco.json"


def remove_background(source: Path, target: Path) -> None:
    """Write ``source`` without category 0, if that is the supercategory of all others and no annotation uses it."""
    try:
        content: dict[str, Any] = msgspec.json.decode(source.read_bytes())
        categories = content["categories"]
        # Roboflow names its background category after the project and makes it the supercategory of the others.
        background = next((c["name"] for c in categories if c["id"] == 0), None)
        others = [c for c in categories if c["id"] != 0]
        is_used = any(annotation["category_id"] == 0 for annotation in content["annotations"])
        if others and not is_used and all(c.get("supercategory") == background for c in others):
            content["categories"] = others
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"annotations {source}: expected Roboflow's COCO JSON; {error!r}") from error
    with atomic_path(target) as temporary:
        temporary.write_bytes(msgspec.json.encode(content))
        JsonDataset(temporary, target.parent)  # raises if the annotations are invalid: then nothing is written


def check(json_file: Path, image_root: Path) -> str:
    """Return how many images, boxes and classes a split has, and how many images are not on the disk."""
    dataset = JsonDataset(json_file, image_root)
    missing = [name for name in map(dataset.file_name, range(len(dataset))) if not Path(name).is_file()]
    summary = f"{len(dataset):,} images, {len(dataset.boxes):,} boxes, {len(dataset.class_names)} classes"
    return summary + (f"; {len(missing):,} images are missing, such as {missing[0]}" if missing else "")


def main(args: Namespace) -> None:
    missing, invalid = [], []
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
            invalid.append(f"{name}: {error}")
    for title, lines in (("missing", missing), ("wrong", invalid)):
        if lines:
            print(f"{title}:", *lines, sep="\n  ")
    if invalid:
        sys.exit(1)
