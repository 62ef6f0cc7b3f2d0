"""Whether the images of a data set are there: every path, and a few files, before hours of work begin."""

import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.data.dataset_mapper import RegionSpotDatasetMapper, UnreadableImageError
from regionspot.data.tokens import TokenStore
from regionspot.utils.files import is_same_file

logger = logging.getLogger(__name__)

_COMPARED = 200_000  # images whose size and time are compared with a token store's
_READ = 1000  # of them, if their time has changed
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
    has_sample = mapper is not None and len(missing) < len(paths)
    sample = _spread(len(paths), _SAMPLE).tolist() if has_sample else []
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


def check_unchanged(store: TokenStore, records: Any, rows: np.ndarray, ids: np.ndarray) -> None:
    """Refuse a store whose images were edited after it was made, as far as it says what they were.

    Of very many images a sample is looked at. Images that are gone are none of this function's business.

    Args:
        store: of the tokens.
        records: of the data set.
        rows: (n,) which of them are in the store.
        ids: (I,) image ids of all records.

    Raises:
        ValueError: names some of the images.
    """
    rows = rows[_spread(len(rows), _COMPARED)]
    described = store.image_files(ids[rows])
    changed: list[tuple[str, list[int]]] = []
    touched: list[tuple[str, list[int]]] = []
    for row, was in zip(rows.tolist(), described.tolist()):
        path = path_of_image(records, row)
        if was[0] and (state := _stat(path)) is not None and [state.st_size, state.st_mtime_ns] != was[:2]:
            (touched if state.st_size == was[0] else changed).append((path, was))
    looked_at = [touched[i] for i in _spread(len(touched), _READ)]
    changed += [(path, was) for path, was in looked_at if not is_same_file(path, was)]
    if len(looked_at) < len(touched):
        logger.info(
            "%s: %d images are of another time; %d of them were read", store.directory, len(touched), len(looked_at)
        )
    if changed:
        some = "; ".join(path for path, _ in changed[:_LISTED]) + ("; ..." if len(changed) > _LISTED else "")
        raise ValueError(
            f"token store {store.directory}: of {len(rows)} images that were checked {len(changed)} have changed since "
            f"their tokens were extracted: {some}; run tools/extract_tokens.py again, which makes their shards anew"
        )


def _spread(number: int, most: int) -> np.ndarray:
    """Return indices from 0 to ``number``, evenly spread if there are more than ``most``."""
    return np.arange(number) if number <= most else np.linspace(0, number - 1, most).astype(int)


def _stat(path: str) -> os.stat_result | None:
    try:
        return Path(path).stat()
    except OSError:
        return None


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
