"""Which format a file or directory is in, and reading it."""

import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from regionspot.data.coco_io import JsonFile
from regionspot.data.region_formats.coco_formats import read_annotations, read_proposals
from regionspot.data.region_formats.entries import Entries
from regionspot.data.region_formats.json_formats import read_boxes, read_label_studio, read_labelme, read_predictions
from regionspot.data.region_formats.region_file import RegionFile
from regionspot.data.region_formats.xml_formats import read_cvat, read_voc, root_tag
from regionspot.data.region_formats.yolo_format import is_label_file, read_yolo

FORMATS = ("auto", "coco", "proposals", "labelme", "yolo", "voc", "cvat", "label-studio", "predictions", "boxes")
_SUFFIXES = {"labelme": ".json", "predictions": ".json", "yolo": ".txt", "voc": ".xml", "cvat": ".xml"}
_PROPOSAL_SUFFIXES = (".safetensors", ".pkl", ".pickle")


def read_regions(path: str | Path, format: str = "auto", annotations: str | Path | None = None) -> RegionFile:
    """Read the boxes of images from a file or a directory.

    Args:
        path: the file or directory.
        format: "auto" finds it out by the content, or

            * "coco": annotations in COCO or LVIS format;
            * "proposals": COCO results, or what else ``regionspot.data.proposals.ProposalFile`` reads, by image id;
            * "labelme": a file, or a directory of files;
            * "yolo": a directory of labels, with data.yaml or classes.txt in it or above it;
            * "voc": a file or a directory of Pascal VOC's XML, whose first pixel is 1;
            * "cvat": "CVAT for images 1.1", a file or a directory of files;
            * "label-studio": its JSON export;
            * "predictions": files of ``regionspot predict``, one an image, or JSON lines;
            * "boxes": JSON, {image: [[x0, y0, x1, y1], ...]}, or one list of boxes for every image.
        annotations: for "proposals", an annotation file in COCO format that has the images' names; without it, the
            images' file names must be their ids, "000000000139.jpg".

    Raises:
        FileNotFoundError: no such file or directory.
        ValueError: damaged, or of another format; it names the file and the place.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"regions {path}: expected one of the formats {', '.join(FORMATS)}, got {format!r}")
    if not path.exists():
        raise FileNotFoundError(f"regions {path}: no such file or directory")
    if path.name in ("data.yaml", "dataset.yaml"):
        path = path.parent
    paths = [path]
    if path.is_dir():
        format, paths = _find_files(path, format)
    elif format == "auto":
        format = _detect(path)
    if annotations is not None and format != "proposals":
        raise ValueError(f"regions {path}: annotations are for boxes by image id, got the format {format}")
    return _read(path, format, paths, None if annotations is None else Path(annotations))


def _read(path: Path, format: str, paths: Sequence[Path], annotations: Path | None) -> RegionFile:
    root = path if path.is_dir() else path.parent
    entries: Entries
    is_for_all = False
    if format == "boxes":
        content = JsonFile(path, "regions").decode(dict | list)
        entries, is_for_all = read_boxes(path, content), isinstance(content, list)
    elif format == "proposals":
        _, entries = read_proposals(path, annotations)
    elif format == "coco":
        entries = read_annotations(path)
    elif format == "label-studio":
        entries = read_label_studio(path)
    elif format == "predictions":
        entries = read_predictions(paths)
    elif format == "cvat":
        entries = read_cvat(paths)
    else:
        entries = {"labelme": read_labelme, "voc": read_voc, "yolo": read_yolo}[format](paths, root)
    return RegionFile(path, format, entries, is_for_all)


def _find_files(directory: Path, format: str) -> tuple[str, list[Path]]:
    """Return the format of the files below a directory, and their paths in order."""
    if format not in ("auto", *_SUFFIXES):
        raise ValueError(f"regions {directory}: expected a file of the format {format}, got a directory")
    candidates = sorted(path for path in directory.rglob("*") if path.suffix in (".json", ".txt", ".xml"))
    labels = [path for path in candidates if path.suffix != ".txt" or is_label_file(path)]
    suffixes = {path.suffix for path in labels} if format == "auto" else {_SUFFIXES[format]}
    if len(suffixes) != 1:
        got = " and ".join(sorted(suffixes)) or "none"
        raise ValueError(
            f"regions {directory}: expected .json of labelme, .txt of YOLO or .xml of Pascal VOC or CVAT in it, got "
            f"{got}; give the format, or another directory"
        )
    suffix = suffixes.pop()
    paths = [path for path in labels if path.suffix == suffix]
    if not paths:
        raise ValueError(f"regions {directory}: expected files {suffix} in it, got none")
    if format == "auto":
        format = "yolo" if suffix == ".txt" else _detect(paths[0])
    if format not in _SUFFIXES:
        raise ValueError(
            f"regions {directory}: {paths[0].name} is of the format {format}; give this file, not its directory"
        )
    return format, paths


def _detect(path: Path) -> str:
    """Return the format of a file."""
    if path.suffix in _PROPOSAL_SUFFIXES:
        return "proposals"
    if path.suffix == ".jsonl":
        return "predictions"
    if path.suffix == ".xml":
        kinds = {"annotation": "voc", "annotations": "cvat"}
        if (tag := root_tag(path)) not in kinds:
            raise ValueError(f"regions {path}: expected XML of Pascal VOC or CVAT, got the root element {tag[:40]!r}")
        return kinds[tag]
    if path.suffix == ".txt":
        raise ValueError(f"regions {path}: expected the directory of YOLO's labels, got one file")
    file = JsonFile(path, "regions")
    if re.match(rb"\s*\[", file.buffer):
        return _detect_list(file)
    keys = file.decode(dict[str, msgspec.Raw], place="expected a JSON object or list")
    if "annotations" in keys or "images" in keys:
        return "coco"
    if "shapes" in keys:
        return "labelme"
    if "regions" in keys and "image" in keys:
        return "predictions"
    if keys and all(re.fullmatch(r"-?\d+", key) and bytes(raw)[:1] == b"{" for key, raw in keys.items()):
        return "proposals"
    if all(bytes(raw)[:1] == b"[" for raw in keys.values()):
        return "boxes"
    raise ValueError(
        f"{file.name}: expected JSON of one of the formats {', '.join(FORMATS[1:])}, got the keys "
        f"{', '.join(list(keys)[:5])}"
    )


def _detect_list(file: JsonFile) -> str:
    head = bytes(file.buffer[: 1 << 12])
    if not re.match(rb"\s*\[\s*\{", head):
        return "boxes"
    if b'"image_id"' in head and b'"data"' not in head:
        return "proposals"
    tasks = file.decode(list[msgspec.Raw])
    keys = file.decode(dict[str, msgspec.Raw], tasks[0], "entry 0")
    if "data" in keys:
        return "label-studio"
    if "image_id" in keys:
        return "proposals"
    raise ValueError(
        f"{file.name}: expected COCO results, or Label Studio's export as JSON (not JSON-MIN), got entries with the "
        f"keys {', '.join(list(keys)[:5])}"
    )
