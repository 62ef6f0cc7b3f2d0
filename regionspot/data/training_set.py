"""The images that training draws from, and the fingerprint of their annotations."""

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
from regionspot.data.tokens import TokenStore, get_token_stages
from regionspot.utils.files import sha256_of_file

logger = logging.getLogger(__name__)

_MOST_SKIPPED = 100  # unreadable images in a row; more mean that a disk or directory is gone


class TrainingSet(Dataset):
    """Mapped images of several data sets, one after the other.

    Seed and position in the stream determine the augmentation of a sample; the number of workers and processes and
    resuming do not matter. With ``skip_unreadable`` the next image replaces an unreadable one; ``unreadable`` of the
    sample has the reasons.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        mappers: Sequence[Callable[[dict[str, Any]], dict[str, Any]]],
        seed: int,
        skip_unreadable: bool = False,
    ) -> None:
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
        # Python's and NumPy's generators are those that Detectron2's augmentations draw from.
        random.seed(f"{self.seed} {position}")
        np.random.seed(random.getrandbits(32))
        # side="right", so that empty data sets are passed over
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.mappers[part](self.datasets[part][index - int(self.starts[part])])


def open_training_images(
    cfg: CfgNode, name: str, store_path: str = "", proposals: str = ""
) -> tuple[Any, RegionSpotDatasetMapper]:
    """Return the images of a data set that have regions to learn from, and their mapper.

    Args:
        cfg: the config.
        name: a registered data set.
        store_path: its token store, "" for none; images that it lacks are left out with a warning.
        proposals: a file of additional boxes to learn from, "" for none.

    Raises:
        ValueError: no regions, class names other than the annotations', or a store of other annotations.
    """
    # 1. The files, and whether they belong together.
    store = TokenStore(store_path, *get_token_stages(cfg)) if store_path else None
    file = ProposalFile(proposals) if proposals else None
    mapper = RegionSpotDatasetMapper(cfg, True, token_store=store, proposal_file=file, vocabulary=name)
    if store is not None:
        store.check_origin({"annotations": describe_annotations(name)})
        if comm.is_main_process():  # hashing terabytes once is enough
            store.verify()
    category_ids(name)  # raises if the labels are not the file's

    # 2. The images with regions and, where stored tokens are used, with tokens.
    records = DatasetCatalog.get(name)
    if file is not None:
        check_proposals(file, records)
    num_regions = _count_regions(records)
    is_used = num_regions > 0
    if store is not None:
        if len(records) and not all(key in records[0] for key in ("height", "width")):
            raise ValueError(f"data set {name!r}: its records need height and width, for stored tokens")
        has_no_tokens = is_used & ~np.isin(image_ids(records), store.image_ids)
        if has_no_tokens.any():
            logger.warning("%s: %d images have no tokens in %s: left out", name, has_no_tokens.sum(), store_path)
        is_used &= ~has_no_tokens
    if not is_used.any():
        raise ValueError(f"data set {name!r}: no image has a box to learn from; is it the right annotation file?")

    # 3. Their files, unless stored feature maps replace them.
    rows = np.flatnonzero(is_used)
    if store is None or not store.has_feature_maps:
        check_images(records, rows, name, mapper, cfg.DATALOADER.SKIP_UNREADABLE)
    if store is not None and comm.is_main_process():
        check_unchanged(store, records, rows, image_ids(records))
    left_out = f"left out: {(num_regions == 0).sum()} images without regions"
    if hasattr(records, "num_crowd"):
        left_out += f", {records.num_crowd} crowd regions, {records.num_degenerate} boxes without area in the image"
    logger.info("%s: %d images with %d regions; %s", name, is_used.sum(), num_regions[is_used].sum(), left_out)
    images = records if isinstance(records, Dataset) else DatasetFromList(records, copy=True)
    return Subset(images, rows), mapper  # type: ignore[arg-type]


def check_proposals(proposals: ProposalFile, records: Any) -> None:
    """Log what a proposal file has of a data set's images, as a warning if some are missing.

    Raises:
        ValueError: it has none of them.
    """
    ids = image_ids(records)
    summary = proposals.summarize(ids, image_sizes(records))
    logger.log(logging.WARNING if proposals.count_missing(ids) else logging.INFO, summary)


def image_ids(records: Any) -> np.ndarray:
    """Return the (I,) image ids of a data set's records, those of a ``JsonDataset`` without building the records."""
    if hasattr(records, "image_ids"):
        return records.image_ids
    return np.array([record["image_id"] for record in records])


def image_sizes(records: Any) -> np.ndarray:
    """Return the (I, 2) heights and widths of a data set's images."""
    if hasattr(records, "heights"):
        return np.stack([records.heights, records.widths], axis=1)
    return np.array([(record["height"], record["width"]) for record in records]).reshape(-1, 2)


def _count_regions(records: Any) -> np.ndarray:
    """Return the number of each image's regions that are not crowds and, where that is known, have area."""
    if hasattr(records, "num_regions"):
        return np.asarray(records.num_regions)
    return np.array([sum(not a.get("iscrowd", 0) for a in record.get("annotations", ())) for record in records])


def describe_annotations(name: str) -> dict[str, str]:
    """Return name and SHA-256 of a data set's annotation file, or of its records if it has no file."""
    json_file = MetadataCatalog.get(name).get("json_file")
    if json_file:
        return {"source": Path(json_file).name, "fingerprint": sha256_of_file(json_file)}
    # Records without a file: the parts that tokens depend on.
    digest = hashlib.sha256()
    for record in DatasetCatalog.get(name):
        regions = [[list(map(float, a["bbox"])), a["category_id"]] for a in record.get("annotations", ())]
        digest.update(json.dumps([record["image_id"], regions]).encode())
    return {"source": name, "fingerprint": digest.hexdigest()}
