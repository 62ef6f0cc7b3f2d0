"""Legends: which classes are on an image, and their numbers on labels without space."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from regionspot.drawing.fonts import Text, layout_text, shorten_text
from regionspot.drawing.palette import Color, text_color

_BACKGROUND = (255, 255, 255)
_INK = (30, 30, 30)
_FAINT = (110, 110, 110)
MAX_COLUMNS = 4
MAX_COLUMN_WIDTH = 16  # heights of the font


@dataclass(frozen=True)
class LegendEntry:
    """A row of a legend.

    Attributes:
        mark: what is on the square before the name: a number, or "".
        text: the class name.
        count: the number of its regions, or "".
        color: of the class.
    """

    mark: str
    text: str
    count: str
    color: Color


def add_legend(image: np.ndarray, entries: Sequence[LegendEntry], font_size: int, below: bool) -> np.ndarray:
    """Add a legend beside or below an image.

    Rows that have no space, after ``MAX_COLUMNS`` columns beside the image, are counted in the last one.

    Args:
        image: (H, W, 3) uint8 RGB.
        entries: the rows.
        font_size: pixels.
        below: below the image, which becomes higher, or else beside it, which becomes wider.

    Returns:
        (H', W', 3) uint8 RGB, the image in its top left corner.
    """
    height, width = image.shape[:2]
    row_height, margin = round(1.6 * font_size), font_size
    blocks = [_Row(entry, font_size) for entry in entries]
    if below:
        column_width = min(max(row.width for row in blocks) + margin, max(width - 2 * margin, 8 * font_size))
        num_columns = max(1, min(len(blocks), (width - 2 * margin) // column_width))
        num_rows = -(-len(blocks) // num_columns)
    else:
        num_rows = max(4, (height - 2 * margin) // row_height)
        num_columns = min(MAX_COLUMNS, -(-len(blocks) // num_rows))
        column_width = max(row.width for row in blocks[: num_rows * num_columns]) + margin
    if num_hidden := max(0, len(blocks) - num_rows * num_columns):
        blocks = blocks[: num_rows * num_columns - 1]
        blocks.append(_Row(LegendEntry("", f"and {num_hidden + 1} more", "", _BACKGROUND), font_size))
    size = (num_columns * column_width + 2 * margin, num_rows * row_height + 2 * margin)
    total = (max(width, size[0]), height + size[1]) if below else (width + size[0], max(height, size[1]))
    canvas = Image.new("RGB", total, _BACKGROUND)
    canvas.paste(Image.fromarray(image), (0, 0))
    artist = ImageDraw.Draw(canvas)
    x, y = (margin, height + margin) if below else (width + margin, margin)
    for index, row in enumerate(blocks):
        # down the columns, in which a list is read
        place = (x + index // num_rows * column_width, y + index % num_rows * row_height)
        row.draw(artist, place, row_height, column_width - margin)
    return np.asarray(canvas)


class _Row:
    """A laid out row of a legend."""

    def __init__(self, entry: LegendEntry, font_size: int) -> None:
        self.entry, self.font_size = entry, font_size
        self.mark = layout_text(entry.mark, font_size)
        self.count = layout_text(entry.count, font_size)
        self.mark_width = max(font_size, self.mark.width + font_size // 2)
        self.text: Text = shorten_text(entry.text, font_size, MAX_COLUMN_WIDTH * font_size)
        gap = font_size if entry.count else 0
        self.width = self.mark_width + font_size // 2 + self.text.width + gap + self.count.width

    def draw(self, artist: ImageDraw.ImageDraw, place: tuple[int, int], height: int, width: int) -> None:
        """Draw the row in a rectangle of ``place``, (x, y), ``width`` and ``height``."""
        x, y = place
        mark_height = max(self.font_size, self.mark.height if self.entry.mark else 0)
        top = y + (height - mark_height) // 2
        artist.rectangle((x, top, x + self.mark_width - 1, top + mark_height - 1), fill=self.entry.color)
        mark_place = (x + (self.mark_width - self.mark.width) // 2, y + (height - self.mark.height) // 2)
        self.mark.draw(artist, mark_place, text_color(self.entry.color))
        text = self.text
        space = width - self.mark_width - self.font_size // 2 - self.count.width
        if text.width > space:
            text = shorten_text(self.entry.text, self.font_size, space)
        text.draw(artist, (x + self.mark_width + self.font_size // 2, y + (height - text.height) // 2), _INK)
        self.count.draw(artist, (x + width - self.count.width, y + (height - self.count.height) // 2), _FAINT)
