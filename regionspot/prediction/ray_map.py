"""The same recognition on many machines, by Ray Data: actors with the model, images and tables from any file system."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode

from regionspot.prediction.batch_predictor import RegionBatchPredictor
from regionspot.prediction.loading import SampleReader
from regionspot.prediction.region_filter import RegionFilter
from regionspot.prediction.regions import RegionSource
from regionspot.prediction.sources import ImageList, ImageRecord


def import_ray() -> Any:
    """Return Ray.

    Raises:
        ValueError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    try:
        import ray
        import ray.data
    except ImportError:
        raise ValueError("Ray is not installed: pip install 'regionspot[ray]'") from None
    return ray


@dataclass(frozen=True)
class RayPool:
    """The actors of a run.

    Attributes:
        concurrency: number of actors, each with a model of its own.
        num_cpus: CPUs of each.
        num_gpus: GPUs of each, which may be a part of one.
        batch_size: images of a call.
    """

    concurrency: int = 1
    num_cpus: float = 1
    num_gpus: float = 0
    batch_size: int = 4


@contextmanager
def connect(address: str, num_cpus: int | None = None, object_store_bytes: int | None = None) -> Iterator[Any]:
    """Connect to a Ray cluster inside the block, unless this process is connected already; yield Ray.

    Args:
        address: of the cluster, "auto" for the one of this machine, or "local" to start one that ends with the block.
        num_cpus: of a local cluster; by default this machine's.
        object_store_bytes: shared memory of a local cluster; by default Ray's choice.

    Raises:
        ValueError: Ray is not installed.
        ConnectionError: no cluster answers at the address.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    # Workers import this package from where the driver did.
    variables = {name: os.environ[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS") if name in os.environ}
    environment = {"env_vars": {**variables, "RAY_USAGE_STATS_ENABLED": "0"}}
    local: dict[str, Any] = {}
    if address == "local":
        local = {"num_cpus": num_cpus, "object_store_memory": object_store_bytes, "include_dashboard": False}
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(address, runtime_env=environment, log_to_driver=False, logging_level="ERROR", **local)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray sets one of its own, which would outlive it
    try:
        yield ray
    finally:
        ray.shutdown()


def map_images(
    dataset: Any,
    cfg: CfgNode,
    vocabulary: Sequence[str],
    region_filter: RegionFilter | None = None,
    pool: RayPool | None = None,
    with_embeddings: bool = False,
    regions: RegionSource | None = None,
    predictor: type[RegionBatchPredictor] = RegionBatchPredictor,
) -> Any:
    """Return a Ray data set with the regions of another's images; they are computed when it is read or written.

    A process that is killed is started again, and its batches are repeated, as Ray Data does by default.

    Args:
        dataset: its rows have the columns that ``RegionBatchPredictor`` takes: ``path``, ``bytes`` or ``image``, and
            optionally ``boxes``; all others are passed on.
        cfg: the config.
        vocabulary: class names.
        region_filter: which regions are kept.
        pool: the actors.
        with_embeddings: whether rows have ``embeddings``.
        regions: returns the boxes of images that come as rows of ``image_rows``.
        predictor: the class that does it.
    """
    pool = pool or RayPool()
    context = import_ray().data.DataContext.get_current()
    context.execution_options.preserve_order = True
    options = {"cfg": cfg, "vocabulary": vocabulary, "region_filter": region_filter, "with_embeddings": with_embeddings}
    return dataset.map_batches(
        _Actor,
        fn_constructor_kwargs={"predictor": predictor, "options": options, "regions": regions},
        batch_size=pool.batch_size,
        concurrency=pool.concurrency,
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
    )


def image_rows(images: ImageList) -> list[dict[str, Any]]:
    """Return a row of each image of a list, for ``ray.data.from_items``."""
    return [asdict(record) for record in images]


class _Actor:
    """Builds the predictor in a process of its own, and returns tables of Arrow."""

    def __init__(
        self, predictor: type[RegionBatchPredictor], options: dict[str, Any], regions: RegionSource | None
    ) -> None:
        torch.manual_seed(max(options["cfg"].SEED, 0))
        self._predictor = predictor(**options)
        self._reader = SampleReader(ImageList(), regions, options["cfg"].INPUT.DEEP_RANGE)

    def __call__(self, batch: dict[str, Any]) -> Any:
        import pyarrow

        columns = {name: _to_lists(values) for name, values in batch.items()}
        columns = self._recognize_rows(columns) if "frame" in columns else self._predictor(columns)
        types = _arrow_types(pyarrow)
        return pyarrow.table(
            {name: pyarrow.array([_plain(x) for x in values], types.get(name)) for name, values in columns.items()}
        )

    def _recognize_rows(self, columns: dict[str, list]) -> dict[str, Any]:
        """Recognize a batch of ``image_rows``."""
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        samples = [self._reader.read(ImageRecord(**row)) for row in rows]
        # an image that cannot be read is one without pixels, whose error is known already
        columns["image"] = [_EMPTY if sample.error or sample.image is None else sample.image for sample in samples]
        if self._reader.regions is not None:
            columns["boxes"] = [_NO_BOXES if sample.boxes is None else sample.boxes for sample in samples]
            columns["proposal_scores"] = [sample.proposal_scores for sample in samples]
        result = self._predictor(columns)
        result["error"] = [sample.error or error for sample, error in zip(samples, result["error"])]
        return {**result, "has_entry": [sample.has_entry for sample in samples]}


_EMPTY, _NO_BOXES = np.zeros((0, 0, 3), np.uint8), np.zeros((0, 4), np.float32)


def _to_lists(values: np.ndarray) -> list:
    """Return a column as Python objects; Ray's arrays of boxes are (N,) arrays of (4,) arrays."""
    return [_plain(value) if value is not None else None for value in values]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype == object:
        return [_plain(x) for x in value]
    if isinstance(value, np.ndarray) and value.ndim < 3:
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value


def _arrow_types(pyarrow: Any) -> dict[str, Any]:
    """Return the types of the columns that lists alone do not tell, as where no image of a batch has regions."""
    real, text = pyarrow.list_(pyarrow.float32()), pyarrow.list_(pyarrow.string())
    return {
        "boxes": pyarrow.list_(real),
        "classes": pyarrow.list_(pyarrow.int64()),
        "class_names": text,
        "scores": real,
        "detection_scores": real,
        "unknown": pyarrow.list_(pyarrow.bool_()),
        "has_entry": pyarrow.bool_(),
        "masks": text,
        "embeddings": pyarrow.list_(real),
        "error": pyarrow.string(),
        "height": pyarrow.int64(),
        "width": pyarrow.int64(),
    }


def run_on_ray(
    ray: Any,
    inputs: Sequence[str],
    images: ImageList | None,
    output: str,
    **arguments: Any,
) -> None:
    """Recognize images on the cluster, and write Parquet, a row of each image.

    Args:
        ray: see ``connect``.
        inputs: without ``images``, one or more addresses that Ray reads, such as "s3://bucket/photos": Parquet tables
            with the columns of ``map_images``, or directories of images.
        images: a list whose paths all machines can read.
        output: a directory on any file system that Ray writes.
        **arguments: those of ``map_images``.
    """
    if images is not None:
        dataset = ray.data.from_items(image_rows(images))
    elif all(text.endswith((".parquet", ".parquet/")) for text in inputs):
        dataset = ray.data.read_parquet(list(inputs))
    else:
        dataset = ray.data.read_binary_files(list(inputs), include_paths=True)
    map_images(dataset, **arguments).write_parquet(output)


def is_for_ray(inputs: Sequence[str]) -> bool:
    """Return whether inputs are addresses that only Ray reads."""
    return all("://" in text or text.rstrip("/").endswith(".parquet") for text in inputs)
