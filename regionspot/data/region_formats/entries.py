"""Boxes of many images with their names, as a few arrays: what every format is read into."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

_MAX_SIDE = 1 << 30  # pixels


@dataclass(frozen=True)
class Entries:
    """The boxes of I images, N in all; those of image i are rows ``offsets[i]`` to ``offsets[i + 1]``.

    Attributes:
        names: I paths or names of images, as in the file; more than one for an image that has several.
        offsets: (I + 1,) int64.
        boxes: (N, 4) float64 XYXY, pixels of the original image, or parts of its sides if ``are_relative``.
        labels: (N,) int32 into ``label_names``, -1 for a box without; None if there are no labels.
        label_names: class names.
        scores: (N,) float32, NaN for a box without; None if there are no scores.
        sizes: (I, 2) int64 (height, width) in pixels, 0 if the file does not say.
        are_relative: whether boxes are parts of the image's width and height, in [0, 1].
        have_suffix: whether names have a suffix such as ".jpg", or are those of the images without it.
        are_ids: whether names are numbers, as of "139" for the file "000000000139.jpg".
    """

    names: Sequence[tuple[str, ...]]
    offsets: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray | None
    label_names: list[str]
    scores: np.ndarray | None
    sizes: np.ndarray
    are_relative: bool = False
    have_suffix: bool = True
    are_ids: bool = False


class EntriesBuilder:
    """Collects the boxes of images one by one."""

    def __init__(self, are_relative: bool = False, have_suffix: bool = True) -> None:
        self._names: list[tuple[str, ...]] = []
        self._ends, self._sizes = array("q", [0]), array("q")
        self._boxes, self._labels, self._scores = array("d"), array("i"), array("f")
        self._label_index: dict[str, int] = {}
        self._are_relative, self._have_suffix = are_relative, have_suffix

    def add(
        self,
        place: str,
        names: Sequence[str],
        boxes: ArrayLike,
        labels: Sequence[str | None] | None = None,
        scores: Sequence[float | None] | None = None,
        size: tuple[float, float] = (0, 0),
    ) -> None:
        """Add an image.

        Args:
            place: where it is in the file, the beginning of messages.
            names: what the image is called.
            boxes: (n, 4) XYXY.
            labels: of each box.
            scores: of each box.
            size: (height, width) in pixels.

        Raises:
            ValueError: a coordinate or a score that is NaN or infinite, or an impossible size.
        """
        if not all(0 <= side <= _MAX_SIDE for side in size):
            raise ValueError(f"{place}: expected height and width in pixels, got {size[0]:g} and {size[1]:g}")
        array_of_boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        own_scores = [float("nan") if score is None else score for score in scores or [None] * len(array_of_boxes)]
        is_finite = np.isfinite(array_of_boxes).all(axis=1)
        if not is_finite.all():
            index = int(is_finite.argmin())
            raise ValueError(f"{place}: box {index}: expected finite numbers, got {array_of_boxes[index].tolist()}")
        self._names.append(tuple(names))
        self._boxes.extend(array_of_boxes.ravel().tolist())
        self._ends.append(len(self._boxes) // 4)
        self._sizes.extend(map(int, size))
        self._scores.extend(own_scores)
        for label in labels or [None] * len(array_of_boxes):
            self._labels.append(-1 if label is None else self._label_index.setdefault(label, len(self._label_index)))

    def finish(self) -> Entries:
        """Return all images."""
        scores = np.array(self._scores, np.float32)
        return Entries(
            names=self._names,
            offsets=np.array(self._ends, np.int64),
            boxes=np.array(self._boxes, np.float64).reshape(-1, 4),
            labels=np.array(self._labels, np.int32) if self._label_index else None,
            label_names=list(self._label_index),
            scores=None if np.isnan(scores).all() else scores,
            sizes=np.array(self._sizes, np.int64).reshape(-1, 2),
            are_relative=self._are_relative,
            have_suffix=self._have_suffix,
        )


def box_around(points: Any) -> list[float]:
    """Return the box XYXY around (P, 2) points."""
    columns = np.asarray(points, np.float64).reshape(-1, 2)
    return [*columns.min(axis=0).tolist(), *columns.max(axis=0).tolist()]


def box_around_rotated(corners: Sequence[float], degrees: float, pivot: Sequence[float]) -> list[float]:
    """Return the box XYXY around a box XYXY that is rotated clockwise, as images are seen, about ``pivot``."""
    x0, y0, x1, y1 = corners
    if not degrees % 360:
        return [x0, y0, x1, y1]
    angle = np.deg2rad(degrees)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]) - pivot
    return box_around(points @ rotation.T + pivot)


def relative_name(path: Path, root: Path) -> str:
    """Return a file's path below a directory, with "/" between directories."""
    return path.relative_to(root).as_posix()


def names_beside(path: Path, root: Path, image: str) -> list[str]:
    """Return what the image of an annotation file beside it may be called, without the root directory.

    That is ``image``, as the file says, and the file's own name with the image's suffix: both files may have been
    renamed since.
    """
    own = path.with_suffix(Path(image).suffix)
    names = [Path(relative_name(path, root)).parent.as_posix() + f"/{image}"] if image else []
    return list(dict.fromkeys([*names, relative_name(own, root)]))
