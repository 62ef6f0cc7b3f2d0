"""Extraction of frozen features into token stores: by any number of processes, and going on where it was stopped."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from regionspot.checkpoint.formats import fingerprint
from regionspot.data.dataset_mapper import RegionSpotDatasetMapper, UnreadableImageError
from regionspot.data.image_check import check_images, path_of_image
from regionspot.data.tokens import StoreWriter, pack_images
from regionspot.data.training_set import describe_annotations, image_ids
from regionspot.modeling.localizers.localizer import check_stages
from regionspot.modeling.recognizer import ImageFeatures, RegionRecognizer
from regionspot.structures import Prompts
from regionspot.utils.files import describe_file, is_same_file

logger = logging.getLogger(__name__)


@dataclass
class Extraction:
    """What to extract, and how.

    Attributes:
        stages: of SAM, whose tokens to store.
        flip: also of the picture flipped from left to right.
        feature_maps: also CLIP's feature maps (300 kB an image at BB's size).
        shard_images: images of the data set a shard.
        batch_size: images of one step; the localizer's ``encoder_batch_size`` of them are encoded at once.
        workers: processes that read pictures.
        skip_damaged: leave out pictures that cannot be read, with a warning, instead of an error at the end.
        machine: this machine's number and how many there are, where they share no disk: (0, 1) does all shards.
    """

    stages: Sequence[str] = ("transformer",)
    flip: bool = False
    feature_maps: bool = False
    shard_images: int = 512
    batch_size: int = 1
    workers: int = 0
    skip_damaged: bool = False
    machine: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        check_stages(self.stages, "--stages")
        for name in ("shard_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', ' ')}: expected at least 1, got {getattr(self, name)}")
        if not self.stages or not 0 <= self.machine[0] < self.machine[1]:
            raise ValueError(f"expected a stage, and a machine rank below the number of machines; got {self}")


def describe_sam(recognizer: RegionRecognizer, source: str) -> dict[str, Any]:
    """Return what tokens depend on: SAM's weights, where they came from, and which of its masks is taken."""
    weights = fingerprint(recognizer.localizer.sam.state_dict())
    return {"source": source, "fingerprint": weights, "multimask": recognizer.localizer.multimask}


def describe_clip(recognizer: RegionRecognizer, source: str) -> dict[str, Any]:
    """Return what feature maps depend on: CLIP's image encoder, and which of its outputs are taken."""
    vision = recognizer.vision_language
    return {
        "source": source,
        "fingerprint": fingerprint(vision.clip_model.visual.state_dict()),
        "part": vision.features,
    }


def describe_store(
    recognizer: RegionRecognizer, sources: dict[str, str], dataset_name: str, extraction: Extraction
) -> dict[str, Any]:
    """Return the origin that a store's manifest begins with; ``sources`` name the files of "sam" and "clip_model"."""
    with_maps = extraction.feature_maps and recognizer.vision_language.features != "none"
    return {
        "dataset": dataset_name,
        "annotations": describe_annotations(dataset_name),
        "sam": describe_sam(recognizer, sources["sam"]),
        "clip": describe_clip(recognizer, sources["clip_model"]) if with_maps else None,
        "stages": sorted(extraction.stages),
        "flip": extraction.flip,
        "image_size": recognizer.localizer.image_size,
        "shard_images": extraction.shard_images,
    }


def extract_tokens(
    recognizer: RegionRecognizer,
    sources: dict[str, str],
    dataset_name: str,
    directory: str | Path,
    extraction: Extraction,
    show_progress: bool = True,
) -> bool:
    """Extract features of all annotated regions of a data set; images without any are left out.

    Several processes may do so into one directory at once: each takes the shards that nobody else is at. Shards that
    are finished are kept. What a shard holds does not depend on who wrote it, nor on what was there before.

    Args:
        recognizer: with its frozen weights loaded.
        sources: names of the files that "sam" and "clip_model" came from.
        dataset_name: a registered data set.
        directory: of the store.
        extraction: what to extract.
        show_progress: a progress bar over all images.

    Returns:
        Whether the store is complete; if not, others are still at work on it.

    Raises:
        ValueError: image ids that are no integers or not unique; or pictures that cannot be read, which is said when
            all other shards are done.
    """
    records = _Mapped(DatasetCatalog.get(dataset_name), extraction.skip_damaged)
    check_image_ids(image_ids(records.records), dataset_name)
    shards = [
        range(start, min(start + extraction.shard_images, len(records)))
        for start in range(0, len(records), extraction.shard_images)
    ]
    writer = StoreWriter(directory, describe_store(recognizer, sources, dataset_name, extraction), len(shards))
    remedy = "--skip-damaged leaves such images out"
    check_images(records.records, np.arange(len(records)), dataset_name, None, extraction.skip_damaged, remedy)
    writer.discard(_outdated_shards(writer, records, shards))
    if writer.is_complete():
        return True
    done, failures = writer.finished_images(), {}
    with tqdm(
        total=len(records), initial=done, desc=f"tokens of {dataset_name}", unit="image", disable=not show_progress
    ) as bar:
        worked = True
        while worked:  # again while a shard was open: who was at it may have been killed
            worked = False
            for number, rows in enumerate(shards):
                ours = number % extraction.machine[1] == extraction.machine[0]
                if not ours or number in failures or writer.is_finished(number):
                    continue
                with _claim(writer.locks / f"{number}.lock") as claimed:
                    if claimed and not writer.is_finished(number):
                        try:
                            content, left_out = _extract_shard(recognizer, Subset(records, rows), extraction, bar)
                        except ValueError as error:
                            failures[number] = str(error).strip().splitlines()[-1]
                            continue
                        writer.write(number, content, len(rows), left_out)
                        worked = True
                if not writer.is_complete():
                    bar.n = writer.finished_images()
                    bar.refresh()
    if failures:
        raise ValueError(
            f"{len(failures)} of {len(shards)} shards of {dataset_name} are not done: {'; '.join(failures.values())}. "
            "Mend the pictures and run again, or leave them out with --skip-damaged"
        )
    return writer.finish()


def _outdated_shards(writer: StoreWriter, records: "_Mapped", shards: Sequence[range]) -> list[int]:
    """Return finished shards whose images have changed since, or which lack images that can be read by now."""
    outdated = []
    for number, rows in enumerate(shards):
        if not writer.is_finished(number):
            continue
        files, left_out = writer.image_files(number), set(writer.left_out(number))
        index_of = {int(image_id): row for row, image_id in zip(rows, records.ids[rows.start : rows.stop])}
        again = left_out and (not records.skip_damaged or any(records.is_whole(index_of[i]) for i in left_out))
        if again or not all(is_same_file(records.path(index_of[i]), file) for i, file in files.items()):
            outdated.append(number)
    if outdated:
        logger.warning("%d of %d shards are made again: their images have changed", len(outdated), len(shards))
    return outdated


def check_image_ids(ids: np.ndarray, dataset_name: str) -> None:
    """Refuse image ids that a store cannot hold."""
    if len(ids) and (not np.issubdtype(ids.dtype, np.signedinteger)):
        raise ValueError(f"data set {dataset_name!r}: expected integers of 64 bits as image ids, got {ids[0]!r}")
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        raise ValueError(f"data set {dataset_name!r}: image id {values[counts.argmax()]} occurs {counts.max()} times")


@contextmanager
def _claim(path: Path) -> Iterator[bool]:
    """Yield whether this process has the lock; it is gone with the process, however that ends."""
    path.parent.mkdir(exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


class _Mapped(Dataset):
    """A data set's records as the mapper gives them, in the pictures' own frames."""

    def __init__(self, records: Any, skip_damaged: bool) -> None:
        self.records, self.skip_damaged, self.ids = records, skip_damaged, image_ids(records)
        self.mapper = RegionSpotDatasetMapper(augmentations=[], image_format="RGB")

    def __len__(self) -> int:
        return len(self.records)

    def path(self, index: int) -> str:
        """Return where an image lies."""
        return path_of_image(self.records, index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self.mapper(self.records[index])
            return {**record, "image_file": describe_file(record["file_name"])}
        except UnreadableImageError as error:
            if not self.skip_damaged:
                raise
            logger.warning("left out: %s", error)
            return {"image_id": self.records[index]["image_id"], "unreadable": str(error)}

    def is_whole(self, index: int) -> bool:
        """Tell whether an image can be read."""
        try:
            self.mapper.read_image(self.records[index])
        except UnreadableImageError:
            return False
        return True


def _extract_shard(
    recognizer: RegionRecognizer, records: Subset, extraction: Extraction, bar: tqdm
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Return a shard's tensors, and the ids of the images that could not be read."""
    loader = DataLoader(
        records,
        extraction.batch_size,
        num_workers=extraction.workers,
        collate_fn=list,
        pin_memory=recognizer.vision_language.pixel_mean.device.type == "cuda",
    )
    images: list[dict[str, Any]] = []
    left_out: list[int] = []
    for batch in loader:
        kept = [inputs for inputs in batch if "unreadable" not in inputs and len(inputs["instances"])]
        left_out += [inputs["image_id"] for inputs in batch if "unreadable" in inputs]
        entries = [
            {
                "image_id": inputs["image_id"],
                "image_file": inputs["image_file"],
                "boxes": inputs["instances"].gt_boxes.tensor,
                "labels": inputs["instances"].gt_classes,
            }
            for inputs in kept
        ]
        for flipped in (False, True) if extraction.flip else (False,):
            pictures = [inputs["image"].flip(2) if flipped else inputs["image"] for inputs in kept]
            boxes = [entry["boxes"] for entry in entries]
            if flipped:
                boxes = [_flip(b, picture.shape[2]) for b, picture in zip(boxes, pictures)]
            for entry, features in zip(entries, _features(recognizer, pictures, boxes, extraction)):
                entry.update({f"flipped_{key}" if flipped else key: value for key, value in features.items()})
        images += entries
        bar.update(len(batch))
    return pack_images(images), left_out


@torch.no_grad()
def _features(
    recognizer: RegionRecognizer, pictures: list[torch.Tensor], boxes: list[torch.Tensor], extraction: Extraction
) -> list[dict[str, torch.Tensor]]:
    if not pictures:
        return []
    embeddings = recognizer.localizer.encode_images(pictures)
    sizes = [(picture.shape[1], picture.shape[2]) for picture in pictures]
    prompts = [Prompts(boxes=image_boxes) for image_boxes in boxes]
    located = recognizer.locate(ImageFeatures(embeddings, None, sizes), prompts, stages=extraction.stages)
    features = [{f"tokens.{stage}": tokens for stage, tokens in output.stage_tokens.items()} for output in located]
    maps = recognizer.vision_language.encode_images(pictures) if extraction.feature_maps else None
    if maps is not None:
        features = [{**image, "feature_maps": feature_map} for image, feature_map in zip(features, maps)]
    return features


def _flip(boxes: torch.Tensor, width: int) -> torch.Tensor:
    """Mirror (n, 4) XYXY boxes of a picture of ``width`` pixels."""
    return torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
