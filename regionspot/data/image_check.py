"""Whether the images of a data set are there: every path, and a few files, before hours of work begin."""

import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.data.dataset_mapper import RegionSpotDatasetMapper, UnreadableImageError

logger = logging.getLogger(__name__)

_SAMPLE = 16  # images that are decoded
_LISTED = 3  # images that a message names
_FEW = 100  # paths of a directory that are looked up one by one
SKIP_KEY = "DATALOADER.SKIP_UNREADABLE True leaves such images out"


def check_images(
    records: Any,
    rows: np.ndarray,
    name: str,
    mapper: RegionSpotDatasetMapper | None,
    skip_unreadable: bool = False,
    remedy: str = SKIP_KEY,
) -> None:
    """Look for all images and read a sample.

    Args:
        records: of a data set.
        rows: (n,) which of them are to be used.
        name: of the data set.
        mapper: reads the sample; None reads none.
        skip_unreadable: warn instead, unless nothing is left.
        remedy: how to go on without such images, for messages.

    Raises:
        FileNotFoundError: images are missing.
        ValueError: images of the sample cannot be read.
    """
    paths = [path_of_image(records, row) for row in rows.tolist()]
    missing = find_missing(paths)
    sample = (
        []
        if mapper is None or len(missing) == len(paths)
        else np.unique(np.linspace(0, len(paths) - 1, _SAMPLE).astype(int))
    )
    absent, reasons = set(missing), []
    for index in sample:
        if mapper is not None and paths[index] not in absent:
            try:
                mapper.read_image(records[int(rows[index])])
            except UnreadableImageError as error:
                reasons.append(str(error))
    for bad, of, problem in ((missing, len(paths), "missing"), (reasons, len(sample), "unreadable, of a sample")):
        if not bad:
            continue
        some = "; ".join(bad[:_LISTED]) + ("; ..." if len(bad) > _LISTED else "")
        message = f"data set {name!r}: {len(bad)} of {of} images are {problem}: {some}"
        if skip_unreadable and len(bad) < of:
            logger.warning("%s; they are left out", message)
            continue
        kind = FileNotFoundError if bad is missing else ValueError
        raise kind(f"{message}. tools/check_dataset.py lists all that cannot be used; {remedy}")


def path_of_image(records: Any, row: int) -> str:
    """Return where a record's image lies, without making the record where its parts are in arrays."""
    return records.file_name(row) if hasattr(records, "file_name") else records[row]["file_name"]


def find_missing(paths: Sequence[str]) -> list[str]:
    """Return the paths that are no files; a directory is listed once, which network disks answer far sooner."""
    by_directory: dict[Path, list[Path]] = defaultdict(list)
    for path in map(Path, paths):
        by_directory[path.parent].append(path)
    missing = []
    for directory, members in by_directory.items():
        if len(members) > _FEW and directory.is_dir():
            with os.scandir(directory) as entries:
                listed = {entry.name for entry in entries}
            members = [path for path in members if path.name not in listed]
        missing += [str(path) for path in members if not path.is_file()]
    return missing
