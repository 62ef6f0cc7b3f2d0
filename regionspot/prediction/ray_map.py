"""The same recognition on many machines, by Ray Data: actors with the model, images and tables from any file system."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from regionspot.prediction.batch_predictor import RegionBatchPredictor
from regionspot.prediction.region_filter import RegionFilter


def import_ray() -> Any:
    """Return Ray.

    Raises:
        ValueError: it is not installed.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
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
def connect(address: str, num_cpus: int | None = None) -> Iterator[Any]:
    """Connect to a Ray cluster inside the block; yield Ray.

    Args:
        address: of the cluster, "auto" for the one of this machine, or "local" to start one that ends with the block.
        num_cpus: of a local cluster; by default this machine's.

    Raises:
        ValueError: Ray is not installed.
        ConnectionError: no cluster answers at the address.
    """
    ray = import_ray()
    # Workers import this package from where the driver did.
    environment = {"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), "RAY_USAGE_STATS_ENABLED": "0"}}
    local = {"num_cpus": num_cpus, "include_dashboard": False} if address == "local" else {}
    ray.init(address, runtime_env=environment, log_to_driver=False, logging_level="ERROR", **local)
    try:
        yield ray
    finally:
        ray.shutdown()


def recognize_dataset(
    dataset: Any,
    cfg: CfgNode,
    vocabulary: Sequence[str],
    region_filter: RegionFilter | None = None,
    pool: RayPool | None = None,
    with_embeddings: bool = False,
    predictor: type[RegionBatchPredictor] = RegionBatchPredictor,
) -> Any:
    """Return a Ray data set of the regions of another's images, computed when it is written or read.

    An actor that is killed is started again, and its batches are repeated.

    Args:
        dataset: its rows have the columns that ``RegionBatchPredictor`` takes: ``path``, ``bytes`` or ``image``, and
            optionally ``boxes``; all others are passed on.
        cfg: the config.
        vocabulary: class names.
        region_filter: which regions are kept.
        pool: the actors.
        with_embeddings: whether rows have ``embeddings``.
        predictor: the class that does it.
    """
    pool = pool or RayPool()
    ray = import_ray()
    options = {"cfg": cfg, "vocabulary": vocabulary, "region_filter": region_filter, "with_embeddings": with_embeddings}
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = True
    context.execution_options.preserve_order = True
    return dataset.map_batches(
        _BatchFunction,
        fn_constructor_kwargs={"predictor": predictor, "options": options},
        batch_size=pool.batch_size,
        concurrency=pool.concurrency,
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        max_restarts=-1,
        max_task_retries=-1,
    )


class _BatchFunction:
    """Builds the predictor in an actor, and makes of its lists columns that Arrow takes."""

    def __init__(self, predictor: type[RegionBatchPredictor], options: dict[str, Any]) -> None:
        import torch

        torch.manual_seed(max(options["cfg"].SEED, 0))
        self._predictor = predictor(**options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import pyarrow

        columns = self._predictor(batch)
        return pyarrow.table({name: pyarrow.array(_plain(values), _types().get(name)) for name, values in columns.items()})
