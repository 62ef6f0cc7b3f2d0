"""Which image comes when in training: Detectron2's samplers, made to go on at any position."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import Sampler

SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")


class TrainingStream(Sampler):
    """An endless stream of (position, index), a function of the seed alone, from any position on.

    ``position`` counts the samples of all processes together, so that what is random about a sample can be drawn
    from it. Processes take turns: together they see what one process would see.

    Attributes:
        start: samples of this process that were used before; to be set before iteration.
        seed: of the order.
    """

    def __init__(self, size: int, seed: int, repeat_factors: torch.Tensor | None = None) -> None:
        """
        Args:
            size: number of images.
            seed: the same in all processes.
            repeat_factors: (size,) float, how often each comes in an epoch; once by default.
        """
        self.size, self.seed, self.repeat_factors = size, seed, repeat_factors
        self.start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.repeat_factors is None:
            sampler: Sampler = TrainingSampler(self.size, seed=self.seed)
        else:
            sampler = _RepeatSampler(self.repeat_factors, seed=self.seed)
        positions = itertools.count(comm.get_rank(), comm.get_world_size())
        return itertools.islice(zip(positions, sampler), self.start, None)


class _RepeatSampler(RepeatFactorTrainingSampler):
    """Detectron2's, with an epoch of millions of images drawn in no time."""

    def _get_epoch_indices(self, generator: torch.Generator) -> torch.Tensor:
        draws = torch.rand(len(self._frac_part), generator=generator)
        repeats = self._int_part + (draws < self._frac_part).float()
        return torch.repeat_interleave(torch.arange(len(repeats)), repeats.long())


def category_repeat_factors(labels: np.ndarray, images: np.ndarray, number: int, cfg: CfgNode) -> np.ndarray:
    """Return each image's repeat factor by its rarest class, as Detectron2's repeat-factor sampling has it.

    Args:
        labels: (M,) classes of the regions.
        images: (M,) in which image each is.
        number: of images.
        cfg: with ``DATALOADER.REPEAT_THRESHOLD`` and ``REPEAT_SQRT``.

    Returns:
        (number,) float64, 1 or more.
    """
    pairs = np.unique(np.stack([images, labels]), axis=1)  # classes of each image, once
    frequency = np.bincount(pairs[1]) / number
    with np.errstate(divide="ignore"):
        factor = cfg.DATALOADER.REPEAT_THRESHOLD / frequency
    factor = np.maximum(np.sqrt(factor) if cfg.DATALOADER.REPEAT_SQRT else factor, 1)
    result = np.ones(number)
    np.maximum.at(result, pairs[0], factor[pairs[1]])
    return result


def _region_labels(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes of a data set's regions, and in which of its images each is."""
    indices = getattr(dataset, "indices", None)
    records = dataset if indices is None else dataset.dataset
    if hasattr(records, "offsets"):  # arrays: no record is made
        of = np.repeat(np.arange(len(records)), np.diff(records.offsets))
        rank = np.full(len(records), -1)
        rank[np.arange(len(records)) if indices is None else indices] = np.arange(len(dataset))
        kept = rank[of] >= 0
        return records.labels[kept].astype(np.int64), rank[of][kept]
    numbers = [[a["category_id"] for a in dataset[index]["annotations"]] for index in range(len(dataset))]
    labels = np.array([label for image in numbers for label in image], np.int64)
    return labels, np.repeat(np.arange(len(dataset)), [len(image) for image in numbers])


def build_training_stream(cfg: CfgNode, datasets: Sequence[Any], seed: int) -> TrainingStream:
    """Return the stream over several data sets, one behind the other.

    ``DATALOADER.SAMPLER_TRAIN`` "RepeatFactorTrainingSampler" repeats images with rare classes
    (``DATALOADER.REPEAT_THRESHOLD``, within each data set), ``DATASETS.TRAIN_RATIO`` gives the data sets' shares.

    Raises:
        ValueError: another sampler, or shares that do not fit the data sets.
    """
    name, ratio = cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATASETS.TRAIN_RATIO
    if name not in SAMPLERS:
        raise ValueError(f"DATALOADER.SAMPLER_TRAIN: expected {' or '.join(SAMPLERS)}, got {name!r}")
    if ratio and (len(ratio) != len(datasets) or min(ratio) <= 0):
        raise ValueError(
            f"DATASETS.TRAIN_RATIO: expected a positive share for each of {len(datasets)} data sets, got {tuple(ratio)}"
        )
    size = sum(len(dataset) for dataset in datasets)
    by_class = name == "RepeatFactorTrainingSampler"
    if not ratio and not by_class:
        return TrainingStream(size, seed)
    factors = [
        category_repeat_factors(*_region_labels(dataset), len(dataset), cfg) if by_class else np.ones(len(dataset))
        for dataset in datasets
    ]
    return TrainingStream(size, seed, torch.from_numpy(balance(factors, ratio)).float())


def balance(factors: list[np.ndarray], ratio: Sequence[float]) -> np.ndarray:
    """Scale repeat factors so that the data sets' sums are in a ratio and the least scaled data set stays as it is."""
    if not ratio:
        return np.concatenate(factors)
    scales = np.array([share / factor.sum() for share, factor in zip(ratio, factors)])
    return np.concatenate([factor * scale for factor, scale in zip(factors, scales / scales.min())])
