"""Data loaders, and the vocabularies that belong to data sets."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.utils import comm
from torch.utils.data import BatchSampler, DataLoader

from regionspot.data.dataset_mapper import RegionSpotDatasetMapper
from regionspot.data.datasets import register_from_spec
from regionspot.data.proposals import ProposalFile
from regionspot.data.samplers import TrainingStream, build_training_stream
from regionspot.data.training_set import TrainingSet, open_training_images
from regionspot.vocabulary import load_vocabulary


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
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        raise ValueError(
            "DATALOADER.ASPECT_RATIO_GROUPING: images are brought to squares, so it gains nothing and keeps a resumed "
            "run from going on exactly; set it to False"
        )
    images, mappers = zip(
        *(open_training_images(cfg, name, stores[i] if stores else "") for i, name in enumerate(names))
    )
    stream = build_training_stream(cfg, images, seed)
    return DataLoader(
        TrainingSet(images, mappers, seed),
        batch_sampler=BatchSampler(stream, local_batch_size(cfg), drop_last=True),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=list,
        generator=torch.Generator(),  # else making an iterator would draw from the global one
        persistent_workers=cfg.DATALOADER.NUM_WORKERS > 0,
        worker_init_fn=_start_worker,
    )


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)


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


def build_test_loader(cfg: CfgNode, dataset_name: str, batch_size: int = 1) -> Any:
    """Return Detectron2's test loader over ``dataset_name``.

    Annotated boxes stay with the images. ``DATASETS.PROPOSAL_FILES_TEST``, one file for each of ``DATASETS.TEST``,
    gives other boxes to recognise.
    """
    check_registered([dataset_name], "DATASETS.TEST")
    files = dict(zip(cfg.DATASETS.TEST, cfg.DATASETS.PROPOSAL_FILES_TEST))
    proposals = ProposalFile(files[dataset_name]) if dataset_name in files else None
    mapper = RegionSpotDatasetMapper(cfg, False, proposal_file=proposals)
    return build_detection_test_loader(cfg, dataset_name, mapper=mapper, batch_size=batch_size)


def check_registered(names: Sequence[str], key: str) -> None:
    """Refuse names that are not registered and data sets whose annotation file is missing.

    A name of the form "my.json:my_images" is a data set by itself and is registered here.
    """
    for name in names:
        if name not in DatasetCatalog and not register_from_spec(name):
            close = difflib.get_close_matches(name, list(DatasetCatalog), 5, 0.3)
            raise KeyError(
                f"{key}: data set {name!r} is not registered; do you mean {', '.join(close) or 'my.json:my_images'}? "
                "A file of your own is named annotations.json:folder_of_images"
            )
        json_file = MetadataCatalog.get(name).get("json_file")
        if json_file and not Path(json_file).is_file():
            raise FileNotFoundError(f"{key}: annotations {json_file} of data set {name!r}: no such file")


def dataset_vocabulary(cfg: CfgNode, name: str) -> list[str]:
    """Return the class names that regions of a data set are scored against.

    They are the data set's own, or those of ``MODEL.REGIONSPOT.VOCABULARY``, which then stand for them one by one.

    Raises:
        ValueError: no class names, or the configured vocabulary is of another length.
    """
    metadata = MetadataCatalog.get(name)
    if not metadata.get("thing_classes"):
        DatasetCatalog.get(name)  # the names come with the annotations
    if not metadata.get("thing_classes"):
        raise ValueError(f"data set {name!r} has no class names: set thing_classes in its metadata")
    own = list(metadata.thing_classes)
    if not cfg.MODEL.REGIONSPOT.VOCABULARY:
        return own
    given = load_vocabulary(cfg.MODEL.REGIONSPOT.VOCABULARY)
    if len(given) != len(own):
        raise ValueError(
            f"MODEL.REGIONSPOT.VOCABULARY has {len(given)} names, but {name} has {len(own)} classes; "
            "give one name a class, or none"
        )
    return given
