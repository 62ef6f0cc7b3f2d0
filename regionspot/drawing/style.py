"""How regions are drawn."""

import math
from dataclasses import dataclass

OUTLINES = ("mask", "box", "none")
MANY = 30  # regions: more have thinner lines and smaller labels
LEGENDS = ("none", "auto", "right", "below")


@dataclass(frozen=True)
class DrawingStyle:
    """How regions are drawn on an image.

    Attributes:
        outline: "mask" draws the contours of masks, and boxes where there are none; "box" draws boxes; or "none".
        fill: opacity of filled masks, in [0, 1]; with 0, the image's own colors are seen.
        labels: whether regions have labels.
        scores: whether labels have scores.
        score_threshold: regions with lower scores are left out.
        line_width: pixels; by default by the size of the image.
        font_size: pixels; by default by the size of the image.
        legend: "right" and "below" add the classes with their counts beside or below the image, which makes the drawing
            larger; "auto" does so only if there are labels without space: these are numbers of the legend's rows.
        max_label_share: the part of the image that labels may cover, in [0, 1]; those of the highest scores come first.
    """

    outline: str = "mask"
    fill: float = 0.0
    labels: bool = True
    scores: bool = True
    score_threshold: float = 0.0
    line_width: int | None = None
    font_size: int | None = None
    legend: str = "none"
    max_label_share: float = 0.25

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value out of its range.
        """
        for name, choices in (("outline", OUTLINES), ("legend", LEGENDS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("fill", "score_threshold", "max_label_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(self, name)!r}")
        for name in ("line_width", "font_size"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 1000:
                raise ValueError(f"{name}: expected pixels from 1 to 1000, got {value!r}")

    def get_line_width(self, image_size: tuple[int, int], num_regions: int) -> int:
        """Return the pixels of outlines on an image of (height, width): thinner for many regions."""
        if self.line_width:
            return self.line_width
        pixels = 300 if num_regions <= MANY else 450
        return math.ceil((image_size[0] * image_size[1]) ** 0.5 / pixels)

    def get_font_size(self, image_size: tuple[int, int], num_regions: int) -> int:
        """Return the pixels of the labels' font: smaller for many regions."""
        if self.font_size:
            return self.font_size
        pixels = 36 if num_regions <= MANY else 45
        return max(10, round((image_size[0] * image_size[1]) ** 0.5 / pixels))
