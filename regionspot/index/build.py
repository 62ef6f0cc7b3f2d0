"""Filling region indexes: images in, embeddings of their regions out, shard by shard."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from regionspot.data.tokens.writer import StoreWriter
from regionspot.index.sources import ImageRegions, ImageSet
from regionspot.index.store import CONFIG, INDEX, OVERRIDES, RegionIndex, no_regions
from regionspot.modeling.identity import describe_model
from regionspot.modeling.region_predictions import RegionPredictions
from regionspot.prediction.batch_predictor import predict_each
from regionspot.prediction.loading import reader_errors
from regionspot.prediction.regions import check_annotated_size
from regionspot.prediction.sources import ImageRecord
from regionspot.predictor import RegionSpotPredictor
from regionspot.utils.files import atomic_path
from regionspot.utils.fingerprint import describe_file, file_state, is_same_file
from regionspot.utils.images import to_rgb_array

logger = logging.getLogger(__name__)

# Embeddings do not depend on the names in use, of which the predictor needs one.
_ANY_NAME = ["object"]


@dataclass(frozen=True)
class _Embedded:
    """An image's entry in a shard."""

    image: ImageRegions
    size: tuple[int, int]
    columns: dict[str, np.ndarray]  # of its regions


def describe_index(predictor: RegionSpotPredictor, cfg: CfgNode, images: ImageSet, shard_images: int) -> dict[str, Any]:
    """Return the entries of an index's manifest that identify its content."""
    recognizer = predictor.recognizer
    rule, scale, bias = recognizer.rule, recognizer.vision_language.logit_scale, recognizer.vision_language.logit_bias
    proposals: Any = "those of the annotations" if images.has_boxes else _plain(cfg.MODEL.REGIONSPOT.PROPOSALS)
    return {
        "inputs": {"source": str(images.root), "fingerprint": images.fingerprint, "number": len(images.images)},
        **describe_model(recognizer),
        "proposals": proposals,
        "image_size": recognizer.localizer.image_size,
        "dim": recognizer.vision_language.text_dim,
        "logit_scale": float(scale),
        **({} if bias is None else {"logit_bias": float(bias)}),
        "scoring": {
            "score_function": rule.score_function,
            "score_rule": rule.score_rule,
            "unknown_threshold": rule.unknown_thresh,
            "background": recognizer.background,
        },
        "shard_images": shard_images,
    }


def _plain(node: CfgNode) -> dict[str, Any]:
    """Return a config's values as JSON has them."""
    return {
        key: _plain(value) if isinstance(value, CfgNode) else list(value) if isinstance(value, tuple) else value
        for key, value in node.items()
    }


def build_index(
    predictor: RegionSpotPredictor,
    cfg: CfgNode,
    images: ImageSet,
    directory: str | Path,
    shard_images: int = 512,
    show_progress: bool = True,
) -> RegionIndex | None:
    """Embed the regions of images; finished shards are kept, so that an interrupted run resumes.

    Several processes may build one index at once: each takes shards that no other is working on. An image that cannot
    be used is left out, with a line in ``RegionIndex.left_out``; it is tried again when its file has changed.

    Args:
        predictor: of ``cfg``.
        cfg: its ``TEST.BATCH_SIZE`` images are embedded at once, ``DATALOADER.NUM_WORKERS`` processes read them.
        images: with boxes, or ``MODEL.REGIONSPOT.PROPOSALS.SOURCE`` finds them.
        directory: of the index.
        shard_images: images of a shard.
        show_progress: show a bar.

    Returns:
        The index, None while other processes still work on it.

    Raises:
        ValueError: no boxes, or the directory has an index of other images or another model.
        OSError: a process that reads images was killed.
    """
    if not images.has_boxes and predictor.model.proposal_source is None:
        raise ValueError(
            "no boxes: give annotations, or set MODEL.REGIONSPOT.PROPOSALS.SOURCE sam_automatic or detector"
        )
    if predictor.recognizer.ensemble is not None:
        raise ValueError(
            "MODEL.REGIONSPOT.GEOMETRIC_ENSEMBLE needs two embeddings of a region, and an index has one; build it with "
            "ALPHA and BETA 0"
        )
    if shard_images < 1:
        raise ValueError(f"shard images: expected at least 1, got {shard_images}")
    records = images.images
    shards = [range(i, min(i + shard_images, len(records))) for i in range(0, len(records), shard_images)]
    writer = StoreWriter(directory, describe_index(predictor, cfg, images, shard_images), len(shards), INDEX)
    with atomic_path(writer.directory / CONFIG) as path:
        path.write_text(_config_of_index(cfg).dump(), encoding="utf-8")
    writer.discard([shard for shard, rows in enumerate(shards) if _is_outdated(writer, shard, records, rows)])
    if writer.is_complete():
        return RegionIndex(directory)
    done, is_hidden = writer.finished_images(), not show_progress
    workers = cfg.DATALOADER.NUM_WORKERS
    remedy = f"use fewer of them (DATALOADER.NUM_WORKERS is {workers}) and run it again, which resumes"
    with tqdm(total=len(records), initial=done, desc="region index", unit="image", disable=is_hidden) as bar:
        for shard, rows in enumerate(shards):
            with _claim(writer, shard) as is_claimed:
                if is_claimed:
                    with reader_errors(remedy):
                        _write_shard(predictor, writer, shard, _load(cfg, images, rows), len(rows), bar)
    return RegionIndex(directory) if writer.finish() else None


def _config_of_index(cfg: CfgNode) -> CfgNode:
    """Return a config that opens the model from any directory, with names and regions of no file."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(OVERRIDES)
    sam, clip = cfg.MODEL.REGIONSPOT.SAM, cfg.MODEL.REGIONSPOT.CLIP
    for node, key in ((cfg.MODEL, "WEIGHTS"), *((x, key) for x in (sam, clip) for key in ("WEIGHTS", "NAME"))):
        if Path(node[key]).is_file():  # NAME may be a JSON file
            node[key] = str(Path(node[key]).absolute())
    return cfg


@contextmanager
def _claim(writer: StoreWriter, shard: int) -> Iterator[bool]:
    """Hold the lock of a shard that is to be written; yield whether it is."""
    if writer.is_finished(shard):
        yield False
        return
    writer.locks.mkdir(exist_ok=True)
    lock = FileLock(writer.locks / f"{shard}.lock")  # ends with the process, however that ends
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield not writer.is_finished(shard)
    finally:
        lock.release()


def _is_outdated(writer: StoreWriter, shard: int, records: Sequence[ImageRegions], rows: range) -> bool:
    """Return whether images of a finished shard have changed, also those that could not be used."""
    if not writer.is_finished(shard):
        return False
    left_out = writer.left_out_files(shard)
    files = writer.image_files(shard)
    has_changed = any(
        records[row].image_id in files and not is_same_file(records[row].path, files[records[row].image_id])
        for row in rows
        if row not in left_out
    )
    return has_changed or any(file_state(records[row].path) != state for row, state in left_out.items())


def _load(cfg: CfgNode, images: ImageSet, rows: range) -> DataLoader:
    return DataLoader(
        _Images(images, rows, tuple(cfg.INPUT.DEEP_RANGE)),
        batch_size=cfg.TEST.BATCH_SIZE,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
    )


def _write_shard(
    predictor: RegionSpotPredictor, writer: StoreWriter, shard: int, loader: DataLoader, num_images: int, bar: tqdm
) -> None:
    entries: list[_Embedded] = []
    left_out: dict[int, str] = {}
    states: dict[int, list[int]] = {}
    for batch in loader:
        images = {row: (image, content) for row, image, content, _ in batch}
        left_out |= {row: content for row, (_, content) in images.items() if isinstance(content, str)}
        for row, result in _embed(predictor, {k: v for k, v in images.items() if k not in left_out}).items():
            if isinstance(result, str):
                left_out[row] = f"{images[row][0].name}: {result}"
            else:
                entries.append(result)
        states |= {row: state for row, _, _, state in batch if row in left_out}
        bar.update(len(batch))
    for reason in left_out.values():
        logger.warning("left out: %s", reason)
    order = sorted(left_out)
    reasons, files = [left_out[row] for row in order], [states[row] for row in order]
    writer.write(shard, _pack(entries, predictor), num_images, order, reasons, files)


class _Images(Dataset):
    """Images of a shard: (row, record, pixels or why they cannot be used, ``file_state`` before they were read)."""

    def __init__(self, images: ImageSet, rows: range, deep_range: tuple[float, ...]) -> None:
        self.images, self.rows, self.deep_range = images, rows, deep_range

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, ImageRegions, np.ndarray | str, list[int]]:
        row = self.rows[index]
        record = self.images.images[row]
        state = file_state(record.path)
        try:
            return row, *self._read(record), state
        except (OSError, ValueError) as error:
            return row, record, f"{record.name.encode(errors='backslashreplace').decode()}: {error}", state

    def _read(self, record: ImageRegions) -> tuple[ImageRegions, np.ndarray]:
        """Return the record with its boxes, and the pixels."""
        if any("\ud800" <= x <= "\udfff" for x in record.name):  # a byte of the file name that is no UTF-8
            raise ValueError("the file name is not UTF-8; rename the file")
        pixels = to_rgb_array(record.path, self.deep_range)
        size = (pixels.shape[0], pixels.shape[1])
        if record.size is not None:
            check_annotated_size(record.size, size)
        if self.images.regions is None:
            return record, pixels
        listed = ImageRecord(record.image_id, record.name, str(record.path), -1, record.image_id, record.name)
        regions = self.images.regions(listed, size)
        if not regions.has_entry:
            raise ValueError("it has no regions in the file")
        return replace(record, boxes=regions.boxes, proposal_scores=regions.scores), pixels


def _embed(predictor: RegionSpotPredictor, images: dict[int, tuple[ImageRegions, Any]]) -> dict[int, _Embedded | str]:
    """Return the entries of images, or what is wrong with their boxes, by row."""

    def predict(rows: list[int]) -> list[RegionPredictions]:
        records = [images[row][0] for row in rows]
        boxes = [None if x.boxes is None else np.asarray(x.boxes, np.float32).reshape(-1, 4) for x in records]
        scores = [record.proposal_scores for record in records]
        pixels = [images[row][1] for row in rows]
        return predictor.predict_images(pixels, boxes, scores, _ANY_NAME, top_k=1, with_masks=False)

    results, errors = predict_each(predict, list(images))
    entries: dict[int, _Embedded | str] = {
        row: message.replace("image 0", "the image") for row, message in errors.items()
    }
    for row, result in results.items():
        record = images[row][0]
        num_regions = len(result)
        scores_or_none = result.proposal_scores
        columns: dict[str, np.ndarray] = {
            "boxes": result.boxes.astype(np.float32),
            "embeddings": result.embeddings.astype(np.float16),
            "proposal_scores": np.full(num_regions, -1.0, np.float32) if scores_or_none is None else scores_or_none,
            "predicted_ious": result.predicted_ious.astype(np.float32),
            "keys": np.full(num_regions, -1, np.int64) if record.keys is None else np.asarray(record.keys, np.int64),
        }
        entries[row] = _Embedded(record, result.image_size, columns)
    return entries


def _pack(entries: Sequence[_Embedded], predictor: RegionSpotPredictor) -> dict[str, torch.Tensor]:
    """Return a shard's tensors, see ``RegionIndex``."""
    names = [entry.image.name.encode() for entry in entries]
    # concatenations begin with an empty array: a shard may have no image
    empty = no_regions(predictor.recognizer.vision_language.text_dim)
    arrays = {key: np.concatenate([first.numpy(), *(x.columns[key] for x in entries)]) for key, first in empty.items()}
    arrays |= {
        "image_ids": np.array([entry.image.image_id for entry in entries], np.int64),
        "sizes": np.array([entry.size for entry in entries], np.int32).reshape(-1, 2),
        "image_files": np.array([describe_file(x.image.path) for x in entries], np.int64).reshape(-1, 3),
        "names": np.frombuffer(b"".join(names), np.uint8).copy(),
        "name_ends": np.cumsum([0] + [len(name) for name in names]).astype(np.int64),
        "offsets": np.cumsum([0] + [len(entry.columns["boxes"]) for entry in entries]).astype(np.int64),
    }
    return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}
