"""Random errors of boxes, so that a model that is trained with them also recognizes inaccurate boxes."""

import numpy as np

# A moved box with a shorter side, in pixels, would show next to nothing of its object: it stays where it was.
MIN_JITTERED_SIDE = 1.0
MAX_STRENGTH = 0.5  # at this one, opposite sides would often change places


def check_strength(strength: float, name: str) -> float:
    """Return the strength of a jitter; a ``ValueError`` with its ``name`` refuses what is not in [0, 0.5)."""
    if not 0 <= strength < MAX_STRENGTH:  # NaN is not
        raise ValueError(
            f"{name}: expected a share of a box's width and height, from 0 (no jitter) to less than {MAX_STRENGTH}, "
            f"got {strength}; 0.05 to 0.1 are errors of a detector"
        )
    return strength


def jitter_boxes(
    boxes: np.ndarray,
    image_size: tuple[int, int],
    strength: float,
    rng: np.random.Generator,
    min_side: float = MIN_JITTERED_SIDE,
) -> np.ndarray:
    """Move each side of boxes by a normal error of its own.

    Args:
        boxes: (N, 4) float XYXY, pixels.
        image_size: (height, width) of the image, to which boxes are clipped before and after they are moved.
        strength: standard deviation of the error, as a share of the box's width or height.
        rng: where the errors are drawn from: 4 N numbers, box by box.
        min_side: pixels; a box with a moved side that is not longer than this stays where it was.

    Returns:
        (N, 4) of the dtype of ``boxes``.
    """
    limits = np.tile(image_size[::-1], 2).astype(boxes.dtype)  # width, height, width, height
    clipped = np.clip(boxes, 0, limits)
    sides = np.tile(clipped[:, 2:] - clipped[:, :2], 2)
    moved = np.clip(clipped + rng.normal(0, strength, boxes.shape) * sides, 0, limits)
    is_usable = (moved[:, 2:] - moved[:, :2] > min_side).all(axis=1)
    return np.where(is_usable[:, None], moved, clipped).astype(boxes.dtype)


def jittered_copies(
    boxes: np.ndarray, image_size: tuple[int, int], strength: float, num_copies: int, image_id: int
) -> np.ndarray:
    """Return jittered copies of an image's boxes, which depend on the arguments alone.

    Args:
        boxes: (N, 4) float XYXY, pixels.
        image_size: (height, width) of the image.
        strength: see ``jitter_boxes``.
        num_copies: K.
        image_id: seeds the errors, together with the number of the copy.

    Returns:
        (N, K, 4) of the dtype of ``boxes``.
    """
    seed = int(image_id) % 2**64  # seeds are not negative, ids may be, and NumPy's have fewer bits
    copies = [
        jitter_boxes(boxes, image_size, strength, np.random.default_rng([seed, copy])) for copy in range(num_copies)
    ]
    return np.stack(copies, axis=1)
