"""The rows of a benchmark: ours beside the plain way, printed as they come, and kept as JSON."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from regionspot.utils.files import write_json
from tools.benchmarks.measure import GIGA, Measurement, Meter, describe_machine, measure_peak_flops

Row = dict[str, Any]


def _seconds(row: Row, prefix: str = "") -> str:
    seconds = row.get(f"{prefix}seconds")
    if seconds is None:
        return ""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _rate(row: Row, prefix: str = "") -> str:
    rate = row.get(f"{prefix}per_second")
    if rate is None:
        return ""
    return f"{rate:,.0f} {row['unit']}/s" if rate >= 100 else f"{rate:.3g} {row['unit']}/s"


def _memory(row: Row, prefix: str = "") -> str:
    added, total = row.get(f"{prefix}gigabytes"), row.get(f"{prefix}total_gigabytes")
    if total is None:
        return ""
    return f"({total:.2f} GB)" if added is None else f"{added:.2f} GB ({total:.2f})"


def _share(row: Row, key: str) -> str:
    return f"{100 * row[key]:.0f} %" if key in row else ""


def _boxes(row: Row) -> str:
    if "boxes" not in row:
        return ""
    return f"{row['boxes']:,}, " + ("the same" if row["same_boxes"] else f"plain {row['plain_boxes']:,}, not the same")


# A column that no row has anything for is left out. The JSON file has the rest.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "part": lambda row: row["part"],
    "parameters": lambda row: f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else "",
    "length": lambda row: str(row.get("token_dim", "")),
    "time": _seconds,
    "rate": _rate,
    "share": lambda row: _share(row, "share"),
    "memory added (whole)": _memory,
    "of the peak FLOP/s": lambda row: _share(row, "peak_share"),
    "waits for data": lambda row: _share(row, "data_share"),
    "plain: time": lambda row: row.get("plain_error", "") or _seconds(row, "plain_"),
    "plain: memory": lambda row: _memory(row, "plain_"),
    "boxes": _boxes,
    "times as fast": lambda row: f"{row['ratio']:.1f}" if "ratio" in row else "",
}


def to_cells(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the headers and the cells of the columns that any row needs."""
    names = [name for name, cell in COLUMNS.items() if any(cell(row) for row in rows)]
    return names, [[COLUMNS[name](row) for name in names] for row in rows]


class Table:
    """Measures, prints and keeps the rows of one benchmark.

    Attributes:
        rows: see ``add``.
        peak_flops: operations a second that the device can do in the precision of ours.
        own_bytes, plain_bytes: of the weights that only ours, and only the plain way, uses: neither is part of what
            the other's whole process would take.
    """

    def __init__(self, meter: Meter, batch: int, dtype: torch.dtype) -> None:
        """``batch`` is the number of images that a call of ours takes, ``dtype`` its precision."""
        self.meter, self.batch, self.dtype = meter, batch, dtype
        self.peak_flops = measure_peak_flops(meter, dtype)
        self.own_bytes = self.plain_bytes = 0
        self.rows: list[Row] = []

    def add(
        self,
        part: str,
        function: Callable[[], object],
        plain: Callable[[], object] | Measurement | None = None,
        unit: str = "images",
        number: int = 1,
        plain_batch: int = 1,
        flops: float | None = None,
    ) -> Measurement | None:
        """Measure a part and, if it is given, the plain way to do it, and add a row; return the plain measurement.

        All of a row is for one image: ``seconds``, ``flops``, and ``number`` units in ``per_second``.

        Args:
            part: what is measured.
            function: does it for a batch of images.
            plain: does it for ``plain_batch`` images, or what that was measured to take.
            unit, number: what is counted, and how many there are in an image.
            flops: of an image, if they are known already; 0 if they are not to be counted.
        """
        measured = self.meter.measure(function, is_counted=flops is None)
        row = {"part": part, "unit": unit, **self._describe(measured, self.batch, number, self.plain_bytes)}
        if flops := measured.flops / self.batch if flops is None else flops:
            row["flops"] = flops
        if plain is not None and not isinstance(plain, Measurement):
            try:
                plain = self.meter.measure(plain)
            except torch.OutOfMemoryError:  # of a GPU; the other stages can still be measured
                row["plain_error"], plain = "out of memory", None
        if plain is not None:
            described = self._describe(plain, plain_batch, number, self.own_bytes)
            row |= {f"plain_{key}": value for key, value in described.items()}
        self.append(row)
        return plain

    @staticmethod
    def _describe(measured: Measurement, batch: int, number: int, others: int) -> Row:
        seconds = measured.seconds / batch
        memory = {"gigabytes": measured.added / GIGA, "total_gigabytes": (measured.total - others) / GIGA}
        return {"seconds": seconds, "per_second": number / seconds, **memory}

    def append(self, row: Row) -> None:
        """Add a row that was measured elsewhere, with its ratio, and print it."""
        if "plain_per_second" in row:
            row["ratio"] = row["per_second"] / row["plain_per_second"]
        self.rows.append(row)
        cells = {name: COLUMNS[name](row) for name in ("time", "share", "plain: time", "times as fast")}
        print(row["part"].ljust(48), *(f"{name} {text}".ljust(24) for name, text in cells.items() if text), flush=True)

    def finish(self, args: Namespace, **fields: Any) -> dict[str, Any]:
        """Print the table as a whole, write it to ``args.json`` if that is given, and return what is written."""
        # again: another program may have slowed down the first one
        self.peak_flops = max(self.peak_flops, measure_peak_flops(self.meter, self.dtype))
        for row in self.rows:
            if "flops" in row:
                row["peak_share"] = row["flops"] / row["seconds"] / self.peak_flops
        headers, cells = to_cells(self.rows)
        print("\n" + tabulate(cells, headers=headers, disable_numparse=True))
        content: dict[str, Any] = {"benchmark": args.benchmark, "command": args.command, "batch": self.batch}
        content |= {"machine": describe_machine(self.meter.device), "peak_flops": self.peak_flops, **fields}
        content["rows"] = self.rows
        if args.json:
            write_json(Path(args.json), content)
        return content
