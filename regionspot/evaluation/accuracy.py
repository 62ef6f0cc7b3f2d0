"""Region-classification accuracy: how often an annotated box is given its own class."""

from collections.abc import Sequence

import numpy as np

GROUPS = {"": "", "r": "_r", "c": "_c", "f": "_f"}


def region_accuracy(
    targets: Sequence[np.ndarray], top: Sequence[np.ndarray], frequencies: Sequence[str]
) -> dict[str, float]:
    """Return top-1 and top-5 accuracy in percent, over all regions and per frequency group.

    Args:
        targets: for each image (N,) int, the annotated classes of its regions.
        top: for each image (N, k) int, the best classes of its regions, best first.
        frequencies: for each class "r", "c", "f", or "" where the data set has none.

    Returns:
        "top1", "top5", and where there are frequencies "top1_r", "top5_r", ...; NaN for a group without regions.
    """
    classes = np.concatenate(targets)
    is_own = np.concatenate(top) == classes[:, None]
    groups = np.array(frequencies)[classes]
    result = {}
    for group, suffix in GROUPS.items():
        if group and group not in frequencies:
            continue
        rows = groups == group if group else np.ones(len(classes), bool)
        for k in (1, 5):
            right = is_own[rows, :k].any(axis=1)
            result[f"top{k}{suffix}"] = float(100 * right.mean()) if rows.any() else float("nan")
    return result
