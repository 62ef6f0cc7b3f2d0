"""Images with boxes as the page shows them: the pixels once, boxes and names as SVG over them."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from regionspot.report.worst_images import ImageErrors, Region
from regionspot.utils.images import to_rgb_array

MAX_SIDE = 720  # of an embedded image, pixels: about 60 kB
MAX_LABELS = 25  # names that are written into an image; the others appear when one points at the box
SHOWN = (590, 460)  # width and height of an image in the page, CSS pixels
FONT_SIZE = 13  # CSS pixels


@dataclass(frozen=True)
class Box:
    """A box over an image, in its original pixels."""

    box: tuple[float, ...]
    kind: str
    caption: str
    text: str
    is_labeled: bool
    label_x: float
    label_y: float


@dataclass(frozen=True)
class EmbeddedImage:
    """An embedded image with a caption."""

    data: str
    caption: str


@dataclass
class Panel:
    """An image twice, with its objects and with its detections.

    Attributes:
        title, caption: of the image, and of its detections.
        size: (height, width), original pixels.
        data: the image as a data URI, "" if it cannot be shown, for the reason in ``problem``.
        font_size: of the names, in original pixels.
        objects, detections: their boxes.
        errors: what is wrong, a line for each error.
        attention: attention maps of regions, or other small images.
        attention_title: what they are.
    """

    title: str
    caption: str
    size: tuple[int, int]
    data: str
    problem: str
    font_size: float
    objects: list[Box]
    detections: list[Box]
    errors: list[str]
    attention: list[EmbeddedImage]
    attention_title: str = "What the regions of objects attend to, from dark to bright:"


Attend = Callable[[np.ndarray, ImageErrors], list[EmbeddedImage]]  # attention maps of an image's objects


def make_panel(image: ImageErrors, directory: str, attend: Attend | None = None) -> Panel:
    """Return an image with its boxes; one that is missing or damaged is gray, and ``problem`` says why."""
    data, problem, attention = "", "", list[EmbeddedImage]()
    try:
        array = to_rgb_array(find_image(image.file_name, directory))
        data, attention = embed(array), attend(array, image) if attend else []
    except (OSError, ValueError) as error:
        problem = str(error)
    height, width = image.size
    font_size = round(FONT_SIZE * max(width / SHOWN[0], height / SHOWN[1]), 2)
    more = f" and {image.num_hidden} more" if image.num_hidden else ""
    wrong = [region for region in (*image.objects, *image.detections) if region.kind in ("wrong", "missed")]
    return Panel(
        title=f"{image.file_name or image.image_id}: {image.num_missed} not found, {image.num_wrong} wrong",
        caption=f"predicted, {len(image.detections)} detections{more}",
        size=image.size,
        data=data,
        problem=problem,
        font_size=font_size,
        objects=_boxes(image.objects, image.size, font_size),
        detections=_boxes(image.detections, image.size, font_size),
        errors=[f"{_caption(region)}: {region.text}" for region in wrong],
        attention=attention,
    )


def find_image(file_name: str, directory: str) -> Path:
    """Return the path of an image below ``directory``.

    Raises:
        FileNotFoundError: the annotations have no name of it, or there is no such file.
    """
    if not file_name:
        raise FileNotFoundError("the annotations have no file name of this image")
    parts = Path(file_name).parts
    # Some data sets keep only the last parts of the names in their annotations, such as Objects365.
    for start in range(len(parts)):
        path = Path(directory, *parts[start:])
        if path.is_file():
            return path
    raise FileNotFoundError(f"image {Path(directory, file_name)}: no such file; --images DIR says where images are")


def embed(image: np.ndarray, max_side: int = MAX_SIDE) -> str:
    """Return an image, (H, W, 3) uint8 RGB, as a data URI of a JPEG with at most ``max_side`` pixels a side."""
    small = Image.fromarray(image)
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _boxes(regions: Sequence[Region], size: tuple[int, int], font_size: float) -> list[Box]:
    # errors get their names first, then the best-scored
    order = sorted(range(len(regions)), key=lambda index: regions[index].kind not in ("wrong", "missed"))
    places: dict[int, tuple[float, float]] = {}
    taken: list[tuple[float, ...]] = []
    for index in order[:MAX_LABELS]:
        label = _place_label(regions[index].box, _caption(regions[index]), size, font_size, taken)
        places[index] = (round(label[0], 1), round(label[3] - 0.25 * font_size, 1))  # the baseline is above the bottom
        taken.append(label)
    return [
        Box(region.box, region.kind, _caption(region), region.text, index in places, *places.get(index, (0.0, 0.0)))
        for index, region in enumerate(regions)
    ]


def _place_label(
    box: tuple[float, ...], caption: str, size: tuple[int, int], font_size: float, taken: list[tuple[float, ...]]
) -> tuple[float, ...]:
    """Return XYXY of a label at its box, inside the image, where it overlaps those in ``taken`` least."""
    x, y, width, height = box
    # letters of this font are about 0.6 of its size wide
    label_width, label_height = 0.6 * font_size * len(caption), 1.15 * font_size
    lefts = (x, x + width - label_width)
    tops = (y - label_height, y + height, y, y + height - label_height)  # above, below, and inside the box
    candidates = []
    for top in tops:
        for left in lefts:
            left_inside = min(max(left, 0.0), max(size[1] - label_width, 0.0))
            top_inside = min(max(top, 0.0), max(size[0] - label_height, 0.0))
            candidates.append((left_inside, top_inside, left_inside + label_width, top_inside + label_height))
    return min(candidates, key=lambda label: sum(_overlap(label, other) for other in taken))  # the first of equal ones


def _overlap(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)


def _caption(region: Region) -> str:
    return region.name if region.score is None else f"{region.name} {region.score:.2f}"
