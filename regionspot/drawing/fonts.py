"""Text of any script: which fonts have its characters, how large it is, and drawing it."""

import unicodedata
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import matplotlib
from matplotlib.font_manager import FontEntry, fontManager
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

# Matplotlib ships it, so that Latin, Greek and Cyrillic, Arabic and Hebrew look the same on every machine.
PRIMARY = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
# Last Resort has a frame in place of every character; the others are for formulas.
_EXCLUDED = ("Last Resort", "STIX", "cm", "DejaVu Sans Display", "DejaVu Serif Display")
_IGNORABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, joiners and directions, halves of surrogate pairs
_VARIATIONS = range(0xFE00, 0xFE10)  # selectors: text or emoji
ELLIPSIS = "…"


@dataclass(frozen=True)
class Text:
    """A line of text, ready to be drawn.

    Attributes:
        runs: characters that share a font, from left to right, and the path of the font.
        size: pixels of the font.
        width: pixels.
        ascent: pixels above the baseline.
        descent: pixels below it.
    """

    runs: tuple[tuple[str, str], ...]
    size: int
    width: int
    ascent: int
    descent: int

    @property
    def num_characters(self) -> int:
        """How many characters are drawn, without an ellipsis at the end."""
        return len("".join(characters for characters, _ in self.runs).removesuffix(ELLIPSIS))

    @property
    def height(self) -> int:
        """Pixels, the same for all text of the primary font."""
        return self.ascent + self.descent

    def draw(self, image: ImageDraw.ImageDraw, position: tuple[int, int], color: tuple[int, int, int]) -> None:
        """Draw the text with its top left corner at a position, (x, y) pixels."""
        x = float(position[0])
        for characters, path in self.runs:
            font = load_font(path, self.size)
            image.text((x, position[1] + self.ascent), characters, font=font, fill=color, anchor="ls")
            x += font.getlength(characters)


@lru_cache(maxsize=4096)
def layout_text(text: str, size: int) -> Text:
    """Choose fonts for a line of text, and measure it.

    Each character is drawn by the first font that has it: the primary one, then any that is installed. A character that
    no font has is written as its code, "U+1F9C0". Line breaks and tabs become spaces; other controls are left out.
    """
    runs = tuple(split_into_runs(_printable(text)))
    ascent, descent = load_font(PRIMARY, size).getmetrics()
    width = 0.0
    for characters, path in runs:
        font = load_font(path, size)
        width += font.getlength(characters)
        if path != PRIMARY:
            _, top, _, bottom = font.getbbox(characters, anchor="ls")
            ascent, descent = max(ascent, round(-top) + 1), max(descent, round(bottom) + 1)
    return Text(runs, size, -int(-width // 1), ascent, descent)


def shorten_text(text: str, size: int, max_width: int) -> Text:
    """Lay out the longest beginning of a text that has at most ``max_width`` pixels, with an ellipsis if it is cut."""
    whole = layout_text(text, size)
    if whole.width <= max_width:
        return whole
    shortest, longest = 0, len(text)
    while longest - shortest > 1:  # bisection: a wider text is never cut to more characters
        middle = (shortest + longest) // 2
        if layout_text(text[:middle].rstrip() + ELLIPSIS, size).width <= max_width:
            shortest = middle
        else:
            longest = middle
    return layout_text(text[:shortest].rstrip() + ELLIPSIS, size)


def split_into_runs(text: str) -> list[tuple[str, str]]:
    """Return runs of characters with the path of their font, each run as long as possible."""
    # From right to left the order of words is known within a run alone: one font for all, if there is one.
    is_reversed = any(unicodedata.bidirectional(character) in ("R", "AL", "AN") for character in text)
    whole = next((path for path in _candidates(text) if all(_has_glyph(path, c) for c in text)), None)
    if whole and text and (is_reversed or whole == PRIMARY):
        return [(text, whole)]
    runs: list[tuple[str, str]] = []
    for character in text:
        path = _font_of(character)
        if runs and _has_glyph(runs[-1][1], character) and unicodedata.category(character)[0] in "MZP":
            path = runs[-1][1]  # marks, spaces and punctuation stay with what precedes them
        if path is None:
            character, path = f"U+{ord(character):04X}", PRIMARY
        if runs and runs[-1][1] == path:
            runs[-1] = (runs[-1][0] + character, path)
        else:
            runs.append((character, path))
    return runs


def _printable(text: str) -> str:
    spaced = "".join(" " if character in "\t\n\r\v\f\u2028\u2029" else character for character in text)
    # joiners form emoji of several, but the fonts that PIL draws have no such glyphs
    return "".join(c for c in spaced if unicodedata.category(c) not in _IGNORABLE and ord(c) not in _VARIATIONS)


def _candidates(text: str) -> list[str]:
    """Return the primary font, and those of the characters that it lacks."""
    others = {_font_of(c) for c in set(text) if not _has_glyph(PRIMARY, c)}
    return [PRIMARY, *sorted(path for path in others if path)]


@cache
def _font_of(character: str) -> str | None:
    """Return the first font that has a character, None if there is none."""
    return next((path for path in (PRIMARY, *_installed_fonts()) if _has_glyph(path, character)), None)


@cache
def _installed_fonts() -> tuple[str, ...]:
    """Return the paths of upright fonts of regular weight, Noto and sans serif first."""

    def rank(entry: FontEntry) -> tuple[bool, bool, bool, str, str]:
        return (
            not entry.name.startswith("Noto"),
            "Sans" not in entry.name,
            "UI" in entry.name,
            entry.name,
            entry.fname,
        )

    def is_regular(entry: FontEntry) -> bool:
        return entry.style == "normal" and entry.weight in (400, "normal", "regular", "book")

    entries = [e for e in fontManager.ttflist if is_regular(e) and not e.name.startswith(_EXCLUDED)]
    return tuple(dict.fromkeys(entry.fname for entry in sorted(entries, key=rank)))


@cache
def _characters(path: str) -> frozenset[int]:
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):  # the list is cached: the file may be gone, or of another kind
        return frozenset()


@cache
def _has_glyph(path: str, character: str) -> bool:
    """Return whether PIL draws a character: fonts of colored bitmaps have glyphs that it leaves empty."""
    if ord(character) not in _characters(path):
        return False
    if unicodedata.category(character)[0] in "ZM":  # spaces are empty, marks may be
        return True
    canvas = Image.new("L", (64, 64))
    try:
        ImageDraw.Draw(canvas).text((20, 44), character, fill=255, font=load_font(path, 24), anchor="ls")
    except (OSError, ValueError):
        return False
    return canvas.getbbox() is not None


@lru_cache(maxsize=256)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """Open a font at a size in pixels."""
    return ImageFont.truetype(path, size)
