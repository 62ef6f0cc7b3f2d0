"""Labels of regions: their text and places."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import ImageDraw

from regionspot.drawing.fonts import Text, layout_text, shorten_text
from regionspot.drawing.palette import Color, text_color
from regionspot.drawing.placement import LabelPlacer, Placement

MAX_WIDTH = 0.45  # of the image
MIN_CHARACTERS = 3  # a shorter beginning of a name says nothing


@dataclass(frozen=True)
class Label:
    """A label with its place.

    Attributes:
        text: what it reads.
        placement: its rectangle, and which region it is of.
        number: of the legend's row, for a region whose name has no space; None for the others.
    """

    text: Text
    placement: Placement
    number: int | None = None

    def draw(self, image: ImageDraw.ImageDraw, color: Color) -> None:
        """Draw the label in the color of its region."""
        place = self.placement
        image.rectangle((place.x0, place.y0, place.x1 - 1, place.y1 - 1), fill=color)
        x, y = place.x0 + padding(self.text.size), (place.y0 + place.y1 - self.text.height) // 2
        self.text.draw(image, (x, y), text_color(color))


def place_labels(
    texts: Sequence[str],
    boxes: np.ndarray,
    order: Sequence[int],
    image_size: tuple[int, int],
    font_size: int,
    max_share: float = 0.3,
    numbers: Sequence[int] | None = None,
) -> list[Label]:
    """Place the labels of regions inside the image, without overlap.

    Args:
        texts: of N regions.
        boxes: (N, 4) float XYXY, pixels.
        order: indices of the regions that have labels, the most important first; the others are only not covered.
        image_size: (height, width) in pixels.
        font_size: pixels.
        max_share: the part of the image that labels may cover.
        numbers: of the N regions, which are drawn where a text has no space.

    Returns:
        the labels that have a place.
    """
    placer = LabelPlacer(boxes, image_size, max_share)
    labels: list[Label] = []
    without_space: list[int] = []
    max_width = int(MAX_WIDTH * image_size[1]) - 2 * padding(font_size)
    for index in order:
        text = shorten_text(texts[index], font_size, max_width)
        is_cut = text != layout_text(texts[index], font_size) and text.num_characters <= MIN_CHARACTERS
        placement = None if is_cut else placer.place(index, _label_size(text))
        if placement:
            labels.append(Label(text, placement))
        else:
            without_space.append(index)
    if numbers is None:
        return labels
    for index in without_space:
        text = layout_text(str(numbers[index]), font_size)
        if placement := placer.place(index, _label_size(text), with_leader=False, beyond_share=True):
            labels.append(Label(text, placement, numbers[index]))
    return labels


def padding(font_size: int) -> int:
    """Return the pixels between a text and the left and right end of its label."""
    return max(1, round(font_size / 4))


def _label_size(text: Text) -> tuple[int, int]:
    return text.width + 2 * padding(text.size), text.height + max(1, text.size // 12)
