"""The regions of images by the images' names."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regionspot.data.region_formats.entries import Entries


@dataclass(frozen=True)
class ImageBoxes:
    """The boxes of an image.

    Attributes:
        boxes: (N, 4) float32 XYXY, original pixels, inside the image, with area.
        labels: N class names, "" for a box without; None if the file has no labels.
        scores: (N,) float32, NaN for a box without; None if the file has no scores.
        has_entry: whether the file knows the image.
    """

    boxes: np.ndarray
    labels: list[str] | None = None
    scores: np.ndarray | None = None
    has_entry: bool = True

    def __len__(self) -> int:
        return len(self.boxes)


class RegionFile:
    """The boxes of a file or directory, by image.

    An image is found by its path, as far as the file knows it: of the entries with its file name, the one whose
    directories agree with the image's, from the last one on. So "photos/a/cup.jpg" has the boxes of "a/cup.jpg"
    rather than of "b/cup.jpg", and of "cup.jpg" if this is the only such entry.

    Attributes:
        path: the file or directory.
        format: its format, see ``read_regions``.
        missing: images that were asked for and have no entry, in the order of asking.
        num_dropped: boxes of images that were asked for that have no area inside them.
    """

    def __init__(self, path: Path, format: str, entries: Entries, is_for_all: bool = False) -> None:
        """
        Args:
            path: the file or directory, for messages.
            format: its name.
            entries: of all images.
            is_for_all: the only entry is of every image.
        """
        self.path, self.format, self._entries, self._is_for_all = path, format, entries, is_for_all
        self.missing: list[str] = []
        self.num_dropped = 0
        self._by_file_name: dict[str, list[tuple[int, tuple[str, ...]]]] = defaultdict(list)
        for index, names in enumerate(entries.names):
            for name in names:
                parts = _split(name)
                self._by_file_name[parts[-1]].append((index, parts))

    def __len__(self) -> int:
        """Number of images with an entry."""
        return len(self._entries.names)

    def find(self, image: str | Path) -> int | None:
        """Return the index of an image's entry, None if there is none.

        Raises:
            ValueError: several entries fit.
        """
        if self._is_for_all:
            return 0
        parts = _split(str(image))
        if not self._entries.have_suffix:
            parts = (*parts[:-1], _stem(parts[-1]))
        if self._entries.are_ids:  # COCO's and LVIS's files are called by their ids
            parts = (str(int(parts[-1])) if re.fullmatch(r"[0-9]{1,18}", parts[-1]) else "",)
        candidates = self._by_file_name.get(parts[-1])
        if candidates is None and self._entries.have_suffix:  # a file may call its image without a suffix
            parts = (*parts[:-1], _stem(parts[-1]))
            candidates = self._by_file_name.get(parts[-1])
        if candidates is None:
            return None
        agreement = [_count_common(own, parts) for _, own in candidates]
        best = [candidate for candidate, length in zip(candidates, agreement) if length == max(agreement)]
        exact = [candidate for candidate in best if candidate[1] == parts]
        indices = {index for index, _ in exact or best}
        if len(indices) > 1:
            names = ", ".join(sorted("/".join(own) for _, own in best)[:3])
            raise ValueError(
                f"regions {self.path}: {image}: expected one entry of this name, got {len(indices)}: {names}; give the "
                "images by the directory that the names of the file begin in"
            )
        return indices.pop()

    def check_names(self, images: Iterable[str | Path]) -> list[str]:
        """Return which of the images have no entry, before any of them is read.

        Raises:
            ValueError: several entries fit an image, or an entry several images.
        """
        image_of: dict[int, str] = {}
        without = []
        for image in map(str, images):
            if (index := self.find(image)) is None:
                without.append(image)
            elif (other := image_of.setdefault(index, image)) != image and not self._is_for_all:
                name = self._entries.names[index][0]
                raise ValueError(
                    f"regions {self.path}: the entry {name} fits {other} and {image}; expected images whose names, or "
                    "whose directories in the file, differ"
                )
        return without

    def regions_of(self, image: str | Path, image_size: tuple[int, int]) -> ImageBoxes:
        """Return the boxes of an image, clipped to it; those without area are dropped, and counted.

        Args:
            image: its path or name.
            image_size: (height, width) in pixels.

        Raises:
            ValueError: several entries fit, or the file's boxes are of an image of another size.
        """
        index = self.find(image)
        if index is None:
            self.missing.append(str(image))
            return ImageBoxes(np.zeros((0, 4), np.float32), has_entry=False)
        entries, (height, width) = self._entries, image_size
        expected = tuple(entries.sizes[index].tolist())
        if 0 not in expected and not entries.are_relative and expected != (height, width):
            raise ValueError(
                f"regions {self.path}: {image}: expected an image of {expected[1]} x {expected[0]} pixels, for which "
                f"the boxes were made, got {width} x {height}"
            )
        rows = slice(int(entries.offsets[index]), int(entries.offsets[index + 1]))
        limits = np.array([width, height, width, height])
        boxes = entries.boxes[rows] * limits if entries.are_relative else entries.boxes[rows]
        corners = boxes.reshape(-1, 2, 2)
        ordered = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)  # drawn from any corner
        clipped = ordered.clip(0, limits).astype(np.float32) + np.float32(0)  # no -0.0
        keep = (clipped[:, 2:] > clipped[:, :2]).all(axis=1)
        self.num_dropped += int((~keep).sum())
        labels = None
        if entries.labels is not None:
            labels = [entries.label_names[label] if label >= 0 else "" for label in entries.labels[rows][keep].tolist()]
        return ImageBoxes(clipped[keep], labels, None if entries.scores is None else entries.scores[rows][keep])


def _split(name: str) -> tuple[str, ...]:
    """Return the parts of a path, without "." and ".."; Windows' paths have backslashes."""
    parts: list[str] = []
    for part in name.replace("\\", "/").split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return tuple(parts) or ("",)


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


def _count_common(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """Return how many parts at the end of two paths are equal."""
    count = 0
    for one, other in zip(reversed(first), reversed(second)):
        if one != other:
            break
        count += 1
    return count
