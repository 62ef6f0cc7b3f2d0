"""Makes COCO JSON of OpenImages v6's boxes.

Worker processes import this module to read image headers, so regionspot (and torch with it) is imported in functions.
"""

import csv
import multiprocessing
import resource
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pandas as pd  # the lightest of the fast CSV readers (11 MB); it works with the pinned NumPy
from PIL import Image
from tqdm import tqdm

# split: (annotations, directory of the images)
SPLITS = {
    "train": ("oidv6-train-annotations-bbox.csv", "train"),
    "val": ("validation-annotations-bbox.csv", "validation"),
}
SIDES = ["XMin", "XMax", "YMin", "YMax"]
CHUNK = 1 << 16  # entries that are encoded at a time
MISSING, DAMAGED = (0, 0), (-1, -1)
ORIENTATION = 0x0112  # EXIF


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    width: int
    height: int


class _Annotation(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int


def read_classes(path: Path) -> dict[str, str]:
    """Return LabelName -> name in the file's order, which is that of the category ids 1, 2, ..."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row and row[0] != "LabelName"]
    invalid = next((row for row in rows if len(row) != 2), None)
    classes = {row[0]: row[1] for row in rows if len(row) == 2}
    if invalid or not rows or len(classes) < len(rows):
        raise ValueError(
            f"{path}: expected lines 'LabelName,name', each LabelName once; got {invalid or len(rows)} rows"
        )
    return classes


def read_boxes(path: Path, classes: dict[str, str]) -> pd.DataFrame:
    """Return the boxes with ``ImageID`` and ``LabelName`` as categories, and sides as fractions of the image."""
    types: dict[str, Any] = {"ImageID": "category", "LabelName": "category", "IsGroupOf": "int8"}
    try:
        boxes = pd.read_csv(
            path, usecols=[*types, *SIDES], dtype={**types, **dict.fromkeys(SIDES, "float64")}, keep_default_na=False
        )
    except ValueError as error:
        raise ValueError(f"{path}: expected OpenImages' columns {', '.join([*types, *SIDES])}; {error}") from error
    unknown = sorted(set(boxes["LabelName"].cat.categories) - set(classes))
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} label names are not in class-descriptions-boxable.csv ({', '.join(unknown[:5])}); "
            "take both files from the same release"
        )
    sides = boxes[SIDES].to_numpy()
    # Some official boxes extend a little beyond their image; they are clipped when they are written.
    is_invalid = ~((sides >= -0.1) & (sides <= 1.1)).all(axis=1)
    if is_invalid.any():
        row = int(is_invalid.argmax())
        raise ValueError(f"{path}: line {row + 2}: expected sides as fractions of the image, got {sides[row].tolist()}")
    return boxes


def read_header(path: str) -> tuple[int, int]:
    """Return (width, height) of an image as displayed, i.e. rotated by its EXIF tag, or MISSING, or DAMAGED."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            try:
                is_rotated = image.getexif().get(ORIENTATION, 1) in range(5, 9)
            except Exception:  # malformed EXIF: not rotated, as in regionspot.utils.images
                is_rotated = False
            return (height, width) if is_rotated else (width, height)
    except FileNotFoundError:
        return MISSING
    except Exception:  # damaged bytes make a decoder raise anything
        return DAMAGED


def read_sizes(directory: Path, names: np.ndarray, cache: Path, workers: int = 1, interval: float = 30.0) -> np.ndarray:
    """Return the images' sizes; those that ``cache`` has are not read again.

    Args:
        directory: of the images.
        names: (I,) image ids, sorted.
        cache: written regularly, and at the end, also after an error or Ctrl-C.
        workers: processes.
        interval: seconds between writes of ``cache``.

    Returns:
        (I, 2) int32 width and height; not positive where the image is missing or damaged.
    """
    sizes = np.zeros((len(names), 2), np.int32)
    if cache.is_file():
        # names as bytes: NumPy's unicode takes four bytes for each character
        with np.load(cache) as stored:
            _, rows, stored_rows = np.intersect1d(names.astype("S"), stored["names"], return_indices=True)
            sizes[rows] = stored["sizes"][stored_rows]
    unread = np.flatnonzero(sizes[:, 0] == 0)
    if not len(unread):
        return sizes
    last = time.monotonic()
    try:
        headers = _headers([str(directory / f"{names[index]}.jpg") for index in unread], workers)
        for index, size in zip(unread, tqdm(headers, total=len(unread), desc=f"image sizes of {directory.name}")):
            sizes[index] = size
            if time.monotonic() - last > interval:
                write_sizes(cache, names, sizes)
                last = time.monotonic()
    finally:
        write_sizes(cache, names, sizes)
    return sizes


def _headers(paths: list[str], workers: int) -> Iterator[tuple[int, int]]:
    if workers <= 1:
        yield from map(read_header, paths)
        return
    # spawn: forking after threads were started may deadlock. Ctrl-C is for the parent, which saves and ends the pool.
    with multiprocessing.get_context("spawn").Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        yield from pool.imap(read_header, paths, chunksize=64)


def write_sizes(cache: Path, names: np.ndarray, sizes: np.ndarray) -> None:
    """Write the sizes that are known to a file that appears whole or not at all."""
    from regionspot.utils.files import atomic_path

    known = sizes[:, 0] > 0
    with atomic_path(cache) as temporary, temporary.open("wb") as file:
        np.savez(file, names=names[known].astype("S"), sizes=sizes[known])


def convert(directory: Path, split: str, workers: int = 1, skip_missing: bool = False) -> Path:
    """Convert a split below ``directory``; return the file, which was read again and has as many images and boxes.

    Image ids are 1, 2, ... in the order of all ImageIDs of the CSV, whether or not some are skipped.

    Raises:
        FileNotFoundError: no such CSV, or images are missing or damaged.
        ValueError: a CSV of another format.
    """
    annotations, images = SPLITS[split]
    for path in (directory / annotations, directory / "class-descriptions-boxable.csv"):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; it is one of OpenImages' downloads")
    classes = read_classes(directory / "class-descriptions-boxable.csv")
    boxes = read_boxes(directory / annotations, classes)
    # Ids follow the sorted names, whatever the order in which pandas lists its categories.
    order = np.argsort(boxes["ImageID"].cat.categories.to_numpy(str))
    names = boxes["ImageID"].cat.categories.to_numpy(str)[order]
    rows = np.argsort(order)[boxes["ImageID"].cat.codes.to_numpy()]  # (M,) into names
    sizes = read_sizes(directory / images, names, directory / f"image_sizes_{images}.npz", workers)
    absent = np.flatnonzero(sizes[:, 0] <= 0)
    if len(absent):
        message = (
            f"{len(absent)} of {len(names)} images are missing or damaged below {directory / images}: "
            + ", ".join(f"{names[index]}.jpg" + (" (damaged)" if sizes[index, 0] < 0 else "") for index in absent[:5])
        )
        if not skip_missing:
            raise FileNotFoundError(f"{message}; download them, or leave them out with --skip-missing")
        print(f"{message}; left out")
        boxes = boxes[sizes[rows, 0] > 0]
        rows = rows[sizes[rows, 0] > 0]
    path = directory / f"openimages_v6_{split}.json"
    _write(path, directory / images, classes, names, sizes, boxes, rows)
    return path


def _write(
    path: Path,
    images: Path,
    classes: dict[str, str],
    names: np.ndarray,
    sizes: np.ndarray,
    boxes: pd.DataFrame,
    rows: np.ndarray,
) -> None:
    from regionspot.data.datasets import JsonDataset
    from regionspot.utils.files import atomic_path

    label_ids = {label: index for index, label in enumerate(classes, 1)}
    category_ids = np.array([label_ids[label] for label in boxes["LabelName"].cat.categories])
    readable = np.flatnonzero(sizes[:, 0] > 0)
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            info = {"description": "OpenImages v6, boxes", "categories": "in the order of class-descriptions-boxable"}
            categories = [{"id": index, "name": name} for index, name in enumerate(classes.values(), 1)]
            file.write(b'{"info":%b,"licenses":[],' % msgspec.json.encode(info))
            file.write(b'"categories":%b,"images":[' % msgspec.json.encode(categories))
            _write_chunks(file, "images", len(readable), lambda part: _images(names, sizes, readable[part]))
            file.write(b'],"annotations":[')
            _write_chunks(file, "boxes", len(rows), lambda part: _annotations(part, boxes, rows, sizes, category_ids))
            file.write(b"]}")
        dataset = JsonDataset(temporary, images)
        result, expected = (
            (len(dataset), len(dataset.boxes), len(dataset.class_names)),
            (len(readable), len(rows), len(classes)),
        )
        if result != expected:
            raise ValueError(f"{path}: read again it has {result} images, boxes and classes; expected {expected}")
    print(
        f"{path}: {len(dataset):,} images, {len(dataset.boxes):,} boxes ({dataset.num_crowd:,} of groups, "
        f"{dataset.num_degenerate:,} without area), {len(dataset.class_names)} classes"
    )


def _parts(num_entries: int, title: str) -> Iterator[slice]:
    """Yield slices of ``CHUNK`` entries under a progress bar."""
    with tqdm(total=num_entries, desc=title, unit="", unit_scale=True) as bar:
        for start in range(0, num_entries, CHUNK):
            part = slice(start, min(start + CHUNK, num_entries))
            yield part
            bar.update(part.stop - part.start)


def _write_chunks(file: BinaryIO, title: str, num_entries: int, make: Callable[[slice], list[Any]]) -> None:
    encoder = msgspec.json.Encoder()
    for part in _parts(num_entries, f"writing {title}"):
        file.write(b"," * (part.start > 0) + encoder.encode(make(part))[1:-1])


def _images(names: np.ndarray, sizes: np.ndarray, indices: np.ndarray) -> list[_Image]:
    columns = zip((indices + 1).tolist(), names[indices].tolist(), sizes[indices].tolist())
    return [_Image(image_id, f"{name}.jpg", width, height) for image_id, name, (width, height) in columns]


def _annotations(
    part: slice, boxes: pd.DataFrame, rows: np.ndarray, sizes: np.ndarray, category_ids: np.ndarray
) -> list[_Annotation]:
    chunk, chunk_rows = boxes.iloc[part], rows[part]
    sides = chunk[SIDES].to_numpy().clip(0, 1) * sizes[chunk_rows][:, [0, 0, 1, 1]]  # x0, x1, y0, y1 in pixels
    xywh = np.stack([sides[:, 0], sides[:, 2], sides[:, 1] - sides[:, 0], sides[:, 3] - sides[:, 2]], axis=1).round(3)
    columns = zip(
        range(part.start + 1, part.stop + 1),
        (chunk_rows + 1).tolist(),
        category_ids[chunk["LabelName"].cat.codes.to_numpy()].tolist(),
        xywh.tolist(),
        (xywh[:, 2] * xywh[:, 3]).round(3).tolist(),
        (chunk["IsGroupOf"].to_numpy() == 1).astype(int).tolist(),  # -1 is "not known"
    )
    return [_Annotation(*values) for values in columns]


def benchmark(num_boxes: int) -> None:
    """Print time and memory of converting ``num_boxes`` generated boxes, without the reading of headers."""
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root, "openimages")
        directory.mkdir()
        generate(directory, num_boxes)
        start = time.perf_counter()
        subprocess.run([sys.executable, sys.argv[0], "--root", root, "--splits", "train"], check=True)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"{num_boxes:,} boxes: {seconds:.0f} s, peak {peak:.1f} GiB")


def generate(directory: Path, num_boxes: int) -> None:
    """Write a training CSV of OpenImages' shape (8.4 boxes an image, 601 classes) and the sizes of its images."""
    generator = np.random.default_rng(0)
    images = max(1, round(num_boxes / 8.4))
    names = np.array([f"{index:016x}" for index in range(images)])
    write_sizes(directory / "image_sizes_train.npz", names, generator.integers(300, 1025, (images, 2), dtype=np.int32))
    lines = "".join(f"/m/{index:05x},Class {index}\n" for index in range(601))
    (directory / "class-descriptions-boxable.csv").write_text(lines)
    rows = np.concatenate([np.arange(images), generator.integers(0, images, num_boxes - images)])  # none without a box
    rows.sort()
    with (directory / SPLITS["train"][0]).open("w") as file:
        file.write("ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,")
        file.write("IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n")
        for part in _parts(num_boxes, "generating boxes"):
            chunk = rows[part]
            low = generator.random((len(chunk), 2)) * 0.8
            high = low + generator.random((len(chunk), 2)) * 0.2
            labels, groups = generator.integers(0, 601, len(chunk)), generator.random(len(chunk)) < 0.05
            columns = zip(chunk.tolist(), labels.tolist(), low.tolist(), high.tolist(), groups.tolist())
            file.writelines(
                f"{row:016x},xclick,/m/{label:05x},1,{x0:.6f},{x1:.6f},{y0:.6f},{y1:.6f},0,0,{int(group)},0,0\n"
                for row, label, (x0, y0), (x1, y1), group in columns
            )


def main(args: Namespace) -> None:
    if args.benchmark:
        benchmark(args.benchmark)
        return
    for split in args.splits:
        convert(args.root / "openimages", split, args.workers, args.skip_missing)
