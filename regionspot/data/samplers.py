"""The order of training images: Detectron2's samplers, made to start at any position."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import BatchSampler, Sampler

SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")


class TrainingStream(Sampler):
    """An endless stream of (position, index), determined by the seed, that can start at any position.

    ``position`` counts the samples of all processes and seeds their random augmentation. Processes take turns:
    together they see the same samples as a single process.

    Attributes:
        size: number of images.
        seed: determines the order; the same in all processes.
        repeat_factors: (size,) float, how often each image occurs in an epoch; None for once.
        start: number of samples that this process has used before; to be set before iteration.
    """

    def __init__(self, size: int, seed: int, repeat_factors: torch.Tensor | None = None) -> None:
        self.size, self.seed, self.repeat_factors = size, seed, repeat_factors
        self.start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.repeat_factors is None:
            sampler: Sampler = TrainingSampler(self.size, seed=self.seed)
        else:
            sampler = _RepeatSampler(self.repeat_factors, seed=self.seed)
        # Detectron2's samplers give each process every world_size-th index; positions follow the same pattern.
        positions = itertools.count(comm.get_rank(), comm.get_world_size())
        return itertools.islice(zip(positions, sampler), self.start, None)


class AspectRatioBatches(BatchSampler):
    """Batches of a ``TrainingStream`` whose images are all wide or all tall by ``is_wide`` (size,) bool, resumable."""

    def __init__(self, stream: TrainingStream, batch_size: int, is_wide: np.ndarray) -> None:
        super().__init__(stream, batch_size, drop_last=True)
        self.stream, self.is_wide = stream, is_wide

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:  # type: ignore[override]
        # Which images wait for a full batch depends on all images before: draw their indices again from the start.
        stream = copy.copy(self.stream)
        stream.start = 0
        return itertools.islice(self._batches(stream), self.stream.start // self.batch_size, None)

    def _batches(self, stream: TrainingStream) -> Iterator[list[tuple[int, int]]]:
        waiting: tuple[list, list] = [], []
        for sample in stream:
            group = waiting[int(self.is_wide[sample[1]])]
            group.append(sample)
            if len(group) == self.batch_size:
                yield group.copy()
                group.clear()


class _RepeatSampler(RepeatFactorTrainingSampler):
    """Detectron2's sampler without its loop over the images, of which there may be millions."""

    def _get_epoch_indices(self, generator: torch.Generator) -> torch.Tensor:
        draws = torch.rand(len(self._frac_part), generator=generator)
        repeats = self._int_part + (draws < self._frac_part).float()
        return torch.repeat_interleave(torch.arange(len(repeats)), repeats.long())


def category_repeat_factors(labels: np.ndarray, images: np.ndarray, num_images: int, cfg: CfgNode) -> np.ndarray:
    """Return each image's repeat factor by its rarest class, (num_images,) float64, at least 1, as in Detectron2.

    ``labels`` (M,) are the regions' classes, ``images`` (M,) the indices of their images.
    """
    pairs = np.unique(np.stack([images, labels]), axis=1)  # (2, P): each class of each image, once
    frequency = np.bincount(pairs[1]) / num_images
    with np.errstate(divide="ignore"):  # labels without a region, whose factor is never used
        factor = cfg.DATALOADER.REPEAT_THRESHOLD / frequency
    factor = np.maximum(np.sqrt(factor) if cfg.DATALOADER.REPEAT_SQRT else factor, 1)
    result = np.ones(num_images)
    np.maximum.at(result, pairs[0], factor[pairs[1]])
    return result


def _region_labels(dataset: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes (M,) of a data set's regions, and the index (M,) of the image of each region."""
    indices = getattr(dataset, "indices", None)
    records = dataset if indices is None else dataset.dataset
    # A JsonDataset has its labels in arrays: building millions of records would take minutes.
    if hasattr(records, "offsets"):
        images = np.repeat(np.arange(len(records)), np.diff(records.offsets))
        rank = np.full(len(records), -1)  # index in the subset, -1 outside
        rank[np.arange(len(records)) if indices is None else indices] = np.arange(len(dataset))
        is_inside = rank[images] >= 0
        return records.labels[is_inside].astype(np.int64), rank[images][is_inside]
    classes = [[a["category_id"] for a in dataset[index]["annotations"]] for index in range(len(dataset))]
    labels = np.array([label for image in classes for label in image], np.int64)
    return labels, np.repeat(np.arange(len(dataset)), [len(image) for image in classes])


def build_training_stream(cfg: CfgNode, datasets: Sequence[Any], seed: int) -> TrainingStream:
    """Return the stream over several data sets, one after the other.

    ``DATALOADER.SAMPLER_TRAIN`` "RepeatFactorTrainingSampler" repeats images with rare classes
    (``DATALOADER.REPEAT_THRESHOLD``, within each data set), ``DATASETS.TRAIN_RATIO`` sets the data sets' shares.

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
    # Without repeated images Detectron2's plain sampler, whose epochs are permutations.
    by_class = name == "RepeatFactorTrainingSampler"
    if not ratio and not by_class:
        return TrainingStream(size, seed)
    factors = [
        category_repeat_factors(*_region_labels(dataset), len(dataset), cfg) if by_class else np.ones(len(dataset))
        for dataset in datasets
    ]
    return TrainingStream(size, seed, torch.from_numpy(balance(factors, ratio)).float())


def balance(factors: list[np.ndarray], ratio: Sequence[float]) -> np.ndarray:
    """Scale repeat factors so that the data sets' sums have this ratio and no factor decreases."""
    if not ratio:
        return np.concatenate(factors)
    # Relative to the smallest scale, so that no factor decreases: below 1, images would be left out of epochs.
    scales = np.array([share / factor.sum() for share, factor in zip(ratio, factors)])
    return np.concatenate([factor * scale for factor, scale in zip(factors, scales / scales.min())])
