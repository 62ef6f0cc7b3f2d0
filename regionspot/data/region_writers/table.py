"""Regions as a table: CSV or Parquet."""

import csv
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from regionspot.data.region_writers.whole_runs import iterate_regions
from regionspot.utils.files import atomic_path

_SCORES = ("score", "detection_score", "unknown", "mask_iou")
COLUMNS = ("image", "image_id", "region", "x0", "y0", "x1", "y1", "label", "class_index", *_SCORES)
_ROWS = 1 << 14  # of a row group


def write_table(images: Iterable[dict[str, Any]], path: str | Path, with_embeddings: bool = False) -> None:
    """Write a row for each region: image, box in original pixels, class and scores.

    Args:
        images: dicts as ``regionspot.data.region_writers.whole_runs`` describes them.
        path: ends in ".csv" or ".parquet", and appears whole.
        with_embeddings: in Parquet, a column of the regions' embeddings, lists of float32.

    Raises:
        ValueError: another suffix, or embeddings in CSV.
        ModuleNotFoundError: Parquet without pyarrow.
    """
    suffix = Path(path).suffix
    if suffix not in (".csv", ".parquet"):
        raise ValueError(f"table {path}: expected a name that ends in .csv or .parquet")
    if suffix == ".csv" and with_embeddings:
        raise ValueError(f"table {path}: embeddings are written to .parquet only")
    with atomic_path(path) as temporary:
        if suffix == ".csv":
            with temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(COLUMNS)
                writer.writerows([row[name] for name in COLUMNS] for row in _rows(images))
        else:
            _write_parquet(images, temporary, with_embeddings)


def _rows(images: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for image in images:
        for region in iterate_regions(image):
            x0, y0, x1, y1 = region["box"]
            yield {
                **region,
                **{"image": image["name"], "image_id": image["image_id"], "region": region["index"]},
                **{"x0": x0, "y0": y0, "x1": x1, "y1": y1, "mask_iou": region["iou"]},
            }


def _write_parquet(images: Iterable[dict[str, Any]], path: Path, with_embeddings: bool) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a table in Parquet needs pyarrow: pip install 'regionspot[parquet]', or write .csv"
        ) from error
    text, number, real = pyarrow.string(), pyarrow.int64(), pyarrow.float32()
    types = {"image": text, "label": text, "unknown": pyarrow.bool_()}
    types |= dict.fromkeys(("image_id", "region", "class_index"), number)
    fields = [(name, types.get(name, real)) for name in COLUMNS]
    fields += [("embedding", pyarrow.list_(real))] if with_embeddings else []
    schema, rows = pyarrow.schema(fields), _rows(images)
    with parquet.ParquetWriter(path, schema) as writer:
        while chunk := list(islice(rows, _ROWS)):
            columns = {name: [row[name] for row in chunk] for name in schema.names}
            writer.write_table(pyarrow.table(columns, schema=schema))
