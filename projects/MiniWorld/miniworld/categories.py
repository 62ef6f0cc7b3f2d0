"""The categories of the miniature world: color x pattern x shape, and which of them are novel."""

import itertools

COLORS = {
    "red": (214, 42, 42),
    "green": (46, 160, 60),
    "blue": (46, 84, 214),
    "yellow": (236, 206, 44),
    "purple": (150, 54, 190),
}
PATTERNS = ("plain", "striped", "dotted", "checkered")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

# (pattern, color, shape) of each category, in the order of the category ids, which start at 1.
CATEGORIES = list(itertools.product(PATTERNS, COLORS, SHAPES))
NAMES = [" ".join(parts) for parts in CATEGORIES]


def frequency(pattern: int, color: int, shape: int) -> str:
    """Return "r" (novel: never annotated in training), "c" or "f" for a category of attribute indices.

    A rule that spreads each group evenly over the values of every attribute: 36 of the 120 are novel, and every
    pattern, color and shape occurs among them and among the others.
    """
    rank = (3 * pattern + 2 * color + 7 * shape) % 10
    return "r" if rank < 3 else "cf"[(pattern + color + shape) % 2]


FREQUENCIES = [
    frequency(PATTERNS.index(pattern), list(COLORS).index(color), SHAPES.index(shape))
    for pattern, color, shape in CATEGORIES
]
NOVEL = [index for index, frequency in enumerate(FREQUENCIES) if frequency == "r"]
BASE = [index for index, frequency in enumerate(FREQUENCIES) if frequency != "r"]
