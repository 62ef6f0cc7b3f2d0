"""What is written of each image while a run goes, and what is made of all of them at its end."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from PIL import Image

from regionspot.data.region_writers import (
    CropWriter,
    LabelmeWriter,
    RegionWriter,
    YoloWriter,
    write_coco_dataset,
    write_coco_results,
    write_table,
)
from regionspot.drawing import DrawingStyle, draw_regions
from regionspot.modeling.region_predictions import RegionPredictions
from regionspot.prediction.loading import Sample
from regionspot.prediction.sources import RUN_FILES, ImageRecord
from regionspot.utils.files import atomic_path, write_json


class ImageWriter(Protocol):
    """Writes the outputs of an image."""

    def __call__(self, record: ImageRecord, image: np.ndarray, regions: RegionPredictions) -> None:
        """Write the outputs of an image, (H, W, 3) uint8 RGB, and its regions."""


class DrawingWriter:
    """Writes ``<stem>.png``: the image with its regions."""

    def __init__(self, directory: str | Path, style: DrawingStyle | None = None) -> None:
        self.directory, self.style = Path(directory), style

    def __call__(self, record: ImageRecord, image: np.ndarray, regions: RegionPredictions) -> None:
        drawing = draw_regions(image, regions, self.style)
        with atomic_path(self.directory / f"{record.stem}.png") as temporary:
            Image.fromarray(drawing).save(temporary, format="PNG")


class JsonWriter:
    """Writes ``<stem>.json``: all that is known of each region."""

    def __init__(self, directory: str | Path, with_embeddings: bool = False) -> None:
        self.directory, self.with_embeddings = Path(directory), with_embeddings

    def __call__(self, record: ImageRecord, image: np.ndarray, regions: RegionPredictions) -> None:
        content = describe_regions(regions, self.with_embeddings)
        height, width = regions.image_size
        head = {"image": to_utf8(record.path), "height": height, "width": width, "vocabulary": regions.vocabulary}
        if record.frame >= 0:
            head["frame"] = record.frame
        write_json(self.directory / f"{record.stem}.json", {**head, "regions": content}, indent=None)


def describe_regions(regions: RegionPredictions, with_embeddings: bool = False) -> list[dict[str, Any]]:
    """Return the regions of an image's JSON."""
    assert regions.rles is not None
    described = []
    for i, label in enumerate(regions.class_names):
        region = {
            "box": [round(float(x), 3) for x in regions.boxes[i]],
            "label": label,
            "class_index": int(regions.classes[i]),
            "score": float(regions.scores[i]),
            "iou": float(regions.predicted_ious[i]),
            "logits": regions.logits[i].tolist(),
            "mask": regions.rles[i],
        }
        described.append({**region, "embedding": regions.embeddings[i].tolist()} if with_embeddings else region)
    return described


def to_utf8(name: str) -> str:
    """Return the name of a file, with bytes that are not UTF-8 escaped, which no file of text could hold."""
    return name.encode(errors="backslashreplace").decode()


def encode_image(sample: Sample, regions: RegionPredictions | None, with_embeddings: bool = False) -> bytes:
    """Return the line of an image in a part: all that files of the whole run are made of."""
    record = sample.record
    height, width = (0, 0) if sample.image is None else sample.image.shape[:2]
    line: dict[str, Any] = {
        "name": to_utf8(record.name),
        "path": to_utf8(record.path),
        "stem": to_utf8(record.stem),
        "image_id": record.image_id,
        "height": height,
        "width": width,
        "error": to_utf8(sample.error) or None,
        "has_entry": sample.has_entry,
    }
    if sample.error:
        line["file"] = sample.file  # a file that changes is tried again
    names = ("boxes", "classes", "class_names", "scores", "detection_scores", "unknown", "predicted_ious")
    for name in (*names, "embeddings") if with_embeddings else names:
        values = [] if regions is None else getattr(regions, name)
        line[name] = values.tolist() if isinstance(values, np.ndarray) else values
    line["masks"] = [] if regions is None or regions.rles is None else [rle["counts"] for rle in regions.rles]
    return msgspec.json.encode(line)


def open_image_writers(
    directory: str | Path, formats: Sequence[str], vocabulary: Sequence[str]
) -> dict[str, RegionWriter]:
    """Return the writers of files for labeling tools, each with a directory of its own: "labelme", "yolo", "crops"."""
    kinds: dict[str, type[RegionWriter]] = {"labelme": LabelmeWriter, "yolo": YoloWriter, "crops": CropWriter}
    return {name: kinds[name](Path(directory) / name, vocabulary) for name in formats if name in kinds}


def write_run_files(
    directory: str | Path,
    formats: Sequence[str],
    images: Iterable[dict[str, Any]],
    vocabulary: Sequence[str],
    category_ids: Sequence[int] | None = None,
    with_embeddings: bool = False,
) -> list[Path]:
    """Write the files of a whole run, in one pass each.

    Args:
        directory: for the ``RUN_FILES``.
        formats: which of them: "results", "coco", "csv", "parquet"; others are ignored.
        images: lines of all images, which can be read several times.
        vocabulary: class names.
        category_ids: of the classes in the data set's annotations; by default 1 to their number.
        with_embeddings: whether Parquet has them.
    """
    writers: dict[str, Callable[[Path], None]] = {
        "results": lambda path: write_coco_results(images, path, category_ids),
        "coco": lambda path: write_coco_dataset(images, path, vocabulary),
        "csv": lambda path: write_table(images, path),
        "parquet": lambda path: write_table(images, path, with_embeddings),
    }
    paths = []
    for name in formats:
        if name in writers:
            paths.append(Path(directory) / RUN_FILES[name])
            writers[name](paths[-1])
    return paths
