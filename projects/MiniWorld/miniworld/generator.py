"""Draws the scenes: every image is a function of (seed, split, index) and of nothing else."""

import multiprocessing
import signal
from dataclasses import dataclass
from multiprocessing.pool import Pool

import numpy as np
from PIL import Image

from miniworld.categories import BASE, CATEGORIES, COLORS, FREQUENCIES, NAMES, PATTERNS, SHAPES

SIZE = 192
SPLITS = {"train": 0, "val": 1, "test": 2, "captions": 3, "masks": 4}


@dataclass
class Scene:
    """An image and its objects.

    Attributes:
        image: (192, 192, 3) uint8, RGB.
        classes: (N,) int64, index into ``NAMES``.
        masks: (N, 192, 192) bool, the visible part of each object.
    """

    image: np.ndarray
    classes: np.ndarray
    masks: np.ndarray

    @property
    def boxes(self) -> np.ndarray:
        """(N, 4) float32, XYXY, around the visible parts."""
        boxes = np.zeros((len(self.masks), 4), np.float32)
        for box, mask in zip(boxes, self.masks):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return boxes

    @property
    def caption(self) -> str:
        """The caption: the objects, largest first."""
        order = np.argsort(-self.masks.sum(axis=(1, 2)))
        return " and ".join(f"a {NAMES[self.classes[i]]}" for i in order)


def drawing_pool(workers: int) -> Pool:
    """Return a pool of processes that leave Ctrl-C to this one."""
    return multiprocessing.get_context("spawn").Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN))


def draw_scene(split: str, index: int, seed: int = 0) -> Scene:
    """Draw scene ``index`` of a split ("train", "val", "test", or "masks" for SAM): 3 to 6 objects anywhere."""
    rng = np.random.default_rng([seed, SPLITS[split], index])
    num_objects = int(rng.integers(3, 7))
    return compose(rng, draw_categories(rng, num_objects), np.sort(rng.uniform(20, 42, num_objects))[::-1])


def draw_captioned(index: int, seed: int = 0, spread: float = 1.0) -> Scene:
    """Draw a captioned image, framed as people frame the photographs that they caption.

    It shows 1 to 3 objects, larger than in the scenes but never filling the image.

    Args:
        index: of the image.
        seed: of the world.
        spread: how far from the center objects may be, from 0 (centered) to 1 (anywhere).
    """
    rng = np.random.default_rng([seed, SPLITS["captions"], index])
    num_objects = int(rng.choice([1, 1, 2, 3]))
    radii = np.sort(rng.uniform(24, 58, num_objects))[::-1]
    spread = spread if num_objects == 1 else max(spread, 0.6)
    return compose(rng, draw_categories(rng, num_objects), radii, spread, visible=0.45)


def draw_categories(rng: np.random.Generator, num_objects: int) -> np.ndarray:
    """Draw categories that go together: a scene has a theme, one attribute that half of its objects share.

    Objects that occur together are alike in the real world, too; this is what regions can learn from each other.
    Frequent categories come three times as often as common and novel ones.
    """
    weights = np.array([3.0 if frequency == "f" else 1.0 for frequency in FREQUENCIES])
    theme = CATEGORIES[rng.choice(len(CATEGORIES), p=weights / weights.sum())]
    attribute = int(rng.integers(3))
    classes = []
    for _ in range(num_objects):
        allowed = weights.copy()
        if rng.random() < 0.5:
            allowed *= [category[attribute] == theme[attribute] for category in CATEGORIES]
        classes.append(rng.choice(len(CATEGORIES), p=allowed / allowed.sum()))
    return np.array(classes)


def compose(
    rng: np.random.Generator, classes: np.ndarray, radii: np.ndarray, spread: float = 1.0, visible: float = 0.6
) -> Scene:
    """Place objects on top of each other on a background.

    Args:
        rng: source of randomness.
        classes: (N,) of the objects, the bottommost first.
        radii: (N,) in pixels.
        spread: see ``draw_captioned``.
        visible: share of each object that must stay visible; an object without such a place is left out.
    """
    image = draw_background(rng)
    masks: list[np.ndarray] = []
    placed: list[int] = []
    areas: list[int] = []
    for label, radius in zip(classes, radii):
        for _ in range(8):
            mask, colors = draw_object(rng, int(label), float(radius), spread)
            if all((earlier & ~mask).sum() >= visible * area for earlier, area in zip(masks, areas)):
                masks = [earlier & ~mask for earlier in masks]
                masks.append(mask)
                areas.append(int(mask.sum()))
                placed.append(int(label))
                image[mask] = colors
                break
    noise = rng.normal(0, 5, image.shape).astype(np.float32)
    pixels = np.clip(image + noise, 0, 255).astype(np.uint8)
    return Scene(pixels, np.array(placed, np.int64), np.stack(masks))


def draw_background(rng: np.random.Generator) -> np.ndarray:
    """Draw a muted texture of two scales, with a few bands across it; (192, 192, 3) float32."""
    tone = rng.uniform(70, 185) + rng.uniform(-18, 18, 3)
    image = np.zeros((SIZE, SIZE, 3), np.float32) + tone.astype(np.float32)
    for cells, strength in ((6, 26), (48, 12)):
        grid = rng.normal(0, strength, (cells, cells)).astype(np.float32)
        image += np.asarray(Image.fromarray(grid).resize((SIZE, SIZE), Image.Resampling.BICUBIC))[..., None]
    ys, xs = np.mgrid[:SIZE, :SIZE]
    for _ in range(rng.integers(0, 4)):
        angle, offset, width = rng.uniform(0, np.pi), rng.uniform(0, SIZE), rng.uniform(2, 9)
        image[np.abs(np.cos(angle) * (xs - offset) + np.sin(angle) * (ys - offset)) < width] += rng.uniform(-30, 30)
    return image


def draw_object(rng: np.random.Generator, label: int, radius: float, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw an object somewhere in the image.

    Returns:
        Its mask, (192, 192) bool, and the float32 colors of the pixels under it, (mask.sum(), 3).
    """
    pattern, color, shape = CATEGORIES[label]
    reach = (SIZE / 2 - radius * 0.8) * spread
    center = SIZE / 2 + rng.uniform(-reach, reach, 2)
    angle = rng.uniform(-0.35, 0.35)
    ys, xs = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5
    x, y = (xs - center[0]) / radius, (ys - center[1]) / radius
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    mask = inside_shape(shape, u, v)
    u, v = u[mask] * radius, v[mask] * radius  # pixels
    rgb = np.array(COLORS[color], np.float32) * rng.uniform(0.82, 1.1) + rng.uniform(-14, 14, 3).astype(np.float32)
    shade = 1 + 0.1 * (u + v)[:, None] / radius
    ink = in_pattern(pattern, u, v, rng.uniform(5.5, 7.5))
    light = np.float32(rng.uniform(0.72, 0.86))
    colors = np.where(ink[:, None], rgb + (245 - rgb) * light, rgb) * shade
    return mask, colors.astype(np.float32)


def inside_shape(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Tell which points, in units of the radius and with v downwards, are inside a shape."""
    r, theta = np.hypot(u, v), np.arctan2(u, -v)
    if shape == "circle":
        return r < 0.92
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) < 0.8
    if shape == "triangle":
        return (v < 0.72) & (np.abs(u) < (v + 0.95) * 0.6)
    if shape == "star":
        sector = np.abs((theta / (2 * np.pi / 5) + 0.5) % 1 - 0.5) * 2  # 0 at a tip, 1 between two
        return r < 1.05 - 0.62 * sector**0.7
    if shape == "cross":
        return (np.minimum(np.abs(u), np.abs(v)) < 0.3) & (np.maximum(np.abs(u), np.abs(v)) < 0.95)
    if shape == "ring":
        return (r < 0.98) & (r > 0.5)
    raise ValueError(f"shape: expected one of {', '.join(SHAPES)}, got {shape!r}")


def in_pattern(pattern: str, u: np.ndarray, v: np.ndarray, period: float) -> np.ndarray:
    """Tell which points, in pixels, carry the light ink of a pattern."""
    if pattern == "plain":
        return np.zeros(u.shape, bool)
    if pattern == "striped":
        return (u + v) / (1.4 * period) % 2 < 1
    if pattern == "dotted":
        return np.hypot(u % (1.9 * period) - 0.95 * period, v % (1.9 * period) - 0.95 * period) < 0.55 * period
    if pattern == "checkered":
        return (u // (1.25 * period) + v // (1.25 * period)) % 2 < 1
    raise ValueError(f"pattern: expected one of {', '.join(PATTERNS)}, got {pattern!r}")


def is_annotated(split: str, label: int) -> bool:
    """Tell whether objects of a category are annotated in a split: novel ones never are in training."""
    return split != "train" or label in BASE
