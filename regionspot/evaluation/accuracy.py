"""Region-classification accuracy: how often an annotated box is given its own class."""

from collections.abc import Sequence

import numpy as np

from regionspot.evaluation.prediction_log import ImagePredictions

GROUPS = {"": "", "r": "_r", "c": "_c", "f": "_f"}


def region_accuracy(images: Sequence[ImagePredictions], frequencies: Sequence[str]) -> dict[str, float]:
    """Return top-1 and top-5 accuracy in percent, over all regions and per frequency group.

    Args:
        images: with ``targets`` and ``top``.
        frequencies: for each class "r", "c", "f", or "" where the data set has none.

    Returns:
        "top1", "top5", and where there are frequencies "top1_r", "top5_r", ...; NaN for a group without regions.
    """
    targets = np.array([target for image in images for target in image.targets], np.int64)
    pairs = [pair for image in images for pair in zip(image.targets, image.top)]
    ranks = np.array([top.index(target) if target in top else np.inf for target, top in pairs])
    groups = np.array(frequencies)[targets]
    result = {}
    for group, suffix in GROUPS.items():
        if group and group not in frequencies:
            continue
        rows = groups == group if group else np.ones(len(targets), bool)
        for k in (1, 5):
            right = ranks[rows] < k
            result[f"top{k}{suffix}"] = float(100 * right.mean()) if rows.any() else float("nan")
    return result
