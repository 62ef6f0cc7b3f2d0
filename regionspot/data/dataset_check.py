"""What of a data set cannot be used, what is left out, and what the rest is like: every image is read."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import clip
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from torch.utils.data import DataLoader, Dataset

from regionspot.data.build import check_registered
from regionspot.data.dataset_mapper import RegionSpotDatasetMapper, has_area
from regionspot.data.datasets import category_ids
from regionspot.vocabulary import TEMPLATE_SETS, clean_name, dataset_names

CONTEXT = 77  # tokens of a prompt, of every CLIP
LEFT_OUT = ("crowds", "boxes without area", "boxes outside the image")


@dataclass
class ImageCheck:
    """What was found of one image.

    Attributes:
        problem: why the image cannot be used, "" if it can.
        left_out: how many annotations are not used, by ``LEFT_OUT``.
        sides: (n, 2) float32 width and height of the boxes that are used, cut to the image, in pixels.
        labels: (n,) int32, their classes.
    """

    problem: str
    left_out: tuple[int, int, int]
    sides: np.ndarray
    labels: np.ndarray


class _Checked(Dataset):
    def __init__(self, records: Any) -> None:
        self.records = records
        self.mapper = RegionSpotDatasetMapper(augmentations=[], image_format="RGB")  # reads as training does

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> ImageCheck:
        record, problem = self.records[index], ""
        try:
            self.mapper(record)
        except (ValueError, OSError) as error:
            problem = " ".join(str(error).split())
        return _check_boxes(record, problem)


def _check_boxes(record: dict[str, Any], problem: str) -> ImageCheck:
    """Sort the boxes of a record into those that are used and those that are not."""
    annotations = record.get("annotations", [])
    boxes = np.zeros((len(annotations), 4), np.float32)
    for box, annotation in zip(boxes, annotations):
        box[:] = BoxMode.convert(list(annotation["bbox"]), BoxMode(annotation["bbox_mode"]), BoxMode.XYXY_ABS)
    labels = np.array([a["category_id"] for a in annotations], np.int32)
    crowd = np.array([a.get("iscrowd", 0) for a in annotations], np.int64) > 0
    size = (int(record["height"]), int(record["width"]))
    flat = ~(boxes[:, 2:] - boxes[:, :2] > 0).all(axis=1)
    used = np.array(has_area(boxes, size), np.bool_) & ~crowd
    high = np.array([size[1], size[0]], np.float32)
    sides = np.clip(boxes[:, 2:], 0, high) - np.clip(boxes[:, :2], 0, high)
    left_out = (int(crowd.sum()), int((flat & ~crowd).sum()), int((~used & ~flat & ~crowd).sum()))
    return ImageCheck(problem, left_out, sides[used], labels[used])


def check_dataset(name: str, workers: int = 0, progress: Callable[[Any, int], Any] = lambda x, _: x) -> dict[str, Any]:
    """Read the annotations and every image of a data set.

    Args:
        name: a registered name, or "annotations.json:directory_of_images".
        workers: processes that read images.
        progress: wraps the iterator over images, given their number, in a progress bar.

    Returns:
        What can be written as JSON: "dataset", "annotations" (the file), "images", "regions", "classes" (numbers),
        "unusable" (images: ``image_id``, ``file_name``, ``problem``), "left_out" (numbers of annotations),
        "images_without_regions", "statistics", "regions_of_classes" and "names" (those that CLIP cannot take, and
        those that occur twice).

    Raises:
        KeyError, FileNotFoundError, ValueError: the data set is not known, or its annotations cannot be read.
    """
    check_registered([name], "data set")
    category_ids(name)  # are the names those of the annotations?
    records, names = DatasetCatalog.get(name), dataset_names(name)
    loader = DataLoader(_Checked(records), batch_size=8, num_workers=workers, collate_fn=list)
    checks = list(progress((check for batch in loader for check in batch), len(records)))
    labels = np.concatenate([np.zeros(0, np.int32), *(check.labels for check in checks)])
    sides = np.concatenate([np.zeros((0, 2), np.float32), *(check.sides for check in checks)])
    wrong = (labels < 0) | (labels >= len(names))
    if wrong.any():
        raise ValueError(f"data set {name!r}: class {labels[wrong][0]} is none of its {len(names)} classes")
    unusable = [{**_describe(records[i]), "problem": check.problem} for i, check in enumerate(checks) if check.problem]
    numbers = np.array([len(check.labels) for check in checks], np.int64)
    return {
        "dataset": name,
        "annotations": MetadataCatalog.get(name).get("json_file", ""),
        "images": len(records),
        "regions": len(labels),
        "classes": len(names),
        "unusable": unusable,
        "left_out": dict(zip(LEFT_OUT, np.sum([check.left_out for check in checks], axis=0, dtype=int).tolist())),
        "images_without_regions": int((numbers == 0).sum()),
        "statistics": describe_boxes(numbers, sides),
        "regions_of_classes": dict(zip(names, np.bincount(labels, minlength=len(names)).tolist())),
        "names": check_class_names(names),
    }


def _describe(record: dict[str, Any]) -> dict[str, Any]:
    return {"image_id": record.get("image_id"), "file_name": str(record.get("file_name"))}


def describe_boxes(numbers: np.ndarray, sides: np.ndarray) -> dict[str, Any]:
    """Return quartiles of (I,) regions an image and of the (N, 2) sides' geometric mean, and COCO's sizes."""
    quartiles = partial(np.percentile, q=[0, 25, 50, 75, 100])
    lengths = np.sqrt(sides.astype(np.float64).prod(axis=1))
    counts = np.histogram(lengths, [0, 32, 96, np.inf])[0]
    return {
        "regions_of_image": quartiles(numbers).round(2).tolist() if len(numbers) else [],
        "side_in_pixels": quartiles(lengths).round(2).tolist() if len(lengths) else [],
        **dict(zip(("small", "medium", "large"), counts.tolist())),
    }


def check_class_names(names: list[str]) -> dict[str, list[str]]:
    """Return the names that are "empty" or "too_long" for CLIP, which refuses them, and "duplicates"."""
    longest = max((template for templates in TEMPLATE_SETS.values() for template in templates), key=len)
    found: dict[str, list[str]] = {"empty": [], "too_long": []}
    for name in names:
        if not name.strip():
            found["empty"].append(name)
            continue
        try:
            clip.tokenize(longest.format(clean_name(name)), CONTEXT)
        except RuntimeError:
            found["too_long"].append(name)
    return {**found, "duplicates": [name for name, number in Counter(names).items() if number > 1]}


def is_usable(report: dict[str, Any]) -> bool:
    """Whether a report names nothing that training or evaluation would end at."""
    return not report["unusable"] and not any(report["names"][key] for key in ("empty", "too_long"))
