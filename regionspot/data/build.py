"""Data loaders, and the vocabulary that belongs to a data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader, build_detection_train_loader

from regionspot.data.dataset_mapper import RegionSpotDatasetMapper
from regionspot.data.proposals import ProposalFile
from regionspot.data.token_store import TokenStore
from regionspot.vocabulary import load_vocabulary


def build_train_loader(cfg: CfgNode) -> Any:
    """Return Detectron2's training loader over ``DATASETS.TRAIN``."""
    if not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty: expected the name of a registered data set")
    check_registered(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
    stores = cfg.DATASETS.TOKEN_STORES_TRAIN
    if len(stores) not in (0, 1) or (stores and len(cfg.DATASETS.TRAIN) != 1):
        raise ValueError(f"DATASETS.TOKEN_STORES_TRAIN: expected one file for one data set, or none; got {stores}")
    store = TokenStore(stores[0]) if stores else None
    return build_detection_train_loader(cfg, mapper=RegionSpotDatasetMapper(cfg, True, token_store=store))


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
    """Refuse names that are not registered and data sets whose annotation file is missing."""
    for name in names:
        if name not in DatasetCatalog:
            raise KeyError(
                f"{key}: data set {name!r} is not registered; registered are {', '.join(sorted(DatasetCatalog)[:40])}"
            )
        json_file = MetadataCatalog.get(name).get("json_file")
        if json_file and not Path(json_file).is_file():
            raise FileNotFoundError(f"{key}: annotations {json_file} of data set {name!r}: no such file")


def dataset_vocabulary(cfg: CfgNode, names: Sequence[str]) -> list[str]:
    """Return the class names that regions of the data sets are scored against.

    They are the data sets' own, or those of ``MODEL.REGIONSPOT.VOCABULARY``, which then stand for them one by one.

    Raises:
        ValueError: the data sets differ in their names, or the configured vocabulary is of another length.
    """
    vocabularies = {name: _class_names(name) for name in names}
    first = vocabularies[names[0]]
    for name, vocabulary in vocabularies.items():
        if vocabulary != first:
            raise ValueError(f"data sets {names[0]} and {name} have different class names; give sets of one vocabulary")
    if not cfg.MODEL.REGIONSPOT.VOCABULARY:
        return first
    given = load_vocabulary(cfg.MODEL.REGIONSPOT.VOCABULARY)
    if len(given) != len(first):
        raise ValueError(
            f"MODEL.REGIONSPOT.VOCABULARY has {len(given)} names, but {names[0]} has {len(first)} classes; "
            "give one name a class, or none"
        )
    return given


def _class_names(name: str) -> list[str]:
    metadata = MetadataCatalog.get(name)
    if not metadata.get("thing_classes"):
        DatasetCatalog.get(name)  # the names come with the annotations
    if not metadata.get("thing_classes"):
        raise ValueError(f"data set {name!r} has no class names: set thing_classes in its metadata")
    return list(metadata.thing_classes)
