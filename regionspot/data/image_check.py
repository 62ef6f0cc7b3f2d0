"""Checks before hours of work begin that the images of a data set are there, and those of a token store unchanged."""

import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.data.dataset_mapper import RegionSpotDatasetMapper, UnreadableImageError
from regionspot.data.tokens import TokenStore
from regionspot.utils.fingerprint import is_same_file

logger = logging.getLogger(__name__)

# Limits that keep the checks of millions of images on a network disk to a few seconds or minutes.
_COMPARED = 200_000  # images whose size and time are compared with a token store's
_READ = 1000  # images of other times that are read
_SAMPLE = 16  # images that are decoded
_LISTED = 3  # images in a message
_FEW = 100  # up to so many paths in a directory are looked up one by one
SKIP_KEY = "DATALOADER.SKIP_UNREADABLE True leaves such images out"


def check_images(
    records: Any,
    rows: np.ndarray,
    name: str,
    mapper: RegionSpotDatasetMapper | None,
    skip_unreadable: bool = False,
    remedy: str = SKIP_KEY,
) -> None:
    """Look up all images and decode a sample.

    Args:
        records: all records of data set ``name``.
        rows: (n,) the records to check.
        name: for messages.
        mapper: decodes the sample; None skips it.
        skip_unreadable: warn instead of raising, unless no image is readable.
        remedy: how to continue without such images, for messages.

    Raises:
        FileNotFoundError: images are missing.
        ValueError: images of the sample cannot be read.
    """
    paths = [path_of_image(records, row) for row in rows.tolist()]
    missing = find_missing(paths)
    # A sample shows a wrong format or damaged copy within seconds; tools/check_dataset.py decodes all.
    absent, sample, reasons = set(missing), [], []
    if mapper is not None and len(missing) < len(paths):
        sample = _spread(len(paths), _SAMPLE).tolist()
        for index in sample:
            if paths[index] not in absent:
                try:
                    mapper.read_image(records[int(rows[index])])
                except UnreadableImageError as error:
                    reasons.append(str(error))
    # (error, problem, images, number of checked images)
    problems = (
        (FileNotFoundError, "missing", missing, len(paths)),
        (ValueError, "unreadable, of a sample", reasons, len(sample)),
    )
    for kind, problem, bad, total in problems:
        if bad:
            message = f"data set {name!r}: {len(bad)} of {total} images are {problem}: {_first(bad)}"
            if not skip_unreadable or len(bad) == total:
                raise kind(f"{message}. tools/check_dataset.py lists all that cannot be used; {remedy}")
            logger.warning("%s; they are left out", message)


def check_unchanged(store: TokenStore, records: Any, rows: np.ndarray, ids: np.ndarray) -> None:
    """Refuse a store whose images have changed since it recorded them; of many images a sample is checked.

    ``rows`` (n,) are the records in the store, ``ids`` (I,) the image ids of all records.
    """
    rows = rows[_spread(len(rows), _COMPARED)]
    changed: list[tuple[str, list[int]]] = []
    touched: list[tuple[str, list[int]]] = []
    for row, recorded in zip(rows.tolist(), store.image_files(ids[rows]).tolist()):
        path = path_of_image(records, row)
        # A copy of the images has other times: those of the same size are read. Missing ones check_images reports.
        if recorded[0] and (state := _stat(path)) and [state.st_size, state.st_mtime_ns] != recorded[:2]:
            (touched if state.st_size == recorded[0] else changed).append((path, recorded))
    read = [touched[i] for i in _spread(len(touched), _READ)]
    changed += [(path, recorded) for path, recorded in read if not is_same_file(path, recorded)]
    if len(read) < len(touched):
        logger.info("%s: %d images are of another time; %d of them were read", store.directory, len(touched), len(read))
    if changed:
        raise ValueError(
            f"token store {store.directory}: of {len(rows)} images that were checked {len(changed)} have changed since "
            f"their tokens were extracted: {_first([path for path, _ in changed])}; run tools/extract_tokens.py again, "
            "which writes their shards again"
        )


def _first(items: list[str]) -> str:
    return "; ".join(items[:_LISTED]) + ("; ..." if len(items) > _LISTED else "")


def _spread(size: int, most: int) -> np.ndarray:
    """Return at most ``most`` indices below ``size``, evenly spread."""
    return np.arange(size) if size <= most else np.linspace(0, size - 1, most).astype(int)


def _stat(path: str) -> os.stat_result | None:
    try:
        return Path(path).stat()
    except OSError:
        return None


def path_of_image(records: Any, row: int) -> str:
    """Return the path of a record's image; a ``JsonDataset`` does not build the record for it."""
    return records.file_name(row) if hasattr(records, "file_name") else records[row]["file_name"]


def find_missing(paths: Sequence[str]) -> list[str]:
    """Return the paths that are not files."""
    # One listing of a large directory takes far less time on a network disk than a request per file.
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
