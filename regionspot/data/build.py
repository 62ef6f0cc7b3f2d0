"""Data loaders, and the vocabularies that belong to data sets."""

import difflib
import logging
import signal
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.utils import comm
from torch.utils.data import BatchSampler, DataLoader, Subset

from regionspot.data.dataset_mapper import RegionSpotDatasetMapper
from regionspot.data.datasets import category_ids, register_from_spec
from regionspot.data.image_check import check_images
from regionspot.data.proposals import ProposalFile
from regionspot.data.samplers import TrainingStream, build_training_stream
from regionspot.data.training_set import TrainingSet, image_ids, open_training_images
from regionspot.utils.signals import STOPPING
from regionspot.vocabulary import dataset_names, load_vocabulary

logger = logging.getLogger(__name__)


def build_train_loader(cfg: CfgNode, seed: int = 0) -> DataLoader:
    """Return the training loader over ``DATASETS.TRAIN``: lists of mapped images, without end.

    A batch holds this process's part of ``SOLVER.IMS_PER_BATCH``, split by ``SOLVER.ACCUMULATE``. Its
    ``batch_sampler.sampler`` is the ``TrainingStream``, whose ``start`` and ``seed`` may be set before iteration.

    Raises:
        ValueError: settings that do not go together; KeyError, FileNotFoundError: unknown data sets, missing files.
    """
    names, stores = cfg.DATASETS.TRAIN, cfg.DATASETS.TOKEN_STORES_TRAIN
    if not names:
        raise ValueError("DATASETS.TRAIN is empty: expected the name of a registered data set")
    check_registered(names, "DATASETS.TRAIN")
    if stores and len(stores) != len(names):
        raise ValueError(
            f"DATASETS.TOKEN_STORES_TRAIN: expected one store for each of {len(names)} data sets, or none; "
            f"got {len(stores)}"
        )
    if any(not path for path in stores):
        raise ValueError("DATASETS.TOKEN_STORES_TRAIN: expected a directory for each data set, got an empty name")
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        raise ValueError(
            "DATALOADER.ASPECT_RATIO_GROUPING: images are brought to squares, so it gains nothing and keeps a resumed "
            "run from going on exactly; set it to False"
        )
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN
    if proposals and len(proposals) != len(names):
        raise ValueError(
            f"DATASETS.PROPOSAL_FILES_TRAIN: expected one file for each of {len(names)} data sets, or none; "
            f"got {len(proposals)}"
        )
    files = zip(names, stores or [""] * len(names), proposals or [""] * len(names))
    images, mappers = zip(*(open_training_images(cfg, *parts) for parts in files))
    if len({mapper.token_store.has_feature_maps for mapper in mappers if mapper.token_store}) > 1:
        raise ValueError(
            "DATASETS.TOKEN_STORES_TRAIN: some stores hold feature maps and some do not; extract all with "
            "--feature-maps, or all without"
        )
    stream = build_training_stream(cfg, images, seed)
    return DataLoader(
        TrainingSet(images, mappers, seed, cfg.DATALOADER.SKIP_UNREADABLE),
        batch_sampler=BatchSampler(stream, local_batch_size(cfg), drop_last=True),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
        generator=torch.Generator(),  # else making an iterator would draw from the global one
        persistent_workers=cfg.DATALOADER.NUM_WORKERS > 0,
        pin_memory=_is_on_gpu(cfg),
        worker_init_fn=_start_worker,
    )


def _is_on_gpu(cfg: CfgNode) -> bool:
    return torch.device(cfg.MODEL.DEVICE).type == "cuda"


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    for number in STOPPING:  # of a whole process group; the training process ends the workers when it has saved
        signal.signal(number, signal.SIG_IGN)


def training_stream(loader: DataLoader) -> TrainingStream:
    """Return the stream that a training loader draws from."""
    assert isinstance(loader.batch_sampler, BatchSampler)
    assert isinstance(loader.batch_sampler.sampler, TrainingStream)
    return loader.batch_sampler.sampler


def local_batch_size(cfg: CfgNode) -> int:
    """Return the images of one forward pass of one process."""
    total, world, accumulate = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size(), cfg.SOLVER.ACCUMULATE
    if accumulate < 1 or total < 1 or total % (world * accumulate):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {total} must be a multiple of the {world} processes times SOLVER.ACCUMULATE "
            f"{accumulate}"
        )
    return total // (world * accumulate)


def build_test_loader(cfg: CfgNode, dataset_name: str, skip: Collection[int] = ()) -> Any:
    """Return Detectron2's test loader over ``dataset_name``, without the images whose ids are in ``skip``.

    Annotated boxes stay with the images; with a proposal file (see ``proposal_source``) its boxes are beside them,
    and what the file has for the data set is logged.

    Raises:
        ValueError: not as many files as data sets, or a file that does not fit; KeyError, FileNotFoundError: unknown
            data sets, missing files.
    """
    check_registered([dataset_name], "DATASETS.TEST")
    if cfg.TEST.BATCH_SIZE < 1:
        raise ValueError(f"TEST.BATCH_SIZE: expected at least 1, got {cfg.TEST.BATCH_SIZE}")
    source, path = proposal_source(cfg, dataset_name)
    records = DatasetCatalog.get(dataset_name)
    proposals = open_proposals(path, records) if source == "file" else None
    mapper = RegionSpotDatasetMapper(cfg, False, proposal_file=proposals)
    rows = np.array([row for row, image_id in enumerate(image_ids(records).tolist()) if image_id not in skip], int)
    if not len(rows):  # Detectron2's sampler wants an image at the least
        return []
    check_images(records, rows, dataset_name, mapper, cfg.DATALOADER.SKIP_UNREADABLE)
    if skip:
        records = Subset(records, rows.tolist())
    workers = cfg.DATALOADER.NUM_WORKERS
    loader = build_detection_test_loader(records, mapper=mapper, batch_size=cfg.TEST.BATCH_SIZE, num_workers=workers)
    loader.pin_memory = _is_on_gpu(cfg)  # of which Detectron2's function knows nothing
    return loader


def proposal_source(cfg: CfgNode, dataset_name: str) -> tuple[str, str]:
    """Return where the boxes of a test set come from, "gt", "file", "sam_automatic" or "detector", and the file.

    Raises:
        ValueError: a file is asked for and none is given, or files and test sets differ in number.
    """
    source, files = cfg.MODEL.REGIONSPOT.PROPOSALS.SOURCE, cfg.DATASETS.PROPOSAL_FILES_TEST
    if files and len(files) != len(cfg.DATASETS.TEST):
        raise ValueError(
            f"DATASETS.PROPOSAL_FILES_TEST: expected one file for each of {len(cfg.DATASETS.TEST)} test sets, or none; "
            f"got {len(files)}"
        )
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS: Detectron2 would run what a pickle asks for; expected False, which reads "
            "DATASETS.PROPOSAL_FILES_TEST safely"
        )
    path = dict(zip(cfg.DATASETS.TEST, files)).get(dataset_name, "")
    if source == "file" and not path:
        raise ValueError("MODEL.REGIONSPOT.PROPOSALS.SOURCE file: give DATASETS.PROPOSAL_FILES_TEST, one a test set")
    if path and source in ("file", "auto") and not Path(path).is_file():
        raise FileNotFoundError(f"DATASETS.PROPOSAL_FILES_TEST: {path}: no such file")
    if source == "auto":
        source = "file" if path else "gt"
    return source, path if source == "file" else ""


def open_proposals(path: str, records: Any) -> ProposalFile:
    """Open a proposal file and log what it has for a data set."""
    proposals, ids = ProposalFile(path), image_ids(records)
    if hasattr(records, "heights"):
        sizes = np.stack([records.heights, records.widths], axis=1)
    else:
        sizes = np.array([(record["height"], record["width"]) for record in records]).reshape(-1, 2)
    summary = proposals.summarize(ids, sizes)
    logger.log(logging.WARNING if proposals.count_missing(ids) else logging.INFO, summary)
    return proposals


def check_registered(names: Sequence[str], key: str) -> None:
    """Refuse names that are not registered and data sets whose annotation file is missing.

    A name of the form "my.json:my_images" is a data set by itself and is registered here.
    """
    for name in names:
        if name not in DatasetCatalog and not register_from_spec(name):
            close = difflib.get_close_matches(name, list(DatasetCatalog), 5, 0.3)
            raise KeyError(
                f"{key}: data set {name!r} is not registered; do you mean {', '.join(close) or 'my.json:my_images'}? "
                "A file of your own is named annotations.json:directory_of_images"
            )
        json_file = MetadataCatalog.get(name).get("json_file")
        if json_file and not Path(json_file).is_file():
            raise FileNotFoundError(f"{key}: annotations {json_file} of data set {name!r}: no such file")


def dataset_vocabulary(cfg: CfgNode, name: str) -> list[str]:
    """Return the class names that regions of a data set are scored against.

    They are the data set's own, or those of ``MODEL.REGIONSPOT.VOCABULARY``, which then stand for them one by one.

    Raises:
        ValueError: no class names, others than in the annotations, or the configured vocabulary is of another length.
    """
    own = dataset_names(name)
    if not own:
        raise ValueError(f"data set {name!r} has no class names: set thing_classes in its metadata")
    category_ids(name)  # are the names those of the annotations?
    if not cfg.MODEL.REGIONSPOT.VOCABULARY:
        return own
    given = load_vocabulary(cfg.MODEL.REGIONSPOT.VOCABULARY)
    if len(given) != len(own):
        raise ValueError(
            f"MODEL.REGIONSPOT.VOCABULARY has {len(given)} names, but {name} has {len(own)} classes; "
            "give one name a class, or none"
        )
    return given
