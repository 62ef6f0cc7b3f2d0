"""Extraction of frozen features into token stores, by any number of processes; it resumes where it was stopped."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog
from filelock import FileLock, Timeout
from torch.utils.data import Dataset
from tqdm import tqdm

from regionspot.data.dataset_mapper import RegionSpotDatasetMapper, UnreadableImageError
from regionspot.data.image_check import check_images, path_of_image
from regionspot.data.packed_loader import PackedLoader
from regionspot.data.store_coverage import describe_proposals
from regionspot.data.tokens import StoreWriter, pack_images
from regionspot.data.training_set import describe_annotations, image_ids, image_sizes
from regionspot.engine.extraction import Extraction, extract_features
from regionspot.modeling.identity import describe_clip, describe_sam
from regionspot.modeling.recognizer import RegionRecognizer
from regionspot.utils.fingerprint import describe_file, is_same_file

logger = logging.getLogger(__name__)


def describe_store(recognizer: RegionRecognizer, dataset_name: str, extraction: Extraction) -> dict[str, Any]:
    """Return the entries of a store's manifest that identify its content."""
    with_maps = extraction.feature_maps and recognizer.vision_language.features != "none"
    return {
        "dataset": dataset_name,
        "annotations": describe_annotations(dataset_name),
        "sam": describe_sam(recognizer),
        "clip": describe_clip(recognizer) if with_maps else None,
        "stages": sorted(extraction.stages),
        "flip": extraction.flip,
        # None where older manifests have no entry
        "jitter": extraction.jitter or None,
        "jitter_copies": extraction.jitter_copies or None,
        "proposals": describe_proposals(extraction.proposals, extraction.match_iou),
        "image_size": recognizer.localizer.image_size,
        "shard_images": extraction.shard_images,
    }


def extract_tokens(
    recognizer: RegionRecognizer,
    dataset_name: str,
    directory: str | Path,
    extraction: Extraction,
    show_progress: bool = True,
) -> bool:
    """Extract features of all regions of a data set, annotated or matched by proposals; images without are left out.

    Several processes may extract into one directory at once: each takes shards that no other is working on. Finished
    shards are kept. The content of a shard depends neither on who wrote it nor on what was there before. The manifest
    names the files that the recognizer's frozen weights came from.

    Returns:
        Whether the store is complete; if not, other processes still work on it.

    Raises:
        ValueError: image ids that are not unique integers; proposals of other images; or unreadable images, after all
            other shards are done.
    """
    records = _OriginalImages(DatasetCatalog.get(dataset_name), extraction)
    check_image_ids(records.ids, dataset_name)
    if extraction.proposals is not None:  # refuses the file of another data set
        extraction.proposals.summarize(records.ids, image_sizes(records.records))
    shards = [
        range(start, min(start + extraction.shard_images, len(records)))
        for start in range(0, len(records), extraction.shard_images)
    ]
    writer = StoreWriter(directory, describe_store(recognizer, dataset_name, extraction), len(shards))
    remedy = "--skip-damaged leaves such images out"
    check_images(records.records, np.arange(len(records)), dataset_name, None, extraction.skip_damaged, remedy)
    # Images may have been replaced or repaired since a previous run: their shards are extracted again.
    writer.discard(_outdated_shards(writer, records, shards))
    if writer.is_complete():
        return True
    description, is_hidden, done = f"tokens of {dataset_name}", not show_progress, writer.finished_images()
    with tqdm(total=len(records), initial=done, desc=description, unit="image", disable=is_hidden) as bar:
        failures = _write_shards(recognizer, writer, records, shards, extraction, bar)
    if failures:
        raise ValueError(
            f"{len(failures)} of {len(shards)} shards of {dataset_name} are not done: {'; '.join(failures.values())}. "
            "Fix the images and run again, or leave them out with --skip-damaged"
        )
    return writer.finish()


def _write_shards(
    recognizer: RegionRecognizer,
    writer: StoreWriter,
    records: "_OriginalImages",
    shards: Sequence[range],
    extraction: Extraction,
    bar: tqdm,
) -> dict[int, str]:
    """Write the shards of this machine that nobody else works on; return the errors of those that failed."""
    writer.locks.mkdir(exist_ok=True)
    failures: dict[int, str] = {}
    while True:  # another round: a process that had claimed a shard may have been killed meanwhile
        batches = _ClaimedBatches(writer, shards, extraction, failures)
        try:
            num_written = _write_claimed(recognizer, batches, records, extraction, bar)
        finally:
            batches.release()
        if not num_written:
            return failures


def _write_claimed(
    recognizer: RegionRecognizer,
    batches: "_ClaimedBatches",
    records: "_OriginalImages",
    extraction: Extraction,
    bar: tqdm,
) -> int:
    """Write shards as they are claimed; return their number.

    One loader reads all of them, so that its workers are never idle between two. A thread writes a shard while the next
    one is extracted.
    """
    loader = PackedLoader(
        records,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=extraction.workers,
        pin_memory=recognizer.vision_language.pixel_mean.device.type == "cuda",
    )
    images: list[dict[str, Any]] = []
    left_out: list[int] = []
    num_written = 0
    writing: Future = Future()
    writing.set_result(None)
    with ThreadPoolExecutor(1) as pool:
        for batch in loader:
            shard, is_last = batch[-1]["shard"], batch[-1]["index"] + 1 == batches.shards[batch[-1]["shard"]].stop
            unreadable = {inputs["image_id"]: inputs["unreadable"] for inputs in batch if "unreadable" in inputs}
            if unreadable and not extraction.skip_damaged:
                batches.failures.setdefault(shard, next(iter(unreadable.values())))
            for reason in unreadable.values() if extraction.skip_damaged else ():
                logger.warning("left out: %s", reason)
            if shard not in batches.failures:
                images += extract_features(recognizer, batch, extraction)
                left_out += unreadable
            bar.update(len(batch))
            if is_last:
                writing.result()  # at most one shard waits to be written
                if shard not in batches.failures:
                    writing = pool.submit(batches.write, shard, images, left_out)
                    num_written += 1
                images, left_out = [], []
        writing.result()
    return num_written


class _ClaimedBatches:
    """Batches of the images of shards that no other process works on; a shard is claimed when the loader asks for it.

    Attributes:
        shards: the data set's indices of all shards.
        failures: the errors of shards, which are not claimed again.
    """

    def __init__(
        self, writer: StoreWriter, shards: Sequence[range], extraction: Extraction, failures: dict[int, str]
    ) -> None:
        self.writer, self.shards, self.extraction, self.failures = writer, shards, extraction, failures
        self._locks: dict[int, FileLock] = {}

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rank, num_machines = self.extraction.machine
        for shard in range(rank, len(self.shards), num_machines):
            if shard in self.failures or self.writer.is_finished(shard):
                continue
            # ends with the process, however that ends; another thread releases it
            lock = FileLock(self.writer.locks / f"{shard}.lock", thread_local=False)
            with suppress(Timeout):
                lock.acquire(timeout=0)
                self._locks[shard] = lock
                if self.writer.is_finished(shard):
                    self._release(shard)
                    continue
                rows, size = self.shards[shard], self.extraction.batch_size
                for start in range(rows.start, rows.stop, size):
                    yield [(shard, index) for index in range(start, min(start + size, rows.stop))]

    def write(self, shard: int, images: list[dict[str, Any]], left_out: list[int]) -> None:
        """Write a shard and give it back."""
        self.writer.write(shard, pack_images(images), len(self.shards[shard]), left_out)
        self._release(shard)

    def release(self) -> None:
        """Give all shards back."""
        for shard in list(self._locks):
            self._release(shard)

    def _release(self, shard: int) -> None:
        self._locks.pop(shard).release()


def _outdated_shards(writer: StoreWriter, records: "_OriginalImages", shards: Sequence[range]) -> list[int]:
    """Return the finished shards whose images have changed, or that lack images that are readable now."""
    outdated = []
    for shard, rows in enumerate(shards):
        if not writer.is_finished(shard):
            continue
        files, left_out = writer.image_files(shard), writer.left_out(shard)
        index_of = {int(image_id): row for row, image_id in zip(rows, records.ids[rows.start : rows.stop])}
        lacks_images = left_out and (
            not records.skip_damaged
            or any("unreadable" not in records.read(index_of[image_id]) for image_id in left_out)
        )
        if lacks_images or not all(
            is_same_file(path_of_image(records.records, index_of[image_id]), file) for image_id, file in files.items()
        ):
            outdated.append(shard)
    if outdated:
        logger.warning("%d of %d shards are written again: their images have changed", len(outdated), len(shards))
    return outdated


def check_image_ids(ids: np.ndarray, dataset_name: str) -> None:
    """Refuse image ids that a store cannot hold."""
    if len(ids) and (not np.issubdtype(ids.dtype, np.signedinteger)):
        raise ValueError(f"data set {dataset_name!r}: expected integers of 64 bits as image ids, got {ids[0]!r}")
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        raise ValueError(f"data set {dataset_name!r}: image id {values[counts.argmax()]} occurs {counts.max()} times")


class _OriginalImages(Dataset):
    """A data set's images and regions, without augmentation, in original pixels."""

    def __init__(self, records: Any, extraction: Extraction) -> None:
        self.records, self.skip_damaged, self.ids = records, extraction.skip_damaged, image_ids(records)
        proposals = {"proposal_file": extraction.proposals, "match_iou": extraction.match_iou}
        self.mapper = RegionSpotDatasetMapper(augmentations=[], image_format="RGB", **proposals)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        """Return the image of a (shard, index)."""
        shard, index = place
        return {**self.read(index), "shard": shard, "index": index}

    def read(self, index: int) -> dict[str, Any]:
        try:
            record = self.mapper(self.records[index])
            return {**record, "image_file": describe_file(record["file_name"])}
        except UnreadableImageError as error:
            return {"image_id": self.records[index]["image_id"], "unreadable": str(error)}
