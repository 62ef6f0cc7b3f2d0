"""A contact sheet: crops of regions in a grid, each with its title."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from regionspot.index.store import IndexedRegion
from regionspot.utils.images import to_rgb_array

CELL = 160  # side of a crop, pixels
TITLE = 18  # height of a title, pixels
MARGIN = 0.15  # of a box's sides, shown around it
_GRAY = (128, 128, 128)


def crop_region(image: np.ndarray, box: np.ndarray, margin: float = MARGIN) -> np.ndarray:
    """Return the part of a (H, W, 3) uint8 image around a box (XYXY, pixels), with a margin; at least one pixel."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = box.tolist()
    dx, dy = margin * (x1 - x0), margin * (y1 - y0)
    left, top = (int(np.clip(x0 - dx, 0, width - 1)), int(np.clip(y0 - dy, 0, height - 1)))
    right, bottom = int(np.ceil(np.clip(x1 + dx, left + 1, width))), int(np.ceil(np.clip(y1 + dy, top + 1, height)))
    return image[top:bottom, left:right]


def draw_contact_sheet(
    regions: Sequence[IndexedRegion], titles: Sequence[str], root: str | Path, columns: int = 5
) -> np.ndarray:
    """Draw regions in a grid, row by row; one whose image is missing or damaged is gray.

    Args:
        regions: of an index.
        titles: of the regions.
        root: directory of the images.
        columns: regions of a row.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    columns = max(min(columns, len(regions)), 1)
    rows = max(-(-len(regions) // columns), 1)
    sheet = Image.new("RGB", (columns * CELL, rows * (CELL + TITLE)), "white")
    drawing, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    for place, (region, title) in enumerate(zip(regions, titles)):
        left, top = place % columns * CELL, place // columns * (CELL + TITLE)
        drawing.text((left + 4, top + 3), title, fill="black", font=font)
        crop = _crop(region, Path(root))
        crop.thumbnail((CELL - 4, CELL - 4))
        sheet.paste(crop, (left + (CELL - crop.width) // 2, top + TITLE + (CELL - crop.height) // 2))
    return np.asarray(sheet).copy()


def _crop(region: IndexedRegion, root: Path) -> Image.Image:
    try:
        crop = crop_region(to_rgb_array(root / region.image), region.box)
    except (OSError, ValueError):
        return Image.new("RGB", (CELL, CELL), _GRAY)
    image = Image.fromarray(crop)
    scale = (CELL - 4) / max(image.size)  # small regions are enlarged
    return image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)))
