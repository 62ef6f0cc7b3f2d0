"""YOLO's labels: a text file for each image, with a line for each box."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from regionspot.data.region_formats.entries import Entries, EntriesBuilder, box_around, relative_name
from regionspot.utils.unpickling import check_size

# Text files beside labels that are no labels.
_NOT_LABELS = ("classes.txt", "labels.txt", "obj.names", "train.txt", "val.txt", "test.txt", "requirements.txt")


def is_label_file(path: Path) -> bool:
    """Return whether a text file below a directory of labels is one; exports have notes beside them."""
    name = path.name.lower()
    return name not in _NOT_LABELS and not name.startswith("readme")


def read_yolo(paths: Sequence[Path], root: Path) -> Entries:
    """Read label files below a directory; names are those of ``data.yaml`` or ``classes.txt``, else the class ids.

    A line is "class cx cy width height [score]" in parts of the image's sides, or "class x y x y x y ... [score]",
    which becomes the box around the points.
    """
    names = _read_names(root)
    builder = EntriesBuilder(are_relative=True, have_suffix=False)
    for path in paths:
        boxes, labels, scores = [], [], []
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"regions {path}: expected lines of text, got other bytes ({error})") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                class_id, box, score = _parse_line(f"regions {path}: line {number}", line)
                if names is not None and class_id not in names:
                    raise ValueError(
                        f"regions {path}: line {number}: class {class_id} has no name; the ids with names are "
                        f"{', '.join(map(str, list(names)[:10]))}"
                    )
                boxes.append(box)
                labels.append(str(class_id) if names is None else names[class_id])
                scores.append(score)
        name = relative_name(path.with_suffix(""), root)
        builder.add(f"regions {path}", [name, _image_of(name)], boxes, labels, scores)
    return builder.finish()


def _image_of(name: str) -> str:
    """Return the name of the image of a label file: YOLO's "train/images/a" has "train/labels/a"."""
    before, separator, after = f"/{name}".rpartition("/labels/")
    return f"{before}/images/{after}".lstrip("/") if separator else name


def _parse_line(place: str, line: str) -> tuple[int, list[float], float | None]:
    """Return class id, box XYXY in parts of the image's sides, and the score."""
    try:
        class_id, *values = [float(word) for word in line.split()]
        is_valid = class_id == int(class_id) and all(map(math.isfinite, values))
    except (ValueError, OverflowError):
        is_valid = False
    if not is_valid or len(values) not in (4, 5) and len(values) < 6:
        raise ValueError(f"{place}: expected class cx cy width height, got {line!r:.60}")
    if max(map(abs, values)) > 2:  # boxes may end a little outside
        raise ValueError(f"{place}: expected parts of the image's sides, from 0 to 1, got {line!r:.60}")
    if len(values) <= 5:
        x, y, width, height = values[:4]
        box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        return int(class_id), box, values[4] if len(values) == 5 else None
    score = values.pop() if len(values) % 2 else None
    return int(class_id), box_around(values), score


def _read_names(root: Path) -> dict[int, str] | None:
    """Return the names by class id, of a directory or one of the two above it; None if there are none."""
    for directory in (root, *root.resolve().parents[:2]):
        for name in ("data.yaml", "dataset.yaml"):
            if (directory / name).is_file():
                return _parse_yaml(directory / name)
        for name in ("classes.txt", "obj.names"):
            if (directory / name).is_file():
                lines = (directory / name).read_text(encoding="utf-8-sig").splitlines()
                return {index: line.strip() for index, line in enumerate(lines) if line.strip()}
    return None


def _parse_yaml(path: Path) -> dict[int, str]:
    content: Any = None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        check_size(content, path.stat().st_size)  # a few anchors can stand for gigabytes
    except Exception as error:  # the parser raises many types for damaged files
        raise ValueError(f"regions {path}: not readable as YAML ({' '.join(str(error).split())})") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not all(type(key) is int for key in names):
        raise ValueError(f"regions {path}: expected names: a list, or class ids with names, got {names!r:.80}")
    return {key: str(name) for key, name in names.items()}
