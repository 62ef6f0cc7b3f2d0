"""Which images are to be recognized: files, directories, patterns, lists, videos and data sets."""

import glob
import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from regionspot.data.build import check_registered
from regionspot.data.datasets import register_from_spec
from regionspot.data.training_set import image_ids
from regionspot.prediction.videos import VIDEO_SUFFIXES, count_frames
from regionspot.utils.images import FORMATS

SUMMARY = "predict_summary.json"  # of a run
# By format: what is made of all images of a run.
RUN_FILES = {
    "results": "results.json",
    "coco": "annotations.json",
    "csv": "regions.csv",
    "parquet": "regions.parquet",
}
# An image "results.jpg" becomes "results.jpg.json".
RUN_STEMS = {PurePosixPath(name).stem for name in (*RUN_FILES.values(), SUMMARY)}


@dataclass(frozen=True)
class ImageRecord:
    """An image to recognize.

    Attributes:
        index: its position in the list.
        name: relative to the directory that was given, unique, with "/" between directories: "sub/cup.jpg", or
            "clip.mp4#000120" for frame 120 of a video.
        path: the file.
        frame: number of the video's frame, from 0; -1 for an image.
        image_id: of the data set, else the position in the list from 1.
        stem: name of its outputs, without a suffix and unique.
    """

    index: int
    name: str
    path: str
    frame: int
    image_id: int
    stem: str


class ImageList(Sequence):
    """A list of images that stays small: a million of them take about 0.2 GB.

    Attributes:
        dataset: name of the data set that all images are of; "" without.
        skipped: (path, reason) of videos and directories that cannot be read.
    """

    def __init__(self) -> None:
        self.dataset = ""
        self.skipped: list[tuple[str, str]] = []
        self._roots: list[str] = []
        self._names: list[str] = []  # relative to the roots
        self._root_of = array("l")
        self._frames = array("l")
        self._ids: Sequence[int] | np.ndarray | None = None
        self._renamed: dict[int, str] = {}
        self._with_suffix: set[str] = set()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> ImageRecord:  # type: ignore[override]
        index = range(len(self))[index]
        frame, path = self._frames[index], str(Path(self._roots[self._root_of[index]], self._names[index]))
        name = self._name(index)
        image_id = index + 1 if self._ids is None else int(self._ids[index])
        return ImageRecord(index, name, path, frame, image_id, self._stem(name, frame))

    def __iter__(self) -> Iterator[ImageRecord]:
        return (self[index] for index in range(len(self)))

    def add(self, root: str, name: str, frame: int = -1) -> None:
        """Append an image of a root directory; ``name`` is its path from there."""
        if not self._roots or self._roots[-1] != root:
            self._roots.append(root)
        self._names.append(name)
        self._root_of.append(len(self._roots) - 1)
        self._frames.append(frame)

    def finish(self, ids: Sequence[int] | np.ndarray | None = None) -> None:
        """Make names and stems unique, after the last image; ``ids`` are those of a data set."""
        self._ids = ids
        names: set[str] = set()
        last_number: dict[str, int] = {}
        for index in range(len(self)):
            name = original = self._name(index)
            while name in names:  # the same file twice, or files of one name in two directories
                last_number[original] = last_number.get(original, 1) + 1
                name = self._renamed[index] = _numbered(original, last_number[original])
            names.add(name)
        stems = Counter(self._stem(self._name(index), self._frames[index]) for index in range(len(self)))
        self._with_suffix = {stem for stem, count in stems.items() if count > 1} | RUN_STEMS
        # "a.jpg" beside "a.png" are "a.jpg.json" and "a.png.json", and "a.jpg.gif" must not become the former
        taken = {name for name in names if _without_suffix(name) in self._with_suffix}
        self._with_suffix |= taken & stems.keys()

    def fingerprint(self) -> str:
        """Return a hash of all names, paths and ids, the same for the same list."""
        digest = hashlib.sha256()
        for index, name in enumerate(self._names):
            image_id = "" if self._ids is None else int(self._ids[index])
            line = (self._name(index), self._roots[self._root_of[index]], name, self._frames[index], image_id)
            digest.update(repr(line).encode())
        return digest.hexdigest()[:16]

    def _name(self, index: int) -> str:
        if index in self._renamed:
            return self._renamed[index]
        name, frame = _safe_name(self._names[index]), self._frames[index]
        return name if frame < 0 else f"{name}#{frame:06}"

    def _stem(self, name: str, frame: int) -> str:
        if frame >= 0:  # "clip.mp4#000120"
            return name
        stem = _without_suffix(name)
        return name if stem in self._with_suffix else stem


def list_images(inputs: Sequence[str], video_step: int = 1, exclude: str | Path = "") -> ImageList:
    """List images, sorted within each input, without opening any.

    Args:
        inputs: each a file, a directory (its images, in all directories below), a pattern such as ``photos/**/*.jpg``,
            a video, ``@list.txt`` (one path a line), a registered data set, or ``annotations.json:directory``.
        video_step: every which frame of a video is taken.
        exclude: a directory that is not searched, where the outputs go.

    Raises:
        FileNotFoundError: no such file, no match, or nothing to read.
        ValueError: a data set among other inputs, or an invalid step.
    """
    if video_step < 1:
        raise ValueError(f"--video-step: expected at least 1, got {video_step}")
    images, outputs = ImageList(), os.path.realpath(exclude) if exclude else ""
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            for name in _walk(text, outputs, images.skipped):
                images.add(text, name)
        elif path.is_file() and not path.name.endswith(".json"):
            _add_file(images, str(path.parent), path.name, video_step)
        elif text.startswith("@"):
            _add_list(images, Path(text[1:]), video_step)
        elif text in DatasetCatalog or register_from_spec(text):
            if len(inputs) > 1:
                raise ValueError(f"--input {text}: a data set is an input of its own, without others")
            return _list_dataset(text)
        else:
            _add_matches(images, text, video_step, outputs)
    if not len(images) and not images.skipped:
        raise FileNotFoundError(f"--input {' '.join(inputs)[:100]}: no images of {', '.join(FORMATS)}")
    images.finish()
    return images


@cache
def _suffixes() -> frozenset[str]:
    Image.init()
    return frozenset(suffix for suffix, kind in Image.EXTENSION.items() if kind in FORMATS)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in _suffixes()  # noqa: PTH122 - pathlib takes minutes for a million names


def _is_video(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES  # noqa: PTH122


def _walk(
    directory: str, outputs: str, skipped: list[tuple[str, str]], prefix: str = "", seen: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Yield the names of all images below a directory, sorted; links to directories are followed once.

    Directories that cannot be read are appended to ``skipped``, with the reason.
    """
    real = os.path.realpath(directory)
    if real in seen or real == outputs:
        return
    try:
        with os.scandir(directory) as entries:
            ordered = sorted((entry.name, _is_directory(entry)) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        skipped.append((directory, f"directory {directory} cannot be read: {error.strerror or error}"))
        return
    for name, is_directory in ordered:
        if is_directory:
            path = os.path.join(directory, name)  # noqa: PTH118
            yield from _walk(path, outputs, skipped, f"{prefix}{name}/", seen | {real})
        elif _is_image(name):
            yield prefix + name


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _add_file(images: ImageList, root: str, name: str, video_step: int) -> None:
    if not _is_video(name):
        images.add(root, name)
        return
    path = str(Path(root, name))
    try:
        num_frames, damage = count_frames(path)
    except OSError as error:
        images.skipped.append((path, str(error)))
        return
    if damage:
        images.skipped.append((path, f"video {path} is damaged after frame {num_frames - 1}: {damage}"))
    for frame in range(0, num_frames, video_step):
        images.add(root, name, frame)


def _add_list(images: ImageList, path: Path, video_step: int) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"--input @{path}: no such file; expected one path a line")
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    paths = [line.strip() for line in lines if line.strip()]
    if not paths:
        raise ValueError(f"--input @{path}: no paths; expected one a line")
    absolute = [os.path.abspath(line) for line in paths]  # noqa: PTH100 - resolve() would open directories
    root = os.path.commonpath({os.path.dirname(line) for line in absolute})  # noqa: PTH120
    for line in absolute:
        _add_file(images, root, line[len(root) :].lstrip(os.sep), video_step)


def _add_matches(images: ImageList, pattern: str, video_step: int, outputs: str) -> None:
    if not glob.has_magic(pattern):
        kind = "an annotation file names its images, annotations.json:directory" if ".json" in pattern else ""
        raise FileNotFoundError(
            f"--input {pattern}: no such file; "
            + (kind or "expected files, directories, patterns, @list.txt, or a data set")
        )
    fixed = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    root, before = str(Path(*fixed)), len(images)
    for match in sorted(glob.glob(pattern, recursive=True)):  # noqa: PTH207 - Path.glob takes no absolute patterns
        is_readable = _is_image(match) or _is_video(match)
        is_output = outputs and f"{os.path.realpath(match)}/".startswith(f"{outputs}/")
        if is_readable and not is_output and Path(match).is_file():
            _add_file(images, root, os.path.relpath(match, root), video_step)
    if len(images) == before and not images.skipped:
        raise FileNotFoundError(f"--input {pattern}: no image or video matches")


def _list_dataset(name: str) -> ImageList:
    check_registered([name], "--input")
    records, images = DatasetCatalog.get(name), ImageList()
    root = MetadataCatalog.get(name).get("image_root") or ""
    has_names = hasattr(records, "file_name")  # a JsonDataset, whose annotations are made when they are read
    for index in range(len(records)):
        path = records.file_name(index) if has_names else records[index]["file_name"]
        images.add(root, os.path.relpath(path, root) if root and path.startswith(root) else path)
    images.dataset = name
    images.finish(image_ids(records))
    return images


def _safe_name(name: str) -> str:
    """Return a name that stays inside the directory of outputs."""
    name = name.replace(os.sep, "/")
    if name[0] not in "./" and "/." not in name and "//" not in name:
        return name
    return "/".join(part for part in name.split("/") if part not in ("", "..", "."))


def _without_suffix(name: str) -> str:
    return os.path.splitext(name)[0]  # noqa: PTH122


def _numbered(name: str, number: int) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(f"{path.stem}~{number}{path.suffix}"))
