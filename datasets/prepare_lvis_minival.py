#!/usr/bin/env python
"""Make lvis/lvis_v1_minival.json of lvis/lvis_v1_val.json: the images that lie in COCO's val2017, entry by entry."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from regionspot.data.coco_io import AnnotationFile
from regionspot.data.datasets import JsonDataset
from regionspot.utils.command_line import run_command
from regionspot.utils.files import atomic_path

EXPECTED = 4809  # images


class _Image(msgspec.Struct, gc=False):
    id: int
    coco_url: str


class _Annotation(msgspec.Struct, gc=False):
    image_id: int


def convert(source: Path, target: Path, image_root: Path) -> JsonDataset:
    """Write those images of ``source`` whose address lies in val2017, with their annotations, all else as it is.

    Raises:
        FileNotFoundError: no ``source``.
        ValueError: it is no LVIS JSON, or none of its images lies in val2017.
    """
    file = AnnotationFile(source)
    others = file.decode(dict[str, msgspec.Raw])
    kept: dict[str, list[msgspec.Raw]] = {"images": [], "annotations": []}
    ids = set()
    for start, images in file.section("images", _Image):
        for raw, image in zip(file.sections["images"][start : start + len(images)], images):
            if image.coco_url.split("/")[-2:-1] == ["val2017"]:
                ids.add(image.id)
                kept["images"].append(raw)
    if not ids:
        raise ValueError(f"{source}: none of its {len(file.sections['images'])} images has a coco_url in val2017")
    for start, annotations in file.section("annotations", _Annotation):
        pairs = zip(file.sections["annotations"][start : start + len(annotations)], annotations)
        kept["annotations"].extend(raw for raw, annotation in pairs if annotation.image_id in ids)
    with atomic_path(target) as temporary:
        temporary.write_bytes(msgspec.json.encode({**others, **kept}))
        dataset = JsonDataset(temporary, image_root)
        if (len(dataset), len(dataset.boxes)) != (len(kept["images"]), len(kept["annotations"])):
            raise ValueError(f"{target}: read again it has {len(dataset)} images and {len(dataset.boxes)} boxes")
    return dataset


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    parser.add_argument("--root", type=Path, default=root, help="default $DETECTRON2_DATASETS, or datasets")
    args = parser.parse_args(arguments)
    target = args.root / "lvis" / "lvis_v1_minival.json"
    dataset = convert(args.root / "lvis" / "lvis_v1_val.json", target, args.root / "coco")
    if len(dataset) != EXPECTED:
        print(f"warning: expected {EXPECTED:,} images of LVIS v1, got {len(dataset):,}; is lvis_v1_val.json complete?")
    print(f"{target}: {len(dataset):,} images, {len(dataset.boxes):,} boxes, {len(dataset.class_names):,} classes")


if __name__ == "__main__":
    run_command(main)
