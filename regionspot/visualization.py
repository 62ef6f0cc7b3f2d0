"""Pictures of recognised regions."""

import numpy as np
from detectron2.utils.visualizer import Visualizer

from regionspot.predictor import RegionPredictions


def draw_regions(image: np.ndarray, predictions: RegionPredictions, with_masks: bool = True) -> np.ndarray:
    """Draw boxes, masks and labels with scores.

    Args:
        image: (H, W, 3) uint8, RGB.
        predictions: of this image.
        with_masks: draw the masks, too, where there are any.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    # matplotlib would read $...$ as a formula
    names = [label.replace("$", r"\$") for label in predictions.labels]
    labels = [f"{label} {score:.0%}" for label, score in zip(names, predictions.scores)]
    masks = predictions.masks if with_masks else None
    drawn = Visualizer(image).overlay_instances(boxes=predictions.boxes, masks=masks, labels=labels)
    return drawn.get_image()
