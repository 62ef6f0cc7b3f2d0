"""Drawings of what regions attend to, and sheets of several drawings."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

MIN_SIDE = 600  # pixels: smaller images have no space for labels


def draw_attention(image: np.ndarray, attention: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Draw what a region attends to over its image, as a heat map from dark to bright, and the region's box.

    Args:
        image: (H, W, 3) uint8 RGB.
        attention: (grid, grid) float, at least 0; CLIP saw the whole image as a square.
        box: (4,) XYXY of the region, original pixels.

    Returns:
        (H', W', 3) uint8 RGB; small images are enlarged.
    """
    image, scale = enlarge(image)
    height, width = image.shape[:2]
    gray = image.mean(axis=2)
    relative = (attention / max(float(attention.max()), 1e-12)).astype(np.float32)
    heat = np.asarray(Image.fromarray(relative).resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    mixed = 0.5 * gray[..., None] + 0.5 * 255 * matplotlib.colormaps["inferno"](heat)[..., :3]
    drawing = Image.fromarray(mixed.astype(np.uint8))
    x0, y0, x1, y1 = (np.clip(box * scale, 0, (width - 1, height - 1) * 2)).tolist()
    line = max(2, round(max(width, height) / 200))
    ImageDraw.Draw(drawing).rectangle((x0, y0, x1, y1), outline=(0, 229, 255), width=line)
    return np.asarray(drawing)


def enlarge(image: np.ndarray) -> tuple[np.ndarray, float]:
    """Return an image, (H, W, 3) uint8 RGB, with at least ``MIN_SIDE`` pixels on its longer side, and the factor."""
    scale = max(1.0, MIN_SIDE / max(image.shape[:2]))
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)), scale


def draw_sheet(cells: Sequence[tuple[np.ndarray, str]], columns: int) -> np.ndarray:
    """Draw images in a grid, each with its title above it.

    Args:
        cells: (H, W, 3) uint8 RGB images of any sizes, and titles, row by row.
        columns: images of a row.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    tallest = max(image.shape[0] / image.shape[1] for image, _ in cells)
    # inches, at 100 pixels each: an image is about 500 pixels wide
    figure = Figure((5 * columns, (5 * min(tallest, 2) + 0.5) * rows), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for index, (image, title) in enumerate(cells, 1):
        axes = figure.add_subplot(rows, columns, index)
        axes.imshow(image)
        axes.set_title(title.replace("$", r"\$"), fontsize=12, wrap=True)
        axes.set_axis_off()
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
