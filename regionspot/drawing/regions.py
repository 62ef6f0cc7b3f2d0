"""Recognized regions, drawn on their image."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw

from regionspot.drawing.labels import Label, place_labels
from regionspot.drawing.legend import LegendEntry, add_legend
from regionspot.drawing.outlines import draw_box, draw_contours, fill_mask, mask_reader
from regionspot.drawing.palette import Color, get_colors
from regionspot.drawing.style import DrawingStyle


class Regions(Protocol):
    """What is drawn: N regions of an image, such as ``regionspot.predictor.RegionPredictions``.

    Masks are the attribute ``rles`` (N compressed COCO RLEs of the image's size, or None), else ``masks`` ((N, H, W)
    bool, or None). With the attribute ``vocabulary`` (K names) the colors of neighboring names are distinct.
    """

    boxes: np.ndarray  # (N, 4) float32 XYXY, original pixels
    class_names: list[str]
    scores: np.ndarray  # (N,) float32


@dataclass
class _LabeledRegions:
    boxes: np.ndarray
    class_names: list[str]
    scores: np.ndarray
    masks: np.ndarray | None


def draw_regions(image: np.ndarray, regions: Regions, style: DrawingStyle | None = None) -> np.ndarray:
    """Draw regions' outlines and class names with scores on their image.

    A name has the same color in all images of a vocabulary. Labels are never on each other; where there is no space,
    those of the highest scores are drawn. Memory is that of the image and one mask.

    Args:
        image: (H, W, 3) uint8 RGB.
        regions: of this image.
        style: what is drawn, and how.

    Returns:
        (H, W, 3) uint8 RGB; larger with a legend.

    Raises:
        ValueError: an image, boxes or masks of another shape, or a damaged RLE.
    """
    style = style or DrawingStyle()
    boxes, names, scores = _check_regions(image, regions)
    size = (image.shape[0], image.shape[1])
    colors = get_colors(names, getattr(regions, "vocabulary", None))
    ranked = np.argsort(-np.nan_to_num(scores), kind="stable").tolist()
    order = [index for index in ranked if not scores[index] < style.score_threshold]  # no score, NaN, is not low
    drawn = _draw_outlines(image, regions, boxes, colors, order, style)
    if not style.labels and style.legend not in ("right", "below"):
        return drawn
    texts = [_describe(name, score, style) for name, score in zip(names, scores.tolist())]
    font_size = style.get_font_size(size, len(order))
    counts = Counter(names[index] for index in sorted(order)).most_common()  # the most frequent classes first
    rows = {name: row for row, (name, _) in enumerate(counts, 1)}
    numbers = None if style.legend == "none" else [rows.get(name, 0) for name in names]  # else they mean nothing
    labels: list[Label] = []
    if style.labels:
        labels = place_labels(texts, boxes, order, size, font_size, style.max_label_share, numbers)
    drawn = _draw_labels(drawn, labels, colors, style.get_line_width(size, len(order)))
    has_numbers = any(label.number for label in labels)
    if not order or style.legend == "none" or (style.legend == "auto" and not has_numbers):
        return drawn
    color_of = dict(zip(names, colors))
    entries = [
        LegendEntry(str(rows[name]) if has_numbers else "", name, str(count), color_of[name]) for name, count in counts
    ]
    return add_legend(drawn, entries, font_size, below=style.legend == "below")


def draw_labels(
    image: np.ndarray,
    boxes: np.ndarray,
    masks: np.ndarray | None,
    labels: list[str],
    style: DrawingStyle | None = None,
) -> np.ndarray:
    """Draw (N, 4) boxes XYXY, (N, H, W) masks and N labels on a (H, W, 3) uint8 RGB image; return the same.

    The color of a region depends on its label.
    """
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    return draw_regions(image, _LabeledRegions(boxes, labels, np.full(len(labels), np.nan), masks), style)


def _check_regions(image: np.ndarray, regions: Regions) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Return boxes (N, 4) float32, N names and scores (N,) float32."""
    boxes, names = np.asarray(regions.boxes, np.float32), list(regions.class_names)
    scores = np.asarray(regions.scores, np.float32)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise ValueError(f"image: expected (H, W, 3) uint8 RGB, got shape {image.shape} and dtype {image.dtype}")
    if boxes.shape != (len(names), 4) or scores.shape != (len(names),) or not np.isfinite(boxes).all():
        raise ValueError(
            f"regions: expected finite boxes (N, 4) and scores (N,) of {len(names)} names, got shapes {boxes.shape} "
            f"and {scores.shape}"
        )
    return boxes, names, scores


def _draw_outlines(
    image: np.ndarray,
    regions: Regions,
    boxes: np.ndarray,
    colors: Sequence[Color],
    order: Sequence[int],
    style: DrawingStyle,
) -> np.ndarray:
    """Return a copy of the image with filled masks and outlines."""
    drawn, size = np.array(image, order="C"), (image.shape[0], image.shape[1])
    width = style.get_line_width(size, len(order))
    with_masks = style.fill > 0 or style.outline == "mask"
    read_mask = mask_reader(regions, size) if with_masks else None
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    for index in sorted(order, key=lambda index: -areas[index]):  # large regions first: small ones are on top
        mask = read_mask(index) if read_mask else None
        if mask is not None and style.fill:
            fill_mask(drawn, mask, colors[index], style.fill)
        if style.outline == "mask" and mask is not None:
            draw_contours(drawn, mask, colors[index], width)
        elif style.outline != "none":
            draw_box(drawn, boxes[index], colors[index], width)
    return drawn


def _draw_labels(image: np.ndarray, labels: Sequence[Label], colors: Sequence[Color], width: int) -> np.ndarray:
    canvas = Image.fromarray(image)
    artist = ImageDraw.Draw(canvas)
    for label in labels:
        if label.placement.leader:
            artist.line(label.placement.leader, fill=colors[label.placement.region], width=max(1, width // 2))
    for label in labels:  # after all lines, which pass below
        label.draw(artist, colors[label.placement.region])
    return np.asarray(canvas).copy()


def _describe(name: str, score: float, style: DrawingStyle) -> str:
    return f"{name} {score:.0%}" if style.scores and not np.isnan(score) else name
