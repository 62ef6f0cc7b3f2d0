"""Suspicious labels: annotated regions that look like another name.

The model's logits are calibrated on the labels first, by a temperature and a bias for each class (Alexandari et al.,
"Maximum Likelihood with Bias-Corrected Calibration", ICML 2020): a name that the model prefers to another one whatever
it sees is no reason for suspicion. Few wrong labels among many hardly move so few parameters.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from regionspot.data.coco_io import AnnotationFile
from regionspot.data.coco_io.annotations import look_up
from regionspot.index.classify import IndexClassifier
from regionspot.index.store import RegionIndex

MIN_SUSPICION = 0.95  # of labels that are reported
MAX_FITTED = 10_000_000  # logits that calibration holds in memory


@dataclass(frozen=True)
class Audit:
    """What N annotated regions look like, in the order of their index.

    Attributes:
        annotations: (N,) int64, positions in the annotation file.
        labels: (N,) int64, annotated classes.
        suggested: (N,) int64, the most probable class other than the label.
        log_ratios: (N,) float32, of the probability of the suggestion to that of the label.
        label_scores, suggested_scores: (N,) float32, calibrated probabilities of both.
    """

    annotations: np.ndarray
    labels: np.ndarray
    suggested: np.ndarray
    log_ratios: np.ndarray
    label_scores: np.ndarray
    suggested_scores: np.ndarray

    @property
    def suspicion(self) -> np.ndarray:
        """(N,) float32 in [0, 1], the probability of the suggestion if either it or the label is right."""
        return 1 / (1 + np.exp(-self.log_ratios.clip(-80, 80)))

    @property
    def is_suspicious(self) -> np.ndarray:
        """(N,) bool: a suspicion of at least ``MIN_SUSPICION``."""
        return self.suspicion >= MIN_SUSPICION

    def ranked(self, only_suspicious: bool = True) -> np.ndarray:
        """Return the regions' rows, the most suspicious first."""
        rows = np.flatnonzero(self.is_suspicious) if only_suspicious else np.arange(len(self.labels))
        return rows[np.argsort(-self.log_ratios[rows], kind="stable")]


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
        classifier: of the index and the names of the classes, without background.
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
    scale, bias = calibrate(*_sample(classifier, targets))

    def calibrated() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for first, _, logits in classifier.logits():
            yield (logits.cpu() * scale + bias).log_softmax(dim=1), targets[first : first + len(logits)]

    columns = [torch.cat(x).numpy() for x in zip(*(_compare(x, chunk) for x, chunk in calibrated()))]
    return Audit(annotations, labels, *columns)


def _sample(classifier: IndexClassifier, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (n, K) logits and (n,) labels of regions spread over the index, as many as memory allows."""
    step = -(-len(targets) * classifier.num_names // MAX_FITTED)
    logits = [x[-first % step :: step].cpu() for first, _, x in classifier.logits()]
    return torch.cat(logits), targets[::step]


def calibrate(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scale, (1,), and the biases of classes, (K,), with which logits explain labels best.

    Args:
        logits: (n, K) float32.
        labels: (n,) int64.
    """
    log_scale = torch.zeros(1, requires_grad=True)
    bias = torch.zeros(logits.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([log_scale, bias], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        # a class with few annotations keeps a bias near 0
        prior = 0.25 * bias.square().sum() / len(labels)
        value = F.cross_entropy(logits * log_scale.exp() + bias, labels) + prior
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return log_scale.detach().exp(), bias.detach()


def _compare(log_probabilities: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return ``Audit``'s suggested, log_ratios, label_scores and suggested_scores of n regions."""
    own = log_probabilities.gather(1, labels[:, None])[:, 0]
    best, suggested = log_probabilities.scatter(1, labels[:, None], -torch.inf).max(dim=1)
    return suggested, best - own, own.exp(), best.exp()
