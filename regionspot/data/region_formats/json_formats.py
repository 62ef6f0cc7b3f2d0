"""Annotation tools' JSON of single images: labelme's, Label Studio's, and RegionSpot's own."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
import numpy as np

from regionspot.data.coco_io import JsonFile
from regionspot.data.coco_io.json_file import BYTE_ORDER_MARK
from regionspot.data.region_formats.entries import (
    Entries,
    EntriesBuilder,
    box_around,
    box_around_rotated,
    names_beside,
)

Point = tuple[float, float]
_NO_BOXES = ("point", "line", "linestrip", "points", "linestring")  # shapes without area


class _Shape(msgspec.Struct, gc=False):
    points: list[Point]
    label: str = ""
    shape_type: str | None = None
    score: float | None = None


class _LabelmeFile(msgspec.Struct, gc=False):
    shapes: list[_Shape]
    imagePath: str = ""  # noqa: N815
    imageHeight: int | None = None  # noqa: N815
    imageWidth: int | None = None  # noqa: N815


def read_labelme(paths: Sequence[Path], root: Path) -> Entries:
    """Read labelme's files, one an image; ``imagePath`` is relative to the file.

    Polygons, circles and masks become the boxes around them; points and lines are left out.
    """
    builder, decoder = EntriesBuilder(), msgspec.json.Decoder(_LabelmeFile)
    for path in paths:
        file = JsonFile(path, "regions")
        content = file.decode(decoder, place="")
        shapes = [shape for shape in content.shapes if shape.shape_type not in _NO_BOXES and shape.points]
        builder.add(
            file.name,
            names_beside(path, root, content.imagePath),
            [_labelme_box(shape) for shape in shapes],
            [shape.label for shape in shapes],
            [shape.score for shape in shapes],
            (content.imageHeight or 0, content.imageWidth or 0),
        )
    return builder.finish()


def _labelme_box(shape: _Shape) -> list[float]:
    if shape.shape_type == "circle" and len(shape.points) == 2:
        (x, y), edge = shape.points
        radius = float(np.hypot(edge[0] - x, edge[1] - y))
        return [x - radius, y - radius, x + radius, y + radius]
    x0, y0, x1, y1 = box_around(shape.points)
    # the points of a mask are its first and last pixels
    return [x0, y0, x1 + 1, y1 + 1] if shape.shape_type == "mask" else [x0, y0, x1, y1]


class _Region(msgspec.Struct, gc=False):
    box: tuple[float, float, float, float]
    label: str | None = None
    score: float | None = None


class _Prediction(msgspec.Struct, gc=False):
    image: str
    regions: list[_Region]
    height: int = 0
    width: int = 0


def read_predictions(paths: Sequence[Path]) -> Entries:
    """Read what ``regionspot predict`` writes: a JSON file of each image, or JSON lines of many."""
    builder, decoder = EntriesBuilder(), msgspec.json.Decoder(_Prediction)
    for path in paths:
        file = JsonFile(path, "regions")
        is_lines = path.suffix == ".jsonl"
        for number, line in _lines(file) if is_lines else [(1, None)]:
            place = f"line {number}" if is_lines else ""
            image = file.decode(decoder, line, place)
            builder.add(
                f"{file.name}: {place}" if place else file.name,
                [image.image],
                [region.box for region in image.regions],
                [region.label for region in image.regions],
                [region.score for region in image.regions],
                (image.height, image.width),
            )
    return builder.finish()


def _lines(file: JsonFile) -> Iterable[tuple[int, bytes]]:
    """Yield the lines that are not empty with their numbers, without a byte order mark."""
    with file.path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            line = line.removeprefix(BYTE_ORDER_MARK)
            if line.strip():
                yield number, line


def read_boxes(path: Path, content: dict[str, Any] | list[Any]) -> Entries:
    """Read {image: [[x0, y0, x1, y1], ...]}, or a list of boxes of every image.

    Raises:
        ValueError: not four numbers a box.
    """
    builder = EntriesBuilder()
    if not content:
        raise ValueError(f"regions {path}: no boxes; expected at least one, [x0, y0, x1, y1]")
    for name, boxes in content.items() if isinstance(content, dict) else [("every image", content)]:
        place = f"regions {path}: {name}"
        try:
            builder.add(place, [name], msgspec.convert(boxes, list[tuple[float, float, float, float]]) or [])
        except msgspec.ValidationError:
            raise ValueError(f"{place}: expected a list of boxes [x0, y0, x1, y1], got {boxes!r:.80}") from None
    return builder.finish()


class _Result(msgspec.Struct, gc=False):
    id: str | int | None = None
    type: str = ""
    value: dict[str, Any] = {}
    original_width: int = 0
    original_height: int = 0
    score: float | None = None


class _Annotation(msgspec.Struct, gc=False):
    result: list[_Result] = []
    canceled: bool = msgspec.field(default=False, name="was_cancelled")


class _Task(msgspec.Struct, gc=False):
    data: dict[str, Any]
    annotations: list[_Annotation] = []
    completions: list[_Annotation] = []  # before version 1.0
    predictions: list[_Annotation | int] = []
    file_upload: str | None = None


def read_label_studio(path: Path) -> Entries:
    """Read Label Studio's JSON export: of each task the first annotation that was not canceled, else its prediction.

    Rotated rectangles and polygons become the boxes around them; other kinds are left out.
    """
    builder, file = EntriesBuilder(are_relative=True), JsonFile(path, "regions")
    for index, task in enumerate(file.decode(list[_Task], place="task {}")):
        place = f"{file.name}: task {index}"
        names = _task_names(task)
        if not names:
            raise ValueError(f"{place}: expected an image in data, such as /data/upload/..., got {task.data!r:.80}")
        made = [item for item in (*task.annotations, *task.completions) if not item.canceled]
        made = made or [item for item in task.predictions if isinstance(item, _Annotation)]
        # A region has a result for each of its controls (rectangle, labels, text), all with its id and box.
        regions: dict[tuple, tuple[list[float], str | None, float | None]] = {}
        size = (0, 0)
        for number, result in enumerate(made[0].result if made else ()):
            if (box := _percent_box(place, result)) is not None:
                key = (number,) if result.id is None else (result.id, *box)
                label, score = _result_label(result), result.score
                _, known_label, known_score = regions.get(key, (box, None, None))
                regions[key] = (box, known_label or label, score if known_score is None else known_score)
                size = (result.original_height, result.original_width)
        boxes, labels, scores = zip(*regions.values()) if regions else ((), (), ())
        builder.add(place, names, boxes, labels, scores, size)
    return builder.finish()


def _task_names(task: _Task) -> list[str]:
    """Return the image's path as Label Studio has it, and its name before it was uploaded."""
    values = [value for value in task.data.values() if isinstance(value, str)]
    names = [task.file_upload] if task.file_upload else []
    for value in values:
        try:
            parts = urlsplit(value)
        except ValueError:  # a text that begins as an address
            continue
        local = parse_qs(parts.query).get("d", [""])[0] if "/local-files" in parts.path else ""
        name = local or unquote(parts.path)
        if re.search(r"\.\w{2,5}$", name):
            names.append(name)
    # an upload is stored as eight hexadecimal digits of a UUID, "-", and its name
    uploaded = [re.sub(r"^(?:.*/)?[0-9a-f]{8}-", "", name) for name in names]
    return list(dict.fromkeys([*uploaded, *names]))


def _percent_box(place: str, result: _Result) -> list[float] | None:
    """Return a box XYXY in parts of the image's sides, None for kinds without one."""
    value = result.value
    try:
        if "points" in value and result.type.startswith("polygon"):
            return [side / 100 for side in box_around(value["points"])]
        if not {"x", "y", "width", "height"} <= value.keys():
            return None
        x, y, width, height = (float(value[key]) for key in ("x", "y", "width", "height"))
        rotation = float(value.get("rotation") or 0)
    except (TypeError, ValueError):
        raise ValueError(f"{place}: expected numbers x, y, width, height in percent, got {value!r:.80}") from None
    corners = [x / 100, y / 100, (x + width) / 100, (y + height) / 100]
    if not rotation % 360:
        return corners
    if not result.original_width or not result.original_height:
        raise ValueError(f"{place}: a rotated box: expected original_width and original_height, got none")
    # percent of two different sides: angles are right in pixels only
    scale = np.array([result.original_width, result.original_height] * 2)
    pixels = (np.array(corners) * scale).tolist()
    return (np.array(box_around_rotated(pixels, rotation, pixels[:2])) / scale).tolist()


def _result_label(result: _Result) -> str | None:
    labels = result.value.get(result.type) or result.value.get("rectanglelabels") or result.value.get("labels")
    return str(labels[0]) if isinstance(labels, list) and labels else None
