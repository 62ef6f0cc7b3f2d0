"""The data sets that are registered at import; nothing is read until one is used."""

import os
from pathlib import Path

from detectron2.data import DatasetCatalog

from regionspot.data.datasets.json_dataset import register_json_dataset


def register_all(root: Path) -> None:
    """Register every data set under ``root``, but for names that are taken already."""
    for split in ("train", "val", "test"):
        name = f"miniworld_{split}"
        if name not in DatasetCatalog:
            register_json_dataset(name, root / "miniworld" / f"{split}.json", root / "miniworld")


register_all(Path(os.environ.get("DETECTRON2_DATASETS", "datasets")))
