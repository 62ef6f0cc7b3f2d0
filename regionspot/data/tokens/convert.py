"""Import of tokens that the authors published: one ``<image_id>.pth`` an image."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from tqdm import tqdm

from regionspot.checkpoint.weights import load_checkpoint_file
from regionspot.data.dataset_mapper import annotated_regions, has_area, read_annotations
from regionspot.data.datasets import category_ids
from regionspot.data.tokens.writer import StoreWriter, pack_images

logger = logging.getLogger(__name__)

OUTCOMES = ("imported", "without regions", "without a file", "damaged", "of other regions")


def convert_tokens(
    token_directory: str | Path, dataset_name: str, stage: str, dim: int, directory: str | Path, origin: dict[str, Any]
) -> dict[str, int]:
    """Pack a directory of the authors' files into a token store.

    Such a file is a dict with ``mask_tokens`` (N, 1, D) or (N, D) and ``classes`` (N,), the raw category ids. It has
    no boxes: they are those of the data set's annotations, which must be of the same classes in the same order.

    Args:
        token_directory: where the files lie.
        dataset_name: the registered data set that they are of.
        stage: of SAM, that the tokens were taken from.
        dim: length D that a token of this stage has.
        directory: of the store.
        origin: what the manifest begins with, see ``regionspot.engine.extract.describe_store``.

    Returns:
        Numbers of images: "imported", "without regions", "without a file", "damaged" and "of other regions", of which
        only the first are in the store.

    Raises:
        ValueError: nothing could be imported, or there is a finished store.
    """
    counts = dict.fromkeys(OUTCOMES, 0)
    records, raw = DatasetCatalog.get(dataset_name), category_ids(dataset_name)
    size = origin["images of a shard"]
    writer = StoreWriter(directory, origin, -(-len(records) // size))
    if writer.is_complete():
        raise ValueError(f"{directory} holds a finished store already; delete it first, or give another directory")
    with tqdm(total=len(records), desc=f"tokens of {dataset_name}", unit="image") as bar:
        for number in range(writer.number):
            images, rows = [], range(number * size, min((number + 1) * size, len(records)))
            for index in rows:
                what, entry = _convert(records[index], Path(token_directory), raw, stage, dim)
                counts[what] += 1
                images += [entry] if entry else []
                bar.update()
            writer.write(number, pack_images(images), len(rows))
    if not counts["imported"]:
        shutil.rmtree(directory)
        raise ValueError(
            f"{token_directory}: no file fits data set {dataset_name!r}; {counts}. Is it the right data set?"
        )
    writer.finish()
    return counts


def _convert(
    record: dict[str, Any], token_directory: Path, raw: np.ndarray, stage: str, dim: int
) -> tuple[str, dict[str, Any] | None]:
    """Return what became of an image, and its entry in the store if it was imported."""
    instances = annotated_regions(record)
    path = token_directory / f"{record['image_id']}.pth"
    if not len(instances):
        return "without regions", None
    if not path.is_file():
        return "without a file", None
    try:
        content = load_checkpoint_file(path)
        tokens, classes = content["mask_tokens"], [int(c) for c in content["classes"]]
        tokens = tokens.reshape(len(classes), dim)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        logger.warning("%s is left out: expected mask_tokens (N, %d) and classes (N,); %s", path, dim, error)
        return "damaged", None
    rows = _matching_rows(record, raw, classes, len(instances))
    if rows is None:
        logger.warning("%s is left out: its %d classes are not those of the annotations", path, len(classes))
        return "of other regions", None
    entry = {"image_id": record["image_id"], "boxes": instances.gt_boxes.tensor, "labels": instances.gt_classes}
    return "imported", {**entry, f"tokens.{stage}": tokens[rows].float()}


def _matching_rows(record: dict[str, Any], raw: np.ndarray, classes: list[int], number: int) -> list[int] | None:
    """Return which rows of a file are the regions that are learned from, or None if it is of other regions.

    ``raw`` has the category id of each label, ``classes`` those of the file, and ``number`` regions are learned from.
    The file may have all annotations, or all but crowds, or all but crowds and boxes without area.
    """
    annotations = record["annotations"]
    single = [not annotation.get("iscrowd", 0) for annotation in annotations]
    boxes, _ = read_annotations({"annotations": [{**annotation, "iscrowd": 0} for annotation in annotations]})
    learned = [a and b for a, b in zip(single, has_area(boxes, (record["height"], record["width"])))]
    assert sum(learned) == number
    for present in ([True] * len(annotations), single, learned):
        rows = [i for i, there in enumerate(present) if there]
        if [raw[annotations[i]["category_id"]] for i in rows] == classes:
            return [k for k, i in enumerate(rows) if learned[i]]
    return None
