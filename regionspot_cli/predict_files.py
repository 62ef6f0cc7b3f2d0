"""What a run of `regionspot predict` reads and writes: outputs never touch an input."""

import os
import re
from argparse import Namespace
from collections.abc import Collection, Sequence
from functools import cache
from itertools import chain
from pathlib import Path

from detectron2.data import MetadataCatalog

from regionspot.prediction.regions import label_directory
from regionspot.prediction.sources import RUN_FILES, SUMMARY, ImageList
from regionspot.utils.files import read_json

# The file of an image by format; "crops" has one for each region, crops/LABEL/STEM-0000.jpg.
_FILES = {"drawing": "{}.png", "json": "{}.json", "labelme": "labelme/{}.json", "yolo": "yolo/labels/{}.txt"}
_DIRECTORIES = ("labelme", "yolo", "crops")


def region_files(args: Namespace) -> list[str]:
    """Return the files and directories that the boxes come from."""
    texts = (text for text in (args.boxes, args.regions) if text not in (None, "", "gt", "sam", "detector"))
    return [path for path in map(label_directory, texts) if Path(path).exists()]


def input_files(args: Namespace, images: ImageList) -> list[str]:
    """Return all files and directories that a run reads beside its images."""
    texts = [*args.input, args.vocabulary or ""]
    annotations = MetadataCatalog.get(images.dataset).get("json_file") if images.dataset else None
    lists = [text.removeprefix("@") for text in texts if text.startswith("@")]
    return [*region_files(args), *lists, *([annotations] if annotations else [])]


def check_outputs(images: ImageList, others: Sequence[str], output: Path, formats: Collection[str]) -> set[str]:
    """Refuse outputs that would overwrite an input or be read as one.

    Args:
        images: of the run.
        others: files and directories that it reads, too.
        output: directory of its outputs.
        formats: of the outputs.

    Returns:
        The paths of inputs below ``output``, from there.

    Raises:
        ValueError: an output has the path of an input, or ``output`` is in a directory of regions.
    """
    root = os.path.realpath(output)
    for path in filter(os.path.isdir, others):
        if f"{root}/".startswith(f"{os.path.realpath(path)}/"):
            raise ValueError(
                f"--output {output}: it is in the directory of regions {path}, where outputs would overwrite them or "
                "be read as some; give another directory"
            )
    inputs = chain(others, (record.path for record in images))
    real_directory = cache(os.path.realpath)  # a million images have few
    paths = (os.path.join(real_directory(os.path.dirname(x)), os.path.basename(x)) for x in inputs)  # noqa: PTH118, PTH119, PTH120
    inside = {path[len(root) + 1 :] for path in paths if path.startswith(f"{root}/")}
    if inside:
        written = {SUMMARY, *(RUN_FILES[name] for name in formats if name in RUN_FILES)}
        patterns = [pattern for name, pattern in _FILES.items() if name in formats]
        written |= {pattern.format(record.stem) for record in images for pattern in patterns}
        directories = {name for name in _DIRECTORIES if name in formats}
        for path in sorted(inside):
            if path in written or path.split("/")[0] in directories:
                raise ValueError(
                    f"--output {output}: an output would overwrite the input {root}/{path}; give another directory"
                )
    return inside


def written_files(output: Path, formats: Collection[str], stems: Collection[str]) -> list[str]:
    """Return the files of a run that are there, from ``output`` on.

    Args:
        output: directory of its outputs.
        formats: of its images' files.
        stems: of its images.
    """
    names = [pattern.format(stem) for name, pattern in _FILES.items() if name in formats for stem in stems]
    if "crops" in formats:
        known = set(stems)
        for path in (output / "crops").glob("*/**/*"):
            file = path.relative_to(output / "crops").as_posix()
            match = re.fullmatch(r"[^/]+/(.+)-[0-9]{4,}\.\w+", file)
            if match and match[1] in known:
                names.append(f"crops/{file}")
    summary = read_json(output / SUMMARY, "summary") if (output / SUMMARY).is_file() else {}
    names += [name for name in RUN_FILES.values() if name in summary.get("files", ())]
    return [name for name in names if ".." not in Path(name).parts and (output / name).is_file()]
