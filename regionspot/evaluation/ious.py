"""IoU of pairs of detections and ground truths, by boxes or by masks."""

from collections.abc import Callable

import numpy as np
import pycocotools.mask as mask_utils

from regionspot.data.coco_io import Results
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.evaluation.tables import Detections, Truths
from regionspot.utils.rle import mask_areas, mask_boxes

MIN_IOU = 0.5  # the lowest threshold; the IoU of pairs below it may be reported as 0
PairIou = Callable[[np.ndarray, np.ndarray], np.ndarray]  # rows of detections and of ground truths (P,) -> (P,) IoU


def box_iou(results: Results, ground_truth: GroundTruth, detections: Detections, truths: Truths) -> PairIou:
    """Return the IoU of boxes, to the last digit as ``pycocotools.mask.iou`` computes it.

    The IoU with a crowd is the share of the detection that it covers.
    """

    def iou(rows: np.ndarray, truth_rows: np.ndarray) -> np.ndarray:
        first, second = results.boxes[detections.rows[rows]], ground_truth.boxes[truths.rows[truth_rows]]
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            overlap = _overlap(first, second)
            intersection = overlap[:, 0] * overlap[:, 1]
            area = first[:, 2] * first[:, 3]
            # same order of operations as pycocotools, so that the last digit agrees
            union = np.where(truths.crowd[truth_rows], area, area + second[:, 2] * second[:, 3] - intersection)
            return np.where((overlap > 0).all(axis=1), intersection / union, 0.0)

    return iou


def mask_iou(results: Results, ground_truth: GroundTruth, detections: Detections, truths: Truths) -> PairIou:
    """Return the IoU of masks, or of a crowd the share of the detection that it covers.

    Pairs whose boxes and areas cannot reach ``MIN_IOU`` are not compared.

    Raises:
        ValueError: a mask is missing or damaged.
    """
    # Decoding polygons dominates: only masks with a partner of the same image and category are decoded.
    regions, rles = results.require_masks()
    regions = regions[detections.rows]
    compared_truths = np.flatnonzero(np.isin(truths.keys, detections.keys))
    masks = ground_truth.masks(truths.rows[compared_truths])
    mask_of_truth = dict(zip(compared_truths.tolist(), masks))
    truth_areas, truth_boxes = np.zeros(len(truths.rows)), np.zeros((len(truths.rows), 4))
    truth_areas[compared_truths], truth_boxes[compared_truths] = mask_areas(masks), mask_boxes(masks)
    truth_areas[truths.crowd] = 0
    compared = np.unique(regions[np.isin(detections.keys, truths.keys)])
    region_boxes = np.zeros((len(rles), 4))
    region_boxes[compared] = mask_boxes([rles[region] for region in compared.tolist()])

    def iou(rows: np.ndarray, truth_rows: np.ndarray) -> np.ndarray:
        ious, pair_regions = np.zeros(len(rows)), regions[rows]
        # The intersection is inside both boxes, and at the lowest threshold it is at least half of the larger mask;
        # with a crowd, half of the detection.
        overlap = _overlap(region_boxes[pair_regions], truth_boxes[truth_rows])
        larger = np.maximum(results.mask_areas[pair_regions], truth_areas[truth_rows])
        pairs = np.flatnonzero((overlap > 0).all(axis=1) & (overlap.prod(axis=1) >= MIN_IOU * larger))
        # mask_utils.iou has a high cost per call: one call compares all regions with the same ground truth.
        pairs = pairs[np.lexsort((pair_regions[pairs], truth_rows[pairs]))]
        cuts = np.flatnonzero(np.diff(truth_rows[pairs])) + 1
        for group in np.split(pairs, cuts) if len(pairs) else []:
            unique, inverse = np.unique(pair_regions[group], return_inverse=True)
            truth = int(truth_rows[group[0]])
            first = [rles[region] for region in unique.tolist()]
            values = mask_utils.iou(first, [mask_of_truth[truth]], [int(truths.crowd[truth])])
            ious[group] = np.asarray(values).reshape(-1)[inverse.reshape(-1)]
        return ious

    return iou


def _overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return (P, 2) width and height of the intersection of boxes (P, 4) XYWH; negative where they are apart."""
    low = np.maximum(first[:, :2], second[:, :2])
    return np.minimum(first[:, 2:] + first[:, :2], second[:, 2:] + second[:, :2]) - low
