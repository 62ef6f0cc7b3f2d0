"""Data loaders, and the vocabularies that belong to data sets."""

import difflib
import logging
import signal
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog, build_detection_test_loader
from detectron2.utils import comm
from torch.utils.data import BatchSampler, DataLoader, Subset

from regionspot.data.dataset_mapper import RegionSpotDatasetMapper
from regionspot.data.datasets import category_ids, register_from_spec
from regionspot.data.image_check import check_images
from regionspot.data.packed_loader import PackedLoader
from regionspot.data.proposals import ProposalFile
from regionspot.data.samplers import AspectRatioBatches, TrainingStream, build_training_stream
from regionspot.data.training_set import TrainingSet, check_proposals, image_ids, image_sizes, open_training_images
from regionspot.utils.command_line import STOPPING
from regionspot.vocabulary import dataset_names, load_vocabulary

logger = logging.getLogger(__name__)


def build_train_loader(cfg: CfgNode, seed: int = 0) -> DataLoader:
    """Return the endless training loader over ``DATASETS.TRAIN``, whose batches are lists of mapped images.

    A batch is this process's part of ``SOLVER.IMS_PER_BATCH``, divided by ``SOLVER.ACCUMULATE``. ``start`` and ``seed``
    of its ``training_stream`` may be set before iteration.

    Raises:
        ValueError: settings that contradict each other.
        KeyError, FileNotFoundError: unknown data sets, missing files.
    """
    # 1. The settings, checked before files are read.
    names, stores = cfg.DATASETS.TRAIN, cfg.DATASETS.TOKEN_STORES_TRAIN
    if not names:
        raise ValueError("DATASETS.TRAIN is empty: expected the name of a registered data set")
    check_registered(names, "DATASETS.TRAIN")
    _check_one_each("DATASETS.TOKEN_STORES_TRAIN", stores, "store", len(names))
    if any(not path for path in stores):
        raise ValueError("DATASETS.TOKEN_STORES_TRAIN: expected a directory for each data set, got an empty name")
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        raise ValueError(
            "DATALOADER.ASPECT_RATIO_GROUPING: images are resized to squares, so it gains nothing and would keep a "
            "run from resuming exactly; set it to False"
        )
    proposals = cfg.DATASETS.PROPOSAL_FILES_TRAIN
    _check_one_each("DATASETS.PROPOSAL_FILES_TRAIN", proposals, "file", len(names))

    # 2. Images with regions to learn from, and their mappers.
    files = zip(names, stores or [""] * len(names), proposals or [""] * len(names))
    images, mappers = zip(*(open_training_images(cfg, *parts) for parts in files))
    if len({mapper.token_store.has_feature_maps for mapper in mappers if mapper.token_store}) > 1:
        raise ValueError(
            "DATASETS.TOKEN_STORES_TRAIN: some stores hold feature maps and some do not; extract all with "
            "--feature-maps, or all without"
        )

    # 3. Their order, in batches.
    dataset = TrainingSet(images, mappers, seed, cfg.DATALOADER.SKIP_UNREADABLE)
    size = local_batch_size(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE)
    batches = BatchSampler(build_training_stream(cfg, images, seed), size, drop_last=True)
    return _resumable_loader(dataset, batches, cfg.DATALOADER.NUM_WORKERS, _is_on_gpu(cfg))


def build_mapped_loader(
    dataset: Any,
    mapper: Callable[[dict[str, Any]], dict[str, Any]],
    total_batch_size: int,
    *,
    num_workers: int = 0,
    aspect_ratio_grouping: bool = True,
    accumulate: int = 1,
    stream: TrainingStream | None = None,
    pin_memory: bool = False,
) -> DataLoader:
    """Return a loader as ``build_detection_train_loader`` of Detectron2, which resumes exactly.

    Args:
        dataset: Detectron2's standard records, in a list or a data set.
        mapper: from a record to the detector's input; it may draw from Python's and NumPy's global generators.
        total_batch_size: images per step of all processes.
        num_workers: processes that map records, per training process.
        aspect_ratio_grouping: batches of images that are all wide or all tall, which need little padding.
        accumulate: batches per step.
        stream: the order of the images; by default each occurs once in an epoch.
        pin_memory: see ``DataLoader``.
    """
    stream = stream or TrainingStream(len(dataset), 0)
    size = local_batch_size(total_batch_size, accumulate)
    batches = BatchSampler(stream, size, drop_last=True)
    if aspect_ratio_grouping:
        heights, widths = image_sizes(dataset).T
        batches = AspectRatioBatches(stream, size, widths > heights)
    records = DatasetFromList(dataset, copy=False) if isinstance(dataset, list) else dataset
    images = TrainingSet([records], [mapper], stream.seed)
    return _resumable_loader(images, batches, num_workers, pin_memory)


def _resumable_loader(dataset: TrainingSet, batches: BatchSampler, num_workers: int, pin_memory: bool) -> DataLoader:
    return PackedLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        # Iterators draw a seed from it; from the global generator, they would change a resumed run's random numbers.
        generator=torch.Generator(),
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
    )


def _is_on_gpu(cfg: CfgNode) -> bool:
    return torch.device(cfg.MODEL.DEVICE).type == "cuda"


def _check_one_each(key: str, values: Sequence[str], what: str, num_sets: int, sets: str = "data sets") -> None:
    if values and len(values) != num_sets:
        raise ValueError(f"{key}: expected one {what} for each of {num_sets} {sets}, or none; got {len(values)}")


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches the whole process group; the training process ends its workers after it has saved.
    for stop_signal in STOPPING:
        signal.signal(stop_signal, signal.SIG_IGN)


def training_stream(loader: DataLoader) -> TrainingStream:
    """Return the stream that a training loader draws from."""
    # both kinds of batches, BatchSampler and AspectRatioBatches, keep it as their sampler
    assert isinstance(loader.batch_sampler, BatchSampler)
    assert isinstance(loader.batch_sampler.sampler, TrainingStream)
    return loader.batch_sampler.sampler


def local_batch_size(total: int, accumulate: int) -> int:
    """Return how many of a step's ``total`` images are in one forward pass of one process."""
    world = comm.get_world_size()
    if accumulate < 1 or total < 1 or total % (world * accumulate):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {total} must be a multiple of the {world} processes times SOLVER.ACCUMULATE "
            f"{accumulate}"
        )
    return total // (world * accumulate)


def build_test_loader(cfg: CfgNode, dataset_name: str, skip: Collection[int] = ()) -> Any:
    """Return Detectron2's test loader over ``dataset_name``, without the images whose ids are in ``skip``.

    The images have their annotated boxes and, with a proposal file (see ``proposal_source``), its boxes.

    Raises:
        ValueError: not as many files as data sets, or a file for another data set.
        KeyError, FileNotFoundError: unknown data sets, missing files.
    """
    check_registered([dataset_name], "DATASETS.TEST")
    if cfg.TEST.BATCH_SIZE < 1:
        raise ValueError(f"TEST.BATCH_SIZE: expected at least 1, got {cfg.TEST.BATCH_SIZE}")
    source, path = proposal_source(cfg, dataset_name)
    records = DatasetCatalog.get(dataset_name)
    proposals = None
    if source == "file":
        proposals = ProposalFile(path)
        check_proposals(proposals, records)
    mapper = RegionSpotDatasetMapper(cfg, False, proposal_file=proposals)
    # Skipped images are those whose predictions an interrupted evaluation has written already.
    rows = np.array([row for row, image_id in enumerate(image_ids(records).tolist()) if image_id not in skip], int)
    if not len(rows):
        return []  # Detectron2's sampler needs at least one image
    check_images(records, rows, dataset_name, mapper, cfg.DATALOADER.SKIP_UNREADABLE)
    if skip:
        records = Subset(records, rows.tolist())
    workers = cfg.DATALOADER.NUM_WORKERS
    loader = build_detection_test_loader(records, mapper=mapper, batch_size=cfg.TEST.BATCH_SIZE, num_workers=workers)
    loader.pin_memory = _is_on_gpu(cfg)  # Detectron2's function does not take it
    return loader


def proposal_source(cfg: CfgNode, dataset_name: str) -> tuple[str, str]:
    """Return where the boxes of a test set come from, "gt", "file", "sam_automatic" or "detector", and the file.

    Raises:
        ValueError: the source is a file and the config has none, or not one for each test set.
        FileNotFoundError: the file is missing.
    """
    source, files = cfg.MODEL.REGIONSPOT.PROPOSALS.SOURCE, cfg.DATASETS.PROPOSAL_FILES_TEST
    num_sets = len(cfg.DATASETS.TEST)
    _check_one_each("DATASETS.PROPOSAL_FILES_TEST", files, "file", num_sets, "test sets")
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS: Detectron2 would run what a pickle asks for; expected False, which reads "
            "DATASETS.PROPOSAL_FILES_TEST safely"
        )
    path = dict(zip(cfg.DATASETS.TEST, files)).get(dataset_name, "")
    if source == "file" and not path:
        raise ValueError("MODEL.REGIONSPOT.PROPOSALS.SOURCE file: give DATASETS.PROPOSAL_FILES_TEST, one per test set")
    if path and source in ("file", "auto") and not Path(path).is_file():
        raise FileNotFoundError(f"DATASETS.PROPOSAL_FILES_TEST: {path}: no such file")
    if source == "auto":
        source = "file" if path else "gt"
    return source, path if source == "file" else ""


def check_registered(names: Sequence[str], key: str) -> None:
    """Refuse unknown data sets and missing annotation files; register names such as "my.json:my_images"."""
    for name in names:
        if name not in DatasetCatalog and not register_from_spec(name):
            # A low cutoff: a suggestion that is far off costs nothing.
            close = difflib.get_close_matches(name, list(DatasetCatalog), 5, 0.3)
            raise KeyError(
                f"{key}: data set {name!r} is not registered; do you mean {', '.join(close) or 'my.json:my_images'}? "
                "A file of your own is named annotations.json:directory_of_images"
            )
        json_file = MetadataCatalog.get(name).get("json_file")
        if json_file and not Path(json_file).is_file():
            raise FileNotFoundError(f"{key}: annotations {json_file} of data set {name!r}: no such file")


def dataset_vocabulary(cfg: CfgNode, name: str) -> list[str]:
    """Return the class names that a data set's regions are scored against.

    These are the data set's own or their replacements, one by one, in ``MODEL.REGIONSPOT.VOCABULARY``.

    Raises:
        ValueError: no class names, other names than in the annotations, or a configured vocabulary of another length.
    """
    own = dataset_names(name)
    if not own:
        raise ValueError(f"data set {name!r} has no class names: set thing_classes in its metadata")
    category_ids(name)  # raises if the names are not those of the annotations
    if not cfg.MODEL.REGIONSPOT.VOCABULARY:
        return own
    names = load_vocabulary(cfg.MODEL.REGIONSPOT.VOCABULARY)
    if len(names) != len(own):
        raise ValueError(
            f"MODEL.REGIONSPOT.VOCABULARY has {len(names)} names, but {name} has {len(own)} classes; "
            "give one name per class, or none"
        )
    return names
