"""Makes LVIS minival of LVIS val."""

from argparse import Namespace
from pathlib import Path

import msgspec

from regionspot.data.coco_io import AnnotationFile
from regionspot.data.datasets import JsonDataset
from regionspot.utils.files import atomic_path

EXPECTED = 4809  # images


class _Image(msgspec.Struct, gc=False):
    id: int
    coco_url: str


class _Annotation(msgspec.Struct, gc=False):
    image_id: int


def convert(source: Path, target: Path, image_root: Path) -> JsonDataset:
    """Write the images of ``source`` whose URL is in val2017, with their annotations and all other sections.

    Raises:
        FileNotFoundError: no ``source``.
        ValueError: not LVIS JSON, or none of its images is in val2017.
    """
    file = AnnotationFile(source)
    sections = file.decode(dict[str, msgspec.Raw])
    # Entries are copied as bytes: decoding and encoding polygons would change the digits of their coordinates.
    selected: dict[str, list[msgspec.Raw]] = {"images": [], "annotations": []}
    image_ids = set()
    for start, images in file.section("images", _Image):
        for raw, image in zip(file.sections["images"][start : start + len(images)], images):
            if image.coco_url.split("/")[-2:-1] == ["val2017"]:
                image_ids.add(image.id)
                selected["images"].append(raw)
    if not image_ids:
        raise ValueError(f"{source}: none of its {len(file.sections['images'])} images has a coco_url in val2017")
    for start, annotations in file.section("annotations", _Annotation):
        pairs = zip(file.sections["annotations"][start : start + len(annotations)], annotations)
        selected["annotations"].extend(raw for raw, annotation in pairs if annotation.image_id in image_ids)
    with atomic_path(target) as temporary:
        temporary.write_bytes(msgspec.json.encode({**sections, **selected}))
        dataset = JsonDataset(temporary, image_root)
        if (len(dataset), len(dataset.boxes)) != (len(selected["images"]), len(selected["annotations"])):
            raise ValueError(f"{target}: read again it has {len(dataset)} images and {len(dataset.boxes)} boxes")
    return dataset


def main(args: Namespace) -> None:
    target = args.root / "lvis" / "lvis_v1_minival.json"
    dataset = convert(args.root / "lvis" / "lvis_v1_val.json", target, args.root / "coco")
    if len(dataset) != EXPECTED:
        print(f"warning: expected {EXPECTED:,} images of LVIS v1, got {len(dataset):,}; is lvis_v1_val.json complete?")
    print(f"{target}: {len(dataset):,} images, {len(dataset.boxes):,} boxes, {len(dataset.class_names):,} classes")
