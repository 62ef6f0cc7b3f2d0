"""Tables of regions, written a chunk at a time: CSV, JSON lines or Parquet by the suffix of the file."""

import csv
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from regionspot.utils.files import atomic_path


class RegionTable:
    """A table that appears whole or not at all, when the ``with`` block ends."""

    def __init__(self, path: str | Path) -> None:
        """
        Args:
            path: the file, ``.csv``, ``.jsonl`` or ``.parquet``.

        Raises:
            ValueError: another suffix, or pyarrow is not installed.
        """
        self.path = Path(path)
        kinds = {".csv": _write_csv, ".jsonl": _write_json_lines, ".parquet": None}
        if self.path.suffix not in kinds:
            raise ValueError(f"table {path}: expected one of the suffixes {', '.join(kinds)}")
        self._write = kinds[self.path.suffix]
        if self._write is None:
            _import_pyarrow()
        self._stack = ExitStack()
        self._writer: Any = None

    def __enter__(self) -> "RegionTable":
        self._temporary = self._stack.enter_context(atomic_path(self.path))
        if self._write is not None:
            self._file = self._stack.enter_context(self._temporary.open("w", newline="", encoding="utf-8"))
        self._is_empty = True
        return self

    def write(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append rows: columns of the same length, numbers or strings (dtype object); always the same columns."""
        if self._write is not None:
            self._write(self._file, columns, self._is_empty)
        else:
            self._write_parquet(columns)
        self._is_empty = False

    def _write_parquet(self, columns: Mapping[str, np.ndarray]) -> None:
        pyarrow, parquet = _import_pyarrow()
        # without rows nothing says that objects are strings
        kinds = {key: pyarrow.string() if value.dtype == object else None for key, value in columns.items()}
        arrays = {key: pyarrow.array(np.ascontiguousarray(value), kinds[key]) for key, value in columns.items()}
        table = pyarrow.table(arrays)
        if self._writer is None:
            self._writer = self._stack.enter_context(parquet.ParquetWriter(self._temporary, table.schema))
        self._writer.write_table(table)

    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError("Parquet needs pyarrow: pip install 'regionspot[parquet]', or write .csv") from None
    return pyarrow, parquet


def _python_columns(columns: Mapping[str, np.ndarray]) -> list[list]:
    # six digits, which are all that float32 has
    return [
        [float(f"{x:.6g}") for x in value.tolist()] if value.dtype.kind == "f" else value.tolist()
        for value in columns.values()
    ]


def _write_csv(file: Any, columns: Mapping[str, np.ndarray], is_first: bool) -> None:
    writer = csv.writer(file)
    if is_first:
        writer.writerow(columns)
    writer.writerows(zip(*_python_columns(columns)))


def _write_json_lines(file: Any, columns: Mapping[str, np.ndarray], is_first: bool) -> None:
    names = list(columns)
    file.writelines(json.dumps(dict(zip(names, row))) + "\n" for row in zip(*_python_columns(columns)))
