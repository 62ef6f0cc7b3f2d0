"""Checking a data set: which images cannot be used, which boxes are left out, and statistics of the rest."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import clip
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch.utils.data import DataLoader, Dataset

from regionspot.data.build import check_registered
from regionspot.data.dataset_mapper import RegionSpotDatasetMapper, read_annotations
from regionspot.data.datasets import category_ids
from regionspot.structures import clipped_sides, has_area
from regionspot.vocabulary import TEMPLATE_SETS, clean_name, dataset_names

CONTEXT = 77  # tokens of a prompt, for all CLIP models
LEFT_OUT = ("crowds", "boxes without area", "boxes outside the image")


@dataclass
class ImageCheck:
    """The check of one image."""

    problem: str  # why the image cannot be used, "" if it can
    left_out: tuple[int, int, int]  # numbers of annotations that are not used, by ``LEFT_OUT``
    sides: np.ndarray  # (n, 2) float32 width and height of the used boxes, clipped to the image, pixels
    labels: np.ndarray  # (n,) int32, their classes


class _CheckedImages(Dataset):
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
    """Divide the boxes of a record into those that are used and those that are left out."""
    boxes, labels = read_annotations(record, with_crowds=True)
    boxes = boxes.astype(np.float32)  # as the model sees them: a box may lose its area by rounding
    is_crowd = np.array([bool(annotation.get("iscrowd", 0)) for annotation in record.get("annotations", [])], bool)
    size = (int(record["height"]), int(record["width"]))
    is_flat = ~is_crowd & ~(boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    is_used = ~is_crowd & has_area(boxes, size)
    left_out = (int(is_crowd.sum()), int(is_flat.sum()), int((~is_used & ~is_flat & ~is_crowd).sum()))
    return ImageCheck(problem, left_out, clipped_sides(boxes, size)[is_used], labels[is_used].astype(np.int32))


def check_dataset(name: str, workers: int = 0, progress: Callable[[Any, int], Any] = lambda x, _: x) -> dict[str, Any]:
    """Read the annotations and every image of a data set.

    Args:
        name: a registered name, or "annotations.json:directory_of_images".
        workers: processes that read images.
        progress: wraps the iterator over images, given their number, in a progress bar.

    Returns:
        A report for JSON, in which "images", "regions" and "classes" are numbers.

    Raises:
        KeyError, FileNotFoundError, ValueError: an unknown data set, or annotations that cannot be read.
    """
    check_registered([name], "data set")
    category_ids(name)  # refuses names that are not those of the annotations
    records, names = DatasetCatalog.get(name), dataset_names(name)
    loader = DataLoader(_CheckedImages(records), batch_size=8, num_workers=workers, collate_fn=list)
    checks = list(progress((check for batch in loader for check in batch), len(records)))
    # An empty array first, since a data set may have no image.
    labels = np.concatenate([np.zeros(0, np.int32), *(check.labels for check in checks)])
    sides = np.concatenate([np.zeros((0, 2), np.float32), *(check.sides for check in checks)])
    is_unknown = (labels < 0) | (labels >= len(names))
    if is_unknown.any():
        raise ValueError(f"data set {name!r}: class {labels[is_unknown][0]} is none of its {len(names)} classes")
    num_regions = np.array([len(check.labels) for check in checks], np.int64)
    return {
        "dataset": name,
        "annotations": MetadataCatalog.get(name).get("json_file", ""),
        "images": len(records),
        "regions": len(labels),
        "classes": len(names),
        "unusable": [
            {
                "image_id": records[index].get("image_id"),
                "file_name": str(records[index].get("file_name")),
                "problem": check.problem,
            }
            for index, check in enumerate(checks)
            if check.problem
        ],
        "left_out": dict(
            zip(LEFT_OUT, np.array([x.left_out for x in checks], int).reshape(-1, len(LEFT_OUT)).sum(axis=0).tolist())
        ),
        "images_without_regions": int((num_regions == 0).sum()),
        "statistics": describe_boxes(num_regions, sides),
        "regions_of_classes": dict(zip(names, np.bincount(labels, minlength=len(names)).tolist())),
        "names": check_class_names(names),
    }


def describe_boxes(num_regions: np.ndarray, sides: np.ndarray) -> dict[str, Any]:
    """Return quartiles of the regions per image (I,) and of the geometric mean of sides (N, 2), and COCO's sizes."""
    # The geometric mean of a box's sides is the root of its area, which COCO's sizes refer to.
    quartiles = partial(np.percentile, q=[0, 25, 50, 75, 100])
    lengths = np.sqrt(sides.astype(np.float64).prod(axis=1))
    counts = np.histogram(lengths, [0, 32, 96, np.inf])[0]  # COCO's limits of small, medium and large
    return {
        "regions_of_image": quartiles(num_regions).round(2).tolist() if len(num_regions) else [],
        "side_in_pixels": quartiles(lengths).round(2).tolist() if len(lengths) else [],
        **dict(zip(("small", "medium", "large"), counts.tolist())),
    }


def check_class_names(names: list[str]) -> dict[str, list[str]]:
    """Return the names that CLIP cannot encode, "empty" and "too_long" ones, and "duplicates"."""
    # in the template of the most tokens, since evaluation encodes all of them; the end of the text has the largest id
    templates = [template for templates in TEMPLATE_SETS.values() for template in templates]
    longest = max(templates, key=lambda template: int(clip.tokenize(template.format("a"), CONTEXT).argmax()))
    refused: dict[str, list[str]] = {"empty": [], "too_long": []}
    for name in names:
        if not name.strip():
            refused["empty"].append(name)
            continue
        try:
            clip.tokenize(longest.format(clean_name(name)), CONTEXT)
        except RuntimeError:
            refused["too_long"].append(name)
    return {**refused, "duplicates": [name for name, count in Counter(names).items() if count > 1]}


def is_usable(report: dict[str, Any]) -> bool:
    """Return whether training and evaluation on the reported data set end without an error."""
    return not report["unusable"] and not any(report["names"][key] for key in ("empty", "too_long"))
