"""Pascal VOC's and CVAT's XML. Files with a document type are refused: entities can expand to gigabytes."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import iterparse

from regionspot.data.region_formats.entries import (
    Entries,
    EntriesBuilder,
    box_around,
    box_around_rotated,
    names_beside,
)


def root_tag(path: Path) -> str:
    """Return the name of the root element, "annotation" for Pascal VOC and "annotations" for CVAT."""
    return next(_elements(path, ("start",))).tag


def read_voc(paths: Sequence[Path], root: Path) -> Entries:
    """Read Pascal VOC's files, one an image. The first pixel of VOC is 1, and boxes include their last pixel."""
    builder = EntriesBuilder()
    for path in paths:
        boxes, labels, name, size = [], [], "", (0.0, 0.0)
        for element in _elements(path, ("end",), ("object", "filename", "size")):
            if element.tag == "object":
                x0, y0, x1, y1 = (_number(path, element, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax"))
                boxes.append([x0 - 1, y0 - 1, x1, y1])
                labels.append((element.findtext("name") or "").strip())
            elif element.tag == "filename":
                name = (element.text or "").strip().replace("\\", "/").rpartition("/")[2]
            else:
                size = (_number(path, element, "height"), _number(path, element, "width"))
        # the directory in the file is of the machine that made it
        builder.add(f"regions {path}", names_beside(path, root, name), boxes, labels, None, size)
    return builder.finish()


def read_cvat(paths: Sequence[Path]) -> Entries:
    """Read "CVAT for images 1.1": boxes, and the boxes around polygons, ellipses and masks, rotated ones too."""
    builder = EntriesBuilder()
    for path in paths:
        for element in _elements(path, ("end",), ("image", "track")):
            if element.tag == "track":
                raise ValueError(
                    f"regions {path}: expected CVAT for images 1.1, got tracks of a video; export it as CVAT for images"
                )
            name = element.get("name", "")
            place = f"regions {path}: image {name}"
            if not name:
                raise ValueError(f"regions {path}: an image has no name; expected CVAT for images 1.1")
            shapes = [(shape, box) for shape in element if (box := _cvat_box(place, shape)) is not None]
            size = (_attribute(place, element, "height", "0"), _attribute(place, element, "width", "0"))
            names = [f"{element.get('subset')}/{name}", name] if element.get("subset") else [name]
            labels = [shape.get("label") for shape, _ in shapes]
            builder.add(place, names, [box for _, box in shapes], labels, None, size)
    return builder.finish()


def _cvat_box(place: str, shape: Element) -> list[float] | None:
    """Return the box XYXY around a shape, None for kinds without area."""

    def get(*keys: str) -> list[float]:
        return [_attribute(place, shape, key) for key in keys]

    if shape.tag == "box":
        corners = get("xtl", "ytl", "xbr", "ybr")
    elif shape.tag == "ellipse":
        x, y, rx, ry = get("cx", "cy", "rx", "ry")
        angle = math.radians(_attribute(place, shape, "rotation", "0"))
        half_width = math.hypot(rx * math.cos(angle), ry * math.sin(angle))
        half_height = math.hypot(rx * math.sin(angle), ry * math.cos(angle))
        return [x - half_width, y - half_height, x + half_width, y + half_height]
    elif shape.tag == "mask":
        left, top, width, height = get("left", "top", "width", "height")
        corners = [left, top, left + width, top + height]
    elif shape.tag == "polygon":
        try:
            pairs = [point.split(",") for point in shape.get("points", "").split(";")]
            return box_around([(float(x), float(y)) for x, y in pairs])
        except ValueError:
            raise ValueError(f'{place}: expected points "x,y;x,y", got {shape.get("points")!r:.60}') from None
    else:
        return None
    center = ((corners[0] + corners[2]) / 2, (corners[1] + corners[3]) / 2)
    return box_around_rotated(corners, _attribute(place, shape, "rotation", "0"), center)


def _elements(path: Path, events: tuple[str, ...], tags: Sequence[str] = ()) -> Iterator[Element]:
    """Yield the elements of a file with these tags that are the root, or directly below it."""
    depth = 0
    try:
        for event, element in iterparse(path, ("start", "end"), forbid_dtd=True):
            depth += 1 if event == "start" else 0
            if event in events and depth <= 2 and (not tags or element.tag in tags):
                yield element
            if event == "end":
                if depth == 2:
                    element.clear()  # else a file of gigabytes would stay in memory
                depth -= 1
    except DefusedXmlException as error:
        raise ValueError(
            f"regions {path}: expected XML without a document type (<!DOCTYPE ...>), which can expand without bounds; "
            "remove it"
        ) from error
    except (ParseError, ValueError, LookupError) as error:  # the last is of an unknown encoding
        raise ValueError(f"regions {path}: damaged, or not XML ({error})") from error


def _number(path: Path, element: Element, key: str) -> float:
    text = element.findtext(key)
    try:
        return float(text or "")
    except ValueError:
        raise ValueError(f"regions {path}: <{element.tag}>: expected a number in <{key}>, got {text!r:.40}") from None


def _attribute(place: str, element: Any, key: str, default: str | None = None) -> float:
    text = element.get(key, default)
    try:
        return float(text)
    except (TypeError, ValueError):
        raise ValueError(f"{place}: <{element.tag}>: expected a number as {key}, got {text!r:.40}") from None
