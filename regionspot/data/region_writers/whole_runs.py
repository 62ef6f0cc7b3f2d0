"""Files of all images together, made from one dict of each image, in one pass and in bounded memory.

A dict has the keys ``name`` (the image's path relative to the directory of all images), ``image_id``, ``height``,
``width``; for each of N regions ``boxes`` [x0, y0, x1, y1] in original pixels, ``classes``, ``class_names``,
``scores``; and, optionally, ``detection_scores`` (with the proposals' scores), ``unknown``, ``predicted_ious``,
``masks`` (the counts of compressed RLEs), ``embeddings``. Images with an ``error`` were not read.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import pycocotools.mask as mask_utils

from regionspot.data.coco_io import write_list
from regionspot.data.region_writers.polygons import rle_polygons
from regionspot.utils.files import atomic_path

SEGMENTATIONS = ("rle", "polygons", "none")


def write_coco_results(
    images: Iterable[dict[str, Any]], path: str | Path, category_ids: Sequence[int] | None = None
) -> None:
    """Write COCO results: ``[{"image_id", "category_id", "bbox", "score", "segmentation"}, ...]``.

    Unknown regions are left out: they have no category.

    Args:
        images: dicts as above.
        path: the file, which appears whole.
        category_ids: of the K classes, as in the annotation file; by default 1 to K.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        write_list(file, _results(images, category_ids))


def _results(images: Iterable[dict[str, Any]], category_ids: Sequence[int] | None) -> Iterator[dict[str, Any]]:
    for image in images:
        for region in iterate_regions(image):
            if region["unknown"]:
                continue
            label = region["class_index"]
            entry = {
                "image_id": image["image_id"],
                "category_id": label + 1 if category_ids is None else int(category_ids[label]),
                "bbox": region["bbox"],
                "score": region["detection_score"],
            }
            yield entry if region["mask"] is None else {**entry, "segmentation": region["mask"]}


def write_coco_dataset(
    images: Iterable[dict[str, Any]],
    path: str | Path,
    vocabulary: Sequence[str],
    segmentation: str = "rle",
) -> None:
    """Write a data set in COCO's format, whose annotations are the regions, with their scores.

    Category ids are 1 to K, annotation ids 1 to their number. Unknown regions are left out, and images that could not
    be read.

    Args:
        images: dicts as above.
        path: the file, which appears whole.
        vocabulary: K class names.
        segmentation: masks as "rle", which is exact; as "polygons", which labeling tools need, with holes filled; or
            "none". Regions without a mask get their box as a polygon.

    Raises:
        ValueError: another ``segmentation``.
    """
    if segmentation not in SEGMENTATIONS:
        raise ValueError(f"segmentation: expected one of {', '.join(SEGMENTATIONS)}, got {segmentation!r}")
    categories = [{"id": index, "name": name} for index, name in enumerate(vocabulary, 1)]
    encode = msgspec.json.encode
    # One pass over the images fills two lists; the second one is a file of its own until the end.
    with (
        atomic_path(path) as temporary,
        temporary.open("wb") as file,
        tempfile.TemporaryFile(dir=temporary.parent) as annotations,
    ):
        file.write(b'{"info": {"description": "regions recognized by RegionSpot"},\n"licenses": [],\n')
        file.write(b'"categories": ' + encode(categories) + b',\n"images": ')
        write_list(file, _dataset_images(images, annotations, segmentation))
        file.write(b',"annotations": [\n')
        annotations.seek(0)
        shutil.copyfileobj(annotations, file)
        file.write(b"]}\n")


def _dataset_images(
    images: Iterable[dict[str, Any]], annotations: IO[bytes], segmentation: str
) -> Iterator[dict[str, Any]]:
    """Yield the entries of ``images``, and write the annotations of each."""
    number = 0
    for image in images:
        if image.get("error"):
            continue
        for region in iterate_regions(image):
            if region["unknown"]:
                continue
            number += 1
            entry = _annotation(number, image["image_id"], region, segmentation)
            annotations.write((b",\n" if number > 1 else b"") + msgspec.json.encode(entry))
        yield {"id": image["image_id"], "file_name": image["name"], "height": image["height"], "width": image["width"]}


def _annotation(number: int, image_id: int, region: dict[str, Any], segmentation: str) -> dict[str, Any]:
    x, y, width, height = region["bbox"]
    mask, area = region["mask"], width * height
    outline: Any = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    if mask is not None and segmentation != "none":
        area = float(mask_utils.area(mask))
        outline = mask if segmentation == "rle" else (rle_polygons(mask) or outline)
    return {
        "id": number,
        "image_id": image_id,
        "category_id": region["class_index"] + 1,
        "bbox": region["bbox"],
        "area": area,
        "iscrowd": 0,
        "segmentation": outline,
        "score": region["detection_score"],
    }


def iterate_regions(image: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the regions of an image's dict; ``bbox`` is XYWH in float64, in which float32 corners are exact."""
    boxes = np.asarray(image["boxes"], np.float32).astype(np.float64).reshape(-1, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    missing: list[None] = [None] * len(boxes)
    scores = image["scores"]
    columns = (
        image["classes"],
        image["class_names"],
        scores,
        image.get("detection_scores") or scores,
        image.get("unknown") or missing,
        image.get("predicted_ious") or missing,
        image.get("masks") or missing,
        image.get("embeddings") or missing,
    )
    size = [image["height"], image["width"]]
    for index, (label, name, score, detection_score, unknown, iou, counts, embedding) in enumerate(zip(*columns)):
        yield {
            "index": index,
            "box": boxes[index].tolist(),
            "bbox": [*boxes[index, :2].tolist(), *sides[index].tolist()],
            "class_index": label,
            "label": name,
            "score": score,
            "detection_score": detection_score,
            "unknown": bool(unknown),
            "iou": iou,
            "mask": None if counts is None else {"size": size, "counts": counts},
            "embedding": embedding,
        }
