"""Annotations and detections in the order in which they are matched."""

import logging
from dataclasses import dataclass

import numpy as np

from regionspot.data.coco_io import Results
from regionspot.evaluation.ground_truth import GroundTruth

logger = logging.getLogger(__name__)

AREA_RANGES = np.array([[0, 1e5**2], [0, 32**2], [32**2, 96**2], [96**2, 1e5**2]])  # (A, 2) pixels, ends included
AREA_NAMES = ("", "s", "m", "l")


class Truths:
    """Annotations ordered by category and image, then as in the file.

    Attributes:
        rows: (G,) int64 into the annotations of the file.
        keys: (G,) int64 ``category * I + image``, ascending.
        ignore: (G, A) bool, also those outside an area range.
        crowd: (G,) bool: may be matched many times, and the IoU is the share of the detection that it covers.
        has_id_zero: (G,) bool, as in ``GroundTruth``.
        totals: (K, A) int64, how many are not ignored.
    """

    def __init__(self, ground_truth: GroundTruth, rows: np.ndarray, ignore: np.ndarray, crowd: np.ndarray) -> None:
        """Take ``rows`` (G,) int64 of the annotations; ``ignore`` and ``crowd`` are (all annotations,) bool."""
        keys = ground_truth.categories[rows] * len(ground_truth.image_ids) + ground_truth.images[rows]
        order = np.argsort(keys, kind="stable")
        self.rows, self.keys = rows[order], keys[order]
        self.ignore = is_outside_ranges(ground_truth.areas[self.rows]) | ignore[self.rows, None]
        self.crowd = crowd[self.rows]
        self.has_id_zero = ground_truth.has_id_zero[self.rows]
        if self.has_id_zero.any():
            logger.warning(
                "annotations %s: one has id 0, which lvis and pycocotools count as missed even if it is matched; "
                "number from 1",
                ground_truth.path,
            )
        self.totals = np.zeros((len(ground_truth.category_ids), len(AREA_RANGES)), np.int64)
        np.add.at(self.totals, ground_truth.categories[self.rows], ~self.ignore)


@dataclass
class Detections:
    """Detections ordered by category, then score, then image; within an image as in the file.

    Attributes:
        rows: (D,) int64 into the results.
        categories: (D,) int64.
        keys: (D,) int64, as of ``Truths``.
    """

    rows: np.ndarray
    categories: np.ndarray
    keys: np.ndarray

    def select(self, keep: np.ndarray) -> "Detections":
        """Return the detections for which ``keep`` (D,) bool is true."""
        return Detections(self.rows[keep], self.categories[keep], self.keys[keep])


def order_detections(
    ground_truth: GroundTruth, results: Results, rows: np.ndarray, images: np.ndarray, categories: np.ndarray
) -> Detections:
    """Order ``rows`` (D,) int64, ascending, of the detections, located at ``ground_truth.locate(results)``."""
    rows = rows[np.lexsort((images[rows], -results.scores[rows], categories[rows]))]
    return Detections(rows, categories[rows], categories[rows] * len(ground_truth.image_ids) + images[rows])


def is_outside_ranges(areas: np.ndarray) -> np.ndarray:
    """Return (N, A) bool: the area (N,) is not in the range."""
    return (areas[:, None] < AREA_RANGES[:, 0]) | (areas[:, None] > AREA_RANGES[:, 1])


def rank_in_group(keys: np.ndarray) -> np.ndarray:
    """Return (N,) int64: how many earlier elements have the same key."""
    order = np.argsort(keys, kind="stable")
    rank = np.empty(len(keys), np.int64)
    rank[order] = rank_in_run(keys[order])
    return rank


def rank_in_run(keys: np.ndarray) -> np.ndarray:
    """Return (N,) int64: how many equal keys come directly before."""
    begins = np.flatnonzero(np.diff(keys, prepend=keys[:1] - 1))
    return np.arange(len(keys)) - np.repeat(begins, np.diff(begins, append=len(keys)))
