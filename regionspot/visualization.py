"""Pictures of recognised regions."""

import numpy as np
from detectron2.utils.visualizer import Visualizer

from regionspot.predictor import RegionPredictions


def draw_regions(image: np.ndarray, predictions: RegionPredictions) -> np.ndarray:
    """Draw boxes, masks and labels with scores.

    Args:
        image: (H, W, 3) uint8, RGB.
        predictions: of this image.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    labels = [f"{label} {score:.0%}" for label, score in zip(predictions.labels, predictions.scores)]
    drawn = Visualizer(image).overlay_instances(boxes=predictions.boxes, masks=predictions.masks, labels=labels)
    return drawn.get_image()
