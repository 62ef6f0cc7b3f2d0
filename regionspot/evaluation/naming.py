"""What the annotated objects are called first: confusion between names, and calibration of scores."""

from dataclasses import dataclass

import numpy as np

from regionspot.data.coco_io import Results
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.overlaps import Overlaps, is_object
from regionspot.evaluation.tables import Truths

BINS = 10


@dataclass(eq=False)
class Naming:
    """The first name of each annotated object: that of the best detection on it, by an IoU of at least 0.5.

    Attributes:
        targets: (N,) int64, the category of each annotation that is neither ignored nor a crowd.
        names: (N,) int64, the category of the best detection on it; -1 if there is none.
        scores: (N,) float64, the score of this detection; 0 if there is none.
    """

    targets: np.ndarray
    names: np.ndarray
    scores: np.ndarray

    @property
    def is_located(self) -> np.ndarray:
        """(N,) bool: there is a detection on the object."""
        return self.names >= 0

    @property
    def is_right(self) -> np.ndarray:
        """(N,) bool: the first name is the annotated one."""
        return self.names == self.targets

    def confusions(self) -> list[tuple[int, int, int]]:
        """Return (annotated category, first name, number of objects) of all wrong pairs, the most frequent first."""
        wrong = self.is_located & ~self.is_right
        pairs, counts = np.unique(
            np.stack([self.targets[wrong], self.names[wrong]], axis=1), axis=0, return_counts=True
        )
        order = np.argsort(-counts, kind="stable")
        return [(*pair, count) for pair, count in zip(pairs[order].tolist(), counts[order].tolist())]

    def calibration(self) -> "Calibration | None":
        """Compare the scores of first names with how often they are right; None if scores are not in [0, 1]."""
        return Calibration.measure(self.scores[self.is_located], self.is_right[self.is_located])


def name_objects(ground_truth: GroundTruth, results: Results, truths: Truths, overlaps: Overlaps) -> Naming:
    """Find the first name of each annotated object among all detections of its image, in whichever class."""
    rows = np.flatnonzero(overlaps.nearest >= 0)
    nearest = overlaps.nearest[rows]
    order = np.lexsort((-results.scores[rows], nearest))  # of equal scores the first in the file
    objects, first = np.unique(nearest[order], return_index=True)
    best = rows[order[first]]
    _, categories = ground_truth.locate(results)
    names, scores = np.full(len(truths.rows), -1), np.zeros(len(truths.rows))
    names[objects], scores[objects] = categories[best], results.scores[best]
    keep = is_object(truths)
    return Naming(ground_truth.categories[truths.rows[keep]], names[keep], scores[keep])


@dataclass(eq=False)
class Calibration:
    """Scores in bins of equal width against how often their detections are right.

    Attributes:
        counts: (10,) int64, detections of each bin.
        confidence: (10,) float64, their mean score; NaN for none.
        accuracy: (10,) float64, the share of them that is right; NaN for none.
        error: expected calibration error: the mean of |confidence - accuracy| over all detections.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float

    @classmethod
    def measure(cls, scores: np.ndarray, is_right: np.ndarray) -> "Calibration | None":
        """Return the calibration of scores (N,), None if there are none or they are no probabilities."""
        if not len(scores) or scores.min() < 0 or scores.max() > 1:
            return None
        bins = np.minimum((scores * BINS).astype(np.int64), BINS - 1)  # a score of 1 is in the last bin
        counts = np.bincount(bins, minlength=BINS)
        with np.errstate(invalid="ignore"):
            confidence = np.bincount(bins, weights=scores, minlength=BINS) / counts
            accuracy = np.bincount(bins, weights=is_right, minlength=BINS) / counts
        error = float(np.nansum(np.abs(confidence - accuracy) * counts) / len(scores))
        return cls(counts, confidence, accuracy, error)
