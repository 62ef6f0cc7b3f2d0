"""A running limit on the detections of each class."""

import numpy as np

from regionspot.evaluation.tables import rank_in_run

_PENDING = 1 << 21  # detections that wait to be ranked; sorting is worth it only for many


class ClassCap:
    """Decides which detections can still be among the best of their class in the whole data set.

    Detections are ranked by score, then by image id, as fixed AP's limit per class ranks them. Each class has a
    threshold, the score of its last detection within the limit so far, which rises.
    """

    def __init__(self, num_classes: int, limit: int) -> None:
        """Keep the ``limit`` best detections of each class of the vocabulary."""
        self.num_classes, self.limit = num_classes, limit
        # Kept detections, then pending ones, in arrays that are allocated once. Small arrays of each image would
        # fragment the heap between the large ones, and memory would grow with the number of images.
        self._columns = _allocate(_PENDING)
        self._num_kept = self._num_pending = 0
        self._scores = np.full(num_classes, -np.inf)  # of the last detection within the limit
        self._image_ids = np.full(num_classes, np.iinfo(np.int64).max)

    @property
    def num_kept(self) -> int:
        """Number of detections within the limits so far, and of those that are not ranked yet."""
        return self._num_kept + self._num_pending

    def admits(self, image_id: int, classes: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return (D,) bool: which detections of an image, with ``classes`` and ``scores`` (D,), may be of the best."""
        needed = self._scores[classes]
        return (scores > needed) | ((scores == needed) & (image_id <= self._image_ids[classes]))

    def add(self, image_id: int, classes: np.ndarray, scores: np.ndarray) -> None:
        """Add an image's detections, at least those that are admitted, once for each image."""
        start = self._num_kept + self._num_pending
        stop = start + len(classes)
        if stop > len(self._columns[0]):
            larger = _allocate(max(stop, 3 * len(self._columns[0]) // 2))
            for column, old in zip(larger, self._columns):
                column[:start] = old[:start]
            self._columns = larger
        for column, values in zip(self._columns, (classes, scores, image_id)):
            column[start:stop] = values
        self._num_pending += len(classes)
        if self._num_pending > max(_PENDING, self._num_kept // 2):
            self.rank()

    def rank(self) -> None:
        """Bring the thresholds up to date."""
        classes, scores, image_ids = (column[: self.num_kept] for column in self._columns)
        order = np.lexsort((image_ids, -scores, classes))
        rank = rank_in_run(classes[order])
        last = order[rank == self.limit - 1]  # one of each class that has as many
        self._scores[classes[last]], self._image_ids[classes[last]] = scores[last], image_ids[last]
        order = order[rank < self.limit]
        for column in self._columns:
            column[: len(order)] = column[order]
        self._num_kept, self._num_pending = len(order), 0


def _allocate(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return columns for the classes, scores and image ids of ``size`` detections."""
    return np.empty(size, np.int32), np.empty(size, np.float32), np.empty(size, np.int64)
