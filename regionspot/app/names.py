"""Class names as people type them."""

import csv
import io
from collections.abc import Sequence

MAX_NAMES = 2000  # CLIP encodes each in up to 81 templates, while other visitors wait


def parse_names(text: str) -> list[str]:
    """Return the class names of a text, each once, in its order.

    Names are separated by commas or by lines; a name with a comma of its own is in double quotes.

    Raises:
        ValueError: no names, or more than ``MAX_NAMES``.
    """
    cells = [cell for line in text.splitlines() for row in csv.reader([line], skipinitialspace=True) for cell in row]
    names = list(dict.fromkeys(name for cell in cells if (name := " ".join(cell.split()))))
    if not names:
        raise ValueError("no names: type at least one, separated by commas or lines")
    if len(names) > MAX_NAMES:
        raise ValueError(f"expected at most {MAX_NAMES} names, got {len(names)}")
    return names


def format_names(names: Sequence[str]) -> str:
    """Return the text that ``parse_names`` reads as these names: one a line, those with commas or quotes quoted."""
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows([name] for name in names)
    return lines.getvalue().rstrip("\n")
