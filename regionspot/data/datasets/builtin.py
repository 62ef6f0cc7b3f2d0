"""The data sets that are registered at import; nothing is read until one is used."""

import os
from pathlib import Path

from detectron2.data import DatasetCatalog

from regionspot.data.datasets.registration import register_json_dataset
from regionspot.utils.files import expand_user

SPLITS = ("train", "val", "test")

# name: (annotations, images, evaluator, parts of file_name to keep), below the root; {} is each of the splits.
_TRAIN_AND_VAL: dict[str, tuple[str, str, str, int | None]] = {
    "objects365_v1_{}": ("objects365/objects365_{}.json", "objects365/{}", "coco", None),
    # File names in the annotations are "images/v1/patch8/<name>"; on the disk patch8 is in the split's directory.
    "objects365_v2_{}": ("objects365_v2/zhiyuan_objv2_{}.json", "objects365_v2/{}", "coco", 2),
    "v3det_{}": ("v3det/v3det_2023_v1_{}.json", "v3det", "coco", None),
}
_SINGLE: dict[str, tuple[str, str, str, int | None]] = {
    "openimages_v6_train": ("openimages/openimages_v6_train.json", "openimages/train", "coco", None),
    "openimages_v6_val": ("openimages/openimages_v6_val.json", "openimages/validation", "coco", None),
    "lvis_v1_minival": ("lvis/lvis_v1_minival.json", "coco", "lvis", None),
    "miniworld_train": ("miniworld/train.json", "miniworld", "lvis", None),
    "miniworld_val": ("miniworld/val.json", "miniworld", "lvis", None),
    "miniworld_test": ("miniworld/test.json", "miniworld", "lvis", None),
}

# The directory of each ODinW set; {} is "train", "valid" or "test", unless _ODINW_DIRECTORIES has another name.
_ODINW = {
    "AerialMaritimeDrone": "AerialMaritimeDrone/large/{}",
    "Aquarium": "Aquarium/Aquarium Combined.v2-raw-1024.coco/{}",
    "CottontailRabbits": "CottontailRabbits/{}",
    "EgoHands": "EgoHands/generic/{}",
    "NorthAmericaMushrooms": "NorthAmericaMushrooms/North American Mushrooms.v1-416x416.coco/{}",
    "Packages": "Packages/Raw/{}",
    "PascalVOC": "PascalVOC/{}",
    "Raccoon": "Raccoon/Raccoon.v2-raw.coco/{}",
    "ShellfishOpenImages": "ShellfishOpenImages/raw/{}",
    "VehiclesOpenImages": "VehiclesOpenImages/416x416/{}",
    "pistols": "pistols/export",
    "pothole": "pothole/{}",
    "thermalDogsAndPeople": "thermalDogsAndPeople/{}",
}
_ODINW_DIRECTORIES = {
    ("EgoHands", "val"): "mini_val",
    ("VehiclesOpenImages", "val"): "mini_val",
    ("PascalVOC", "test"): "valid",  # it has no test split
}


def odinw_paths(root: Path) -> dict[str, tuple[Path, Path]]:
    """Return (annotations, directory of the images) of all ODinW splits under ``root``, by registered name."""
    paths = {}
    for name, pattern in _ODINW.items():
        for split in SPLITS:
            usual = "valid" if split == "val" else split
            directory = root / "odinw" / pattern.format(_ODINW_DIRECTORIES.get((name, split), usual))
            # pistols has one directory for all splits; each has a file of its own.
            prefix = "" if "{}" in pattern else f"{split}_"
            paths[f"odinw_{name}_{split}"] = (directory / f"{prefix}annotations_without_background.json", directory)
    return paths


def register_all(root: Path) -> None:
    """Register all data sets under ``root``, except names that are already registered."""
    table = dict(_SINGLE)
    for split in ("train", "val"):
        for name, (json_file, images, evaluator_type, keep_parts) in _TRAIN_AND_VAL.items():
            table[name.format(split)] = (json_file.format(split), images.format(split), evaluator_type, keep_parts)
    for name, (json_file, images, evaluator_type, keep_parts) in table.items():
        # A user's code may have registered the name before, which must win.
        if name not in DatasetCatalog:
            register_json_dataset(name, root / json_file, root / images, evaluator_type, keep_parts=keep_parts)
    for name, (path, directory) in odinw_paths(root).items():
        if name not in DatasetCatalog:
            register_json_dataset(name, path, directory, "coco")


register_all(expand_user(os.environ.get("DETECTRON2_DATASETS", "datasets")))
