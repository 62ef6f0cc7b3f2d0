"""Suspicious labels: annotated regions that look like another name, by confident learning.

Northcutt et al., "Confident Learning: Estimating Uncertainty in Dataset Labels" (JAIR 2021): a class's threshold is the
mean probability that its own annotations have for it. Names that the model confuses have low thresholds, so that being
confused is no reason for suspicion.
"""

from dataclasses import dataclass

import numpy as np
import torch

from regionspot.data.coco_io import AnnotationFile
from regionspot.data.coco_io.annotations import look_up
from regionspot.index.classify import IndexClassifier
from regionspot.index.store import RegionIndex


@dataclass(frozen=True)
class Audit:
    """What N annotated regions look like, in the order of their index.

    Attributes:
        annotations: (N,) int64, positions in the annotation file.
        labels: (N,) int64, annotated classes.
        suggested: (N,) int64, the class other than the label that fits best.
        suspicion: (N,) float32 in [0, 1]: how much better it fits, both compared with their classes' thresholds.
        is_suspicious: (N,) bool: the most probable class that reaches its threshold is not the label.
        label_scores, suggested_scores: (N,) float32, probabilities of both.
        thresholds: (K,) float32, mean probability of each class for its own annotations.
    """

    annotations: np.ndarray
    labels: np.ndarray
    suggested: np.ndarray
    suspicion: np.ndarray
    is_suspicious: np.ndarray
    label_scores: np.ndarray
    suggested_scores: np.ndarray
    thresholds: np.ndarray

    def ranked(self, only_suspicious: bool = True) -> np.ndarray:
        """Return the regions' rows, the most suspicious first."""
        rows = np.flatnonzero(self.is_suspicious) if only_suspicious else np.arange(len(self.labels))
        return rows[np.argsort(-self.suspicion[rows], kind="stable")]


def annotated_labels(index: RegionIndex, file: AnnotationFile) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions in the annotation file, and the classes, of all regions of an index of its boxes.

    Returns:
        (N,) int64 both; classes are in the order of the category ids.
    """
    columns = file.annotations()
    # keys are positions among the annotations of an image, in the order of the file
    order = np.argsort(columns.images, kind="stable")
    starts = np.concatenate([[0], np.bincount(columns.images, minlength=len(file.images.ids)).cumsum()])
    sorted_images = np.argsort(file.images.ids, kind="stable")
    positions = [np.zeros(0, np.int64)]
    for shard in index.shards():
        rows, _ = look_up(file.images.ids[sorted_images], shard["image_ids"].numpy())
        counts = shard["offsets"].diff().numpy()
        first = np.repeat(starts[sorted_images[rows]], counts)
        positions.append(order[first + shard["keys"].numpy()])
    annotations = np.concatenate(positions)
    return annotations, columns.labels[annotations].astype(np.int64)


def audit_labels(classifier: IndexClassifier, annotations: np.ndarray, labels: np.ndarray) -> Audit:
    """Compare the labels of regions with what they look like; the index is read twice.

    Args:
        classifier: of the index and the names of the classes; its probabilities must sum to 1.
        annotations: (N,) of the regions, see ``annotated_labels``.
        labels: (N,) int64 classes.

    Raises:
        ValueError: no region, or fewer than two classes.
    """
    if not len(labels) or classifier.num_names < 2:
        raise ValueError(
            f"expected annotated regions of at least two classes, got {len(labels)} of {classifier.num_names}"
        )
    targets = torch.from_numpy(labels)
    label_scores = torch.zeros(len(labels))
    for first, _, probabilities in classifier.probabilities():
        rows = slice(first, first + len(probabilities))
        label_scores[rows] = probabilities.cpu().gather(1, targets[rows, None])[:, 0]
    thresholds = _thresholds(label_scores, targets, classifier.num_names)
    columns: list[list[torch.Tensor]] = [[], [], [], []]
    for first, _, probabilities in classifier.probabilities():
        results = _compare(probabilities.cpu(), targets[first : first + len(probabilities)], thresholds)
        for column, values in zip(columns, results):
            column.append(values)
    suggested, suspicion, is_suspicious, suggested_scores = (torch.cat(column).numpy() for column in columns)
    return Audit(
        annotations,
        labels,
        suggested,
        suspicion,
        is_suspicious,
        label_scores.numpy(),
        suggested_scores,
        thresholds.numpy(),
    )


def _thresholds(label_scores: torch.Tensor, labels: torch.Tensor, num_names: int) -> torch.Tensor:
    """Return the (K,) mean probability of each class for its own annotations; 1 for a class without any."""
    counts = torch.bincount(labels, minlength=num_names)
    sums = torch.zeros(num_names, dtype=torch.float64).index_add_(0, labels, label_scores.double())
    return torch.where(counts > 0, sums / counts.clamp(min=1), 1.0).float()


def _compare(
    probabilities: torch.Tensor, labels: torch.Tensor, thresholds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ``Audit``'s suggested, suspicion, is_suspicious and suggested_scores of n regions."""
    margins = probabilities - thresholds  # (n, K)
    own = margins.gather(1, labels[:, None])[:, 0]
    best, suggested = margins.scatter(1, labels[:, None], -torch.inf).max(dim=1)
    confident = torch.where(margins >= 0, probabilities, -1.0)
    top, confident_class = confident.max(dim=1)
    is_suspicious = (top >= 0) & (confident_class != labels)
    # the class that is confident is the better suggestion where both rules differ
    suggested = torch.where(is_suspicious, confident_class, suggested)
    best = margins.gather(1, suggested[:, None])[:, 0]
    suspicion = (best - own + 2) / 4  # differences of two margins are in [-2, 2]
    return suggested, suspicion, is_suspicious, probabilities.gather(1, suggested[:, None])[:, 0]
