"""Registering annotation files with Detectron2's catalogs."""

from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from regionspot.data.datasets.json_dataset import load_json_dataset
from regionspot.utils.files import expand_user

SPEC_FORMAT = "expected 'annotations.json:directory_of_images', such as 'my.json:my_images'"


def register_json_dataset(
    name: str,
    json_file: str | Path,
    image_root: str | Path,
    evaluator_type: str | None = None,
    *,
    keep_parts: int | None = None,
) -> None:
    """Register annotations in COCO or LVIS format; the file is read when the data set is first used.

    Args:
        name: for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        json_file: the annotations.
        image_root: directory that ``file_name`` (or the end of ``coco_url``) is relative to.
        evaluator_type: "lvis" or "coco"; by default LVIS if categories have ``frequency`` and images
            ``neg_category_ids``, else COCO, which is known after the file was read.
        keep_parts: how many parts of each ``file_name`` to keep, from its end: 2 makes "patch8/a.jpg" of
            "images/v1/patch8/a.jpg". None keeps all.

    Raises:
        ValueError: another evaluator, or ``keep_parts`` below 1.
    """
    if evaluator_type not in ("lvis", "coco", None):
        raise ValueError(f"data set {name!r}: expected evaluator_type 'lvis', 'coco' or None, got {evaluator_type!r}")
    if keep_parts is not None and keep_parts < 1:
        raise ValueError(f"data set {name!r}: expected keep_parts of at least 1, or None, got {keep_parts}")
    DatasetCatalog.register(name, lambda: load_json_dataset(name, json_file, image_root, keep_parts=keep_parts))
    metadata = MetadataCatalog.get(name).set(json_file=str(json_file), image_root=str(image_root))
    if evaluator_type is not None:
        metadata.set(evaluator_type=evaluator_type)


def register_from_spec(name: str) -> bool:
    """Register a name of the form "path/to/my.json:path/to/images"; return whether ``name`` has this form.

    Raises:
        FileNotFoundError: no such file or directory.
        ValueError: a JSON file without a directory of images.
    """
    # From the right: an absolute path of Windows, and a directory, may have colons, too.
    json_file, separator, image_root = name.rpartition(".json:")
    if not separator:
        if name.endswith(".json") and name not in DatasetCatalog:
            raise ValueError(f"data set {name!r} names no images: {SPEC_FORMAT}")
        return False
    if name in DatasetCatalog:
        return True
    path, directory = (expand_user(text) for text in (f"{json_file}.json", image_root))
    if not path.is_file():
        raise FileNotFoundError(f"data set {name!r}: annotations {path}: no such file; {SPEC_FORMAT}")
    if not image_root or not directory.is_dir():
        raise FileNotFoundError(f"data set {name!r}: images {image_root!r}: no such directory; {SPEC_FORMAT}")
    register_json_dataset(name, path.absolute(), directory.absolute())
    return True
