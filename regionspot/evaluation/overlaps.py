"""Which annotations the detections of an image overlap most, whatever their names."""

from dataclasses import dataclass

import numpy as np

from regionspot.data.coco_io import Results
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.ious import MIN_IOU, box_iou
from regionspot.evaluation.matching import PAIRS, blocks, expand_ranges
from regionspot.evaluation.tables import Detections, Truths


@dataclass(eq=False)
class Overlaps:
    """The largest box IoU of each detection with annotations of its own name, and with those of other names.

    Attributes:
        own_iou, other_iou: (D,) float64, in the order of the results; 0 where there is no such annotation.
        own, other: (D,) int64, those annotations in the order of ``Truths``; -1 for none.
    """

    own_iou: np.ndarray
    other_iou: np.ndarray
    own: np.ndarray
    other: np.ndarray

    @property
    def nearest(self) -> np.ndarray:
        """(D,) int64: the annotation that each detection is on, by an IoU of at least 0.5; -1 for none."""
        nearest = np.where(self.own_iou >= self.other_iou, self.own, self.other)
        return np.where(np.maximum(self.own_iou, self.other_iou) >= MIN_IOU, nearest, -1)


def find_overlaps(ground_truth: GroundTruth, results: Results, truths: Truths) -> Overlaps:
    """Compare the box of each detection with all annotations of its image that are neither ignored nor crowds."""
    images, categories = ground_truth.locate(results)
    num_images, num_detections = len(ground_truth.image_ids), len(results)
    detections = Detections(np.arange(num_detections), categories, categories * num_images + images)
    iou = box_iou(results, ground_truth, detections, truths)
    usable = np.flatnonzero(is_object(truths))
    usable = usable[np.argsort(truths.keys[usable] % num_images, kind="stable")]
    usable_images = truths.keys[usable] % num_images
    first = np.searchsorted(usable_images, images, side="left")
    counts = np.searchsorted(usable_images, images, side="right") - first
    rows = np.flatnonzero(counts)
    ious, partners = np.zeros((2, num_detections)), np.full((2, num_detections), -1)
    for block in blocks(counts[rows], PAIRS):
        block_rows, sizes = rows[block], counts[rows[block]]
        pairs, positions = expand_ranges(block_rows, first[block_rows], sizes)
        candidates, starts = usable[positions], sizes.cumsum() - sizes
        values = iou(pairs, candidates)
        is_own = truths.keys[candidates] == detections.keys[pairs]
        for index, is_candidate in enumerate((is_own, ~is_own)):
            best = np.maximum.reduceat(np.where(is_candidate, values, 0.0), starts)
            is_best = np.flatnonzero(is_candidate & (values == np.repeat(best, sizes)) & (values > 0))
            owner, place = np.unique(pairs[is_best], return_index=True)  # the first of equal ones
            ious[index, block_rows] = best
            partners[index, owner] = candidates[is_best[place]]
    return Overlaps(ious[0], ious[1], partners[0], partners[1])


def is_object(truths: Truths) -> np.ndarray:
    """Return (G,) bool: annotations that are to be found, neither ignored nor crowds."""
    return ~truths.ignore[:, 0] & ~truths.crowd
