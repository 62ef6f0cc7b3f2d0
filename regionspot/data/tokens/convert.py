"""Import of tokens that the authors published: one ``<image_id>.pth`` per image."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from tqdm import tqdm

from regionspot.checkpoint.formats import load_checkpoint_file
from regionspot.data.dataset_mapper import annotated_regions, read_annotations
from regionspot.data.datasets import category_ids
from regionspot.data.tokens.writer import StoreWriter, pack_images
from regionspot.structures import has_area

logger = logging.getLogger(__name__)

OUTCOMES = ("imported", "without regions", "without a file", "damaged", "of other regions")


def convert_tokens(
    token_directory: str | Path,
    dataset_name: str,
    stage: str,
    dim: int,
    directory: str | Path,
    origin: dict[str, Any],
) -> dict[str, int]:
    """Pack a directory of the authors' files into a token store.

    A file is a dict of ``mask_tokens`` (N, 1, D) or (N, D) and ``classes`` (N,), the category ids of the annotation
    file. It has no boxes: they are taken from the annotations, whose classes must be the same in the same order.

    Args:
        token_directory: the authors' files.
        dataset_name: the registered data set that the tokens were extracted from.
        stage: SAM's stage that the tokens were taken from.
        dim: length D of a token of this stage.
        directory: the store.
        origin: the beginning of its manifest, see ``regionspot.engine.extract.describe_store``.

    Returns:
        The number of images for each of ``OUTCOMES``; the store has the imported ones.

    Raises:
        ValueError: nothing could be imported, or there is a finished store.
    """
    counts = dict.fromkeys(OUTCOMES, 0)
    records, raw_ids = DatasetCatalog.get(dataset_name), category_ids(dataset_name)
    size = origin["shard_images"]
    writer = StoreWriter(directory, origin, -(-len(records) // size))
    if writer.is_complete():
        raise ValueError(f"{directory} holds a finished store already; delete it first, or give another directory")
    with tqdm(total=len(records), desc=f"tokens of {dataset_name}", unit="image") as bar:
        for shard in range(writer.num_shards):
            images, rows = [], range(shard * size, min((shard + 1) * size, len(records)))
            for index in rows:
                path = Path(token_directory) / f"{records[index]['image_id']}.pth"
                outcome, entry = _convert(records[index], path, raw_ids, dim)
                counts[outcome] += 1
                if entry is not None:
                    images.append({f"tokens.{stage}" if key == "tokens" else key: x for key, x in entry.items()})
                bar.update()
            # Empty shards are written, too: images and shards correspond as in an extraction.
            writer.write(shard, pack_images(images), len(rows))
    if not counts["imported"]:
        shutil.rmtree(directory)
        raise ValueError(
            f"{token_directory}: no file fits data set {dataset_name!r}; {counts}. Is it the right data set?"
        )
    writer.finish()
    return counts


def _convert(record: dict[str, Any], path: Path, raw_ids: np.ndarray, dim: int) -> tuple[str, dict[str, Any] | None]:
    """Return one of ``OUTCOMES`` for an image, and its entry in the store if it was imported."""
    instances = annotated_regions(record)
    if not len(instances):
        return "without regions", None
    if not path.is_file():
        return "without a file", None
    try:
        content = load_checkpoint_file(path)
        tokens, classes = content["mask_tokens"], [int(c) for c in content["classes"]]
        tokens = tokens.reshape(len(classes), dim)
        if not tokens.half().isfinite().all():  # as they are stored
            raise ValueError("got numbers that are not finite in float16")
    # A file with other contents must not end the import of a million others.
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        logger.warning("%s is left out: expected mask_tokens (N, %d) and classes (N,); %s", path, dim, error)
        return "damaged", None
    rows = _matching_rows(record, raw_ids, classes)
    if rows is None:
        logger.warning("%s is left out: its %d classes are not those of the annotations", path, len(classes))
        return "of other regions", None
    return "imported", {
        "image_id": record["image_id"],
        "boxes": instances.gt_boxes.tensor,
        "labels": instances.gt_classes,
        "tokens": tokens[rows].float(),
    }


def _matching_rows(record: dict[str, Any], raw_ids: np.ndarray, classes: list[int]) -> list[int] | None:
    """Return the rows of a file that are regions to learn from, or None if its classes are not the annotations'.

    Args:
        record: of the image.
        raw_ids: category id of each label.
        classes: category ids in the file.
    """
    # The authors' files may have all annotations, all but crowds, or all but crowds and boxes without area.
    boxes, labels = read_annotations(record, with_crowds=True)
    is_crowd = np.array([bool(annotation.get("iscrowd", 0)) for annotation in record["annotations"]])
    is_region = ~is_crowd & has_area(boxes, (record["height"], record["width"]))
    for is_in_file in (np.ones_like(is_region), ~is_crowd, is_region):
        if raw_ids[labels[is_in_file]].tolist() == classes:
            return np.flatnonzero(is_region[is_in_file]).tolist()
    return None
