"""Files of each image's regions: labelme's JSON, YOLO's labels, crops."""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import yaml
from PIL import Image

from regionspot.data.region_writers.polygons import rle_polygons
from regionspot.utils.files import atomic_path, write_json


class Regions(Protocol):
    """N regions of an image, such as ``RegionPredictions``; ``rles``, N masks as COCO's RLE, are optional."""

    boxes: np.ndarray  # (N, 4) float32 XYXY, original pixels
    classes: np.ndarray  # (N,) int64 into the vocabulary
    class_names: list[str]
    scores: np.ndarray  # (N,) float32
    unknown: np.ndarray  # (N,) bool: of no class


class Record(Protocol):
    """What a run knows of an image."""

    name: str
    path: str
    stem: str


@dataclass(frozen=True)
class _Image:
    """What ``RegionWriter.write`` is told of an image."""

    name: str
    size: tuple[int, int]
    stem: str
    path: str | Path | None
    pixels: np.ndarray | None


class RegionWriter(ABC):
    """Writes the regions of images into a directory; writing an image again writes the same bytes.

    Files are called like their images, in the same directories: "a/cup.jpg" is written to "a/cup" with a suffix.
    """

    def __init__(self, directory: str | Path, vocabulary: Sequence[str]) -> None:
        """
        Args:
            directory: where files are written; it need not exist.
            vocabulary: K class names.
        """
        self.directory, self.vocabulary = Path(directory), list(vocabulary)

    def write(
        self,
        name: str,
        image_size: tuple[int, int],
        regions: Regions,
        *,
        stem: str | None = None,
        path: str | Path | None = None,
        image: np.ndarray | None = None,
    ) -> None:
        """Write an image's regions.

        Args:
            name: the image's path relative to the directory of all images, with "/" between directories.
            image_size: (height, width) in pixels.
            regions: of the image.
            stem: of the files, if it is not ``name`` without its suffix: "a.jpg" beside "a.png" need two.
            path: where the image is.
            image: (H, W, 3) uint8 RGB.
        """
        stem = output_stem(name) if stem is None else stem
        self._write(_Image(name, image_size, stem, path, image), regions)

    @abstractmethod
    def _write(self, image: _Image, regions: Regions) -> None:
        """Write an image's regions."""

    def __call__(self, record: Record, image: np.ndarray, regions: Regions) -> None:
        """Write an image of a run; ``image`` is (H, W, 3) uint8 RGB."""
        size = (image.shape[0], image.shape[1])
        self.write(record.name, size, regions, stem=record.stem, path=record.path, image=image)

    def finish(self) -> None:  # noqa: B027
        """Write what belongs to all images together, after the last one."""


class LabelmeWriter(RegionWriter):
    """Writes labelme's JSON: rectangles, or the masks' polygons. X-AnyLabeling reads it, with scores, too."""

    def __init__(self, directory: str | Path, vocabulary: Sequence[str], with_masks: bool = False) -> None:
        """
        Args:
            directory: where files are written.
            vocabulary: K class names.
            with_masks: write polygons. The parts of a mask that are apart are shapes of one ``group_id``; holes are
                filled.
        """
        super().__init__(directory, vocabulary)
        self.with_masks = with_masks

    def _write(self, image: _Image, regions: Regions) -> None:
        target = self.directory / f"{image.stem}.json"
        # labelme opens the image by this path, from the directory of the file
        place = PurePosixPath(image.name).name
        if image.path is not None:
            place = Path(os.path.relpath(Path(image.path).absolute(), target.parent.absolute())).as_posix()
        content: dict[str, Any] = {
            "version": "5.5.0",
            "flags": {},
            "shapes": [shape for index in range(len(regions.boxes)) for shape in self._shapes(regions, index)],
            "imagePath": place,
            "imageData": None,
            "imageHeight": image.size[0],
            "imageWidth": image.size[1],
        }
        write_json(target, content, indent=2)

    def _shapes(self, regions: Regions, index: int) -> Iterator[dict[str, Any]]:
        rles = getattr(regions, "rles", None) if self.with_masks else None
        polygons = rle_polygons(rles[index]) if rles is not None else []
        box = np.asarray(regions.boxes[index], np.float64)
        for points in [np.reshape(polygon, (-1, 2)) for polygon in polygons] or [box.reshape(2, 2)]:
            yield {
                "label": regions.class_names[index],
                "score": float(regions.scores[index]),
                "points": points.tolist(),
                "group_id": index if len(polygons) > 1 else None,
                "description": "",
                "shape_type": "polygon" if polygons else "rectangle",
                "flags": {},
                "mask": None,
            }


class YoloWriter(RegionWriter):
    """Writes YOLO's labels, "class cx cy width height" in parts of the image's sides, and ``data.yaml``.

    Labels are in the directory ``labels``; Ultralytics expects the images in ``images`` beside it. Unknown regions have
    no class, and are left out.
    """

    def __init__(self, directory: str | Path, vocabulary: Sequence[str], with_scores: bool = False) -> None:
        """
        Args:
            directory: where files are written.
            vocabulary: K class names.
            with_scores: add the score to each line, as Ultralytics' predictions have; its training refuses it.
        """
        super().__init__(directory, vocabulary)
        self.with_scores = with_scores

    def _write(self, image: _Image, regions: Regions) -> None:
        height, width = image.size
        boxes = np.asarray(regions.boxes, np.float64).reshape(-1, 4)
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2 / (width, height)
        sides = (boxes[:, 2:] - boxes[:, :2]) / (width, height)
        lines = []
        for index in np.flatnonzero(~np.asarray(regions.unknown, bool)).tolist():
            numbers = [*centers[index].tolist(), *sides[index].tolist()]
            numbers += [float(regions.scores[index])] if self.with_scores else []
            lines.append(" ".join([str(int(regions.classes[index])), *(f"{number:.9f}" for number in numbers)]) + "\n")
        with atomic_path(self.directory / "labels" / f"{image.stem}.txt") as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def finish(self) -> None:
        """Write ``data.yaml``, with the names of all classes."""
        content = {"path": ".", "train": "images", "val": "images", "names": dict(enumerate(self.vocabulary))}
        with atomic_path(self.directory / "data.yaml") as temporary:
            temporary.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False), encoding="utf-8")


class CropWriter(RegionWriter):
    """Writes the crop of each region to a directory of its class: "wooden spoon/a/cup-0003.png" for the fourth one."""

    def __init__(
        self, directory: str | Path, vocabulary: Sequence[str], margin: float = 0.0, suffix: str = ".png"
    ) -> None:
        """
        Args:
            directory: where files are written.
            vocabulary: K class names.
            margin: of the box's sides, on each side around the box.
            suffix: ".png", which is exact, or ".jpg".

        Raises:
            ValueError: another suffix, or a negative margin.
        """
        super().__init__(directory, vocabulary)
        if suffix not in (".png", ".jpg"):
            raise ValueError(f"suffix: expected .png or .jpg, got {suffix!r}")
        if margin < 0:
            raise ValueError(f"margin: expected at least 0, got {margin}")
        self.margin, self.suffix = margin, suffix

    def _write(self, image: _Image, regions: Regions) -> None:
        if image.pixels is None:
            raise ValueError(f"{image.name}: crops need the image")
        height, width = image.size
        for index, (box, label) in enumerate(zip(np.asarray(regions.boxes, np.float64), regions.class_names)):
            extra = self.margin * (box[2:] - box[:2])
            # at least one pixel, also of a box that is thinner
            x0, y0 = np.floor(box[:2] - extra).clip(0, (width - 1, height - 1)).astype(int).tolist()
            x1, y1 = np.ceil(box[2:] + extra).clip((x0 + 1, y0 + 1), (width, height)).astype(int).tolist()
            file = f"{image.stem}-{index:04}{self.suffix}"
            with atomic_path(self.directory / safe_file_name(label) / file) as temporary:
                kind = "PNG" if self.suffix == ".png" else "JPEG"
                Image.fromarray(image.pixels[y0:y1, x0:x1]).save(temporary, format=kind, quality=95)


def output_stem(name: str) -> str:
    """Return the name of an image's files without suffix: its own, in its own directories.

    Raises:
        ValueError: a name that leads out of the directory.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError(f"image {name!r}: expected a path relative to the directory of all images")
    return str(path.with_suffix("") if path.suffix else path)


def safe_file_name(name: str) -> str:
    """Return a class name as the name of a file or directory on any system; different names stay different."""
    safe = re.sub(r"[^\w .,()'&+-]", "_", name)[:80].strip(" .")
    # Windows has devices of such names
    if safe == name and name and not re.fullmatch(r"(?i)con|prn|aux|nul|com\d|lpt\d", name):
        return name
    return f"{safe}~{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
