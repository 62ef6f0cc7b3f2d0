"""Colors of class names."""

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np

Color = tuple[int, int, int]  # RGB
UNKNOWN_COLOR = (150, 150, 150)
NUM_HUES = 24
# Lightness and chroma of OKLCH: lighter and darker colors of each hue, all of them vivid.
_TONES = ((0.82, 0.14), (0.71, 0.18), (0.60, 0.21))
NUM_NEIGHBORS = 3  # classes before, in the vocabulary, from which a class differs
MIN_DISTANCE = 0.13  # in OKLab, where 0.02 is just visible


@cache
def palette() -> tuple[np.ndarray, np.ndarray]:
    """Return (P, 3) uint8 RGB colors, and (P, 3) float64 their OKLab."""
    hues = np.arange(NUM_HUES) * (2 * np.pi / NUM_HUES)
    colors = [(light, chroma * np.cos(hue), chroma * np.sin(hue)) for light, chroma in _TONES for hue in hues]
    lab = np.array(colors)
    return _oklab_to_rgb(lab), lab


def _oklab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """Convert (P, 3) OKLab to uint8 sRGB (B. Ottosson, 2020), clipped to the gamut."""
    to_lms = np.array(
        [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = ((lab @ to_lms.T) ** 3 @ to_rgb.T).clip(0, 1)
    gamma = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (gamma * 255).round().astype(np.uint8)


@cache
def name_color(name: str) -> Color:
    """Return the RGB color of a class name, which depends on the name alone."""
    return _rgb(_preferred(name)[0])


@cache
def vocabulary_colors(vocabulary: tuple[str, ...]) -> dict[str, Color]:
    """Return the RGB color of each name: ``name_color``, or another where a neighbor's is similar.

    The same vocabulary gives the same colors in all images and runs; in another one a name keeps its color, unless
    that is too similar to one of the ``NUM_NEIGHBORS`` names before it.
    """
    _, lab = palette()
    chosen: dict[str, int] = {}
    for name in vocabulary:
        if name in chosen:
            continue
        neighbors = lab[list(chosen.values())[-NUM_NEIGHBORS:]] if chosen else np.zeros((0, 3))
        preferred = _preferred(name)
        distances = np.linalg.norm(lab[preferred, None] - neighbors, axis=2)  # (P, neighbors)
        is_distinct = (distances >= MIN_DISTANCE).all(axis=1)
        chosen[name] = int(preferred[is_distinct.argmax()])
    return {name: _rgb(index) for name, index in chosen.items()}


def get_colors(names: Sequence[str], vocabulary: Sequence[str] | None, unknown: str | None = "unknown") -> list[Color]:
    """Return the RGB color of each region's class name; unknown regions are gray."""
    known = vocabulary_colors(tuple(vocabulary)) if vocabulary is not None else {}
    return [known.get(name) or (UNKNOWN_COLOR if name == unknown else name_color(name)) for name in names]


def text_color(background: Color) -> Color:
    """Return black or white, whichever has the higher contrast (WCAG 2) on a background."""
    linear = [(x / 255 / 12.92 if x <= 10 else ((x / 255 + 0.055) / 1.055) ** 2.4) for x in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if luminance > 0.179 else (255, 255, 255)


def _preferred(name: str) -> np.ndarray:
    """Return all indices of the palette in an order that depends on the name alone."""
    seed = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    num_colors = len(palette()[0])
    # A step that shares no factor with the number of colors visits all of them.
    step = next(s for s in range(7 + seed // num_colors % num_colors, 10 * num_colors) if np.gcd(s, num_colors) == 1)
    return (seed % num_colors + step * np.arange(num_colors)) % num_colors


def _rgb(index: int) -> Color:
    red, green, blue = palette()[0][index].tolist()
    return red, green, blue
