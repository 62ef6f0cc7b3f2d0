"""The images that training draws from, and what their annotations are known by."""

import hashlib
import json
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog
from detectron2.utils import comm
from torch.utils.data import Dataset, Subset

from regionspot.data.dataset_mapper import RegionSpotDatasetMapper, UnreadableImageError
from regionspot.data.datasets.categories import category_ids
from regionspot.data.image_check import check_images, check_unchanged
from regionspot.data.proposals import ProposalFile
from regionspot.data.tokens import TokenStore
from regionspot.utils.files import sha256_of_file

logger = logging.getLogger(__name__)

_MOST_SKIPPED = 100  # images in a row; more are no accident


class TrainingSet(Dataset):
    """Mapped images of several data sets, one behind the other.

    What is random about a sample follows from the seed and its position in the stream: it does not depend on the
    number of workers and processes, nor on where training was resumed.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        mappers: Sequence[Callable[[dict[str, Any]], dict[str, Any]]],
        seed: int,
        skip_unreadable: bool = False,
    ) -> None:
        """
        Args:
            datasets: their records.
            mappers: one for each.
            seed: of what is random about a sample.
            skip_unreadable: take the next image for one that cannot be read; the sample has ``unreadable``, why.
        """
        self.datasets, self.mappers, self.seed, self.skip_unreadable = datasets, mappers, seed, skip_unreadable
        self.starts = np.cumsum([0] + [len(dataset) for dataset in datasets])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        position, index = item
        skipped: list[str] = []
        while True:
            try:
                sample = self._sample(position, (index + len(skipped)) % len(self))
            except UnreadableImageError as error:
                if not self.skip_unreadable:
                    raise
                skipped.append(str(error))
                if len(skipped) == min(_MOST_SKIPPED, len(self)):
                    raise ValueError(f"{len(skipped)} images in a row cannot be read; the last: {error}") from error
            else:
                return {**sample, "unreadable": skipped} if skipped else sample

    def _sample(self, position: int, index: int) -> dict[str, Any]:
        random.seed(f"{self.seed} {position}")
        np.random.seed(random.getrandbits(32))
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.mappers[part](self.datasets[part][index - int(self.starts[part])])


def open_training_images(
    cfg: CfgNode, name: str, store_path: str = "", proposals: str = ""
) -> tuple[Any, RegionSpotDatasetMapper]:
    """Return the images of a data set that there is something to learn from, and their mapper.

    Args:
        cfg: the config.
        name: a registered data set.
        store_path: its token store, "" for none; images that it lacks are left out with a warning.
        proposals: a file of boxes to learn from beside the annotated ones, "" for none.

    Raises:
        ValueError: nothing to learn from, class names that are not the annotations', or a store of other annotations.
    """
    store = TokenStore(store_path, cfg.MODEL.REGIONSPOT.TOKEN_STAGE) if store_path else None
    file = ProposalFile(proposals) if proposals else None
    mapper = RegionSpotDatasetMapper(cfg, True, token_store=store, proposal_file=file, vocabulary=name)
    if store is not None:
        store.check_origin({"annotations": describe_annotations(name)})
        if comm.is_main_process():
            store.verify()
    category_ids(name)  # labels are worth learning only if they are the file's
    records = DatasetCatalog.get(name)
    numbers = _region_numbers(records)
    kept = numbers > 0
    if store is not None and not all(key in records[0] for key in ("height", "width")):
        raise ValueError(f"data set {name!r}: its records need height and width, for stored tokens")
    if store is not None:
        without = kept & ~np.isin(image_ids(records), store.image_ids)
        if without.any():
            logger.warning("%s: %d images have no tokens in %s: left out", name, without.sum(), store_path)
        kept &= ~without
    if not kept.any():
        raise ValueError(f"data set {name!r}: no image has a box to learn from; is it the right annotation file?")
    if store is None or not store.has_feature_maps:  # else no image is read
        check_images(records, np.flatnonzero(kept), name, mapper, cfg.DATALOADER.SKIP_UNREADABLE)
    if store is not None and comm.is_main_process():
        check_unchanged(store, records, np.flatnonzero(kept), image_ids(records))
    logger.info("%s: %d images with %d regions; %s", name, kept.sum(), numbers[kept].sum(), _left_out(records, numbers))
    images = records if isinstance(records, Dataset) else DatasetFromList(records, copy=True)
    return Subset(images, np.flatnonzero(kept)), mapper  # type: ignore[arg-type]


def image_ids(records: Any) -> np.ndarray:
    """Return the (I,) image ids of a data set's records, without making the records where they are in arrays."""
    ids = getattr(records, "image_ids", None)
    return np.array([record["image_id"] for record in records]) if ids is None else ids


def image_sizes(records: Any) -> np.ndarray:
    """Return the (I, 2) heights and widths of a data set's images."""
    if hasattr(records, "heights"):
        return np.stack([records.heights, records.widths], axis=1)
    return np.array([(record["height"], record["width"]) for record in records]).reshape(-1, 2)


def _left_out(records: Any, numbers: np.ndarray) -> str:
    crowds, degenerate = getattr(records, "num_crowd", None), getattr(records, "num_degenerate", None)
    text = f"left out: {(numbers == 0).sum()} images without regions"
    return text if crowds is None else f"{text}, {crowds} crowd regions, {degenerate} boxes without area in the image"


def _region_numbers(records: Any) -> np.ndarray:
    """Return the number of regions of each image that are no crowds and, where that is known, have area."""
    numbers = getattr(records, "num_regions", None)
    if numbers is not None:
        return np.asarray(numbers)
    return np.array([sum(not a.get("iscrowd", 0) for a in record.get("annotations", ())) for record in records])


def describe_annotations(name: str) -> dict[str, str]:
    """Return the file of a data set's annotations and its SHA-256, or that of its records if it has no file."""
    json_file = MetadataCatalog.get(name).get("json_file")
    if json_file:
        return {"source": Path(json_file).name, "fingerprint": sha256_of_file(json_file)}
    digest = hashlib.sha256()
    for record in DatasetCatalog.get(name):
        kept = [[list(map(float, a["bbox"])), a["category_id"]] for a in record.get("annotations", ())]
        digest.update(json.dumps([record["image_id"], kept]).encode())
    return {"source": name, "fingerprint": digest.hexdigest()}
