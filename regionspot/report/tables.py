"""The tables of a report: columns and rows, which the page sorts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regionspot.evaluation.error_kinds import KINDS
from regionspot.evaluation.ground_truth import FREQUENCIES, GroundTruth
from regionspot.report.analysis import Analysis
from regionspot.report.run import Run

VISIBLE = 30  # rows of a table that are shown at first
MAX_PAIRS = 300  # pairs of confused names; rarer ones are left out
TASKS = {"bbox": "boxes", "segm": "masks"}
GROUPS = {"r": "rare", "c": "common", "f": "frequent"}
MEANINGS = {
    "classification": "on an object of another name",
    "localization": "on an object of its name, but the box fits badly (IoU 0.1 to 0.5)",
    "both": "near an object of another name, and the box fits badly",
    "duplicate": "on an object that a better detection already has",
    "background": "on no object",
    "missed": "object with no detection of its name, nor one with an error above that could be corrected",
}


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: unique in the page.
        columns: (title, kind) with the kind "text", "count", "percent" or "points" (a difference, with its sign).
        rows: cells; None for what does not exist.
        is_searchable: the page offers to search it.
    """

    name: str
    columns: list[tuple[str, str]]
    rows: list[list[Any]]
    is_searchable: bool = False
    visible: int = VISIBLE


def metrics_table(runs: Sequence[Run]) -> Table:
    """Return the metrics of all runs."""
    keys = _metric_names(runs)
    rows = [
        [title, run.name, *(run.tasks[task].get(key) for key in keys)]
        for task, title in TASKS.items()
        for run in runs
        if task in run.tasks
    ]
    return Table("metrics", [("", "text"), ("run", "text"), *((key, "percent") for key in keys)], rows)


def difference_table(runs: Sequence[Run]) -> Table | None:
    """Return the differences of the other runs' metrics from the first one's, None without others."""
    keys, first = _metric_names(runs), runs[0]
    rows = [
        [title, run.name, *(_difference(run.tasks[task].get(key), first.tasks[task].get(key)) for key in keys)]
        for task, title in TASKS.items()
        for run in runs[1:]
        if task in run.tasks and task in first.tasks
    ]
    columns = [("", "text"), (f"difference from {first.name}", "text"), *((key, "points") for key in keys)]
    return Table("differences", columns, rows) if rows else None


def _metric_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for metrics in run.tasks.values() for key in metrics))


def region_table(runs: Sequence[Run]) -> Table | None:
    """Return the accuracy on annotated boxes, None if no run has it."""
    regions = [(run.name, run.metrics["region"]) for run in runs if isinstance(run.metrics.get("region"), dict)]
    if not regions:
        return None
    keys = list(dict.fromkeys(key for _, metrics in regions for key in metrics))
    rows = [[name, *(_number(metrics.get(key)) for key in keys)] for name, metrics in regions]
    return Table("regions", [("run", "text"), *((key, "percent") for key in keys)], rows)


def frequency_table(analyses: Sequence[Analysis], truth: GroundTruth) -> Table | None:
    """Return AP and names of each frequency group, None for a data set without frequencies."""
    present = [frequency for frequency in FREQUENCIES if frequency in truth.frequencies]
    if not present:
        return None
    rows = []
    for frequency in present:
        group = [index for index, own in enumerate(truth.frequencies) if own == frequency]
        first = analyses[0]
        objects, located, right = (int(x[group].sum()) for x in (first.objects, first.located, first.right))
        aps = [_number(analysis.run.tasks.get("bbox", {}).get(f"AP{frequency}")) for analysis in analyses]
        rows.append([GROUPS[frequency], len(group), objects, *aps, _share(located, objects), _share(right, objects)])
    columns = [("frequency", "text"), ("classes", "count"), ("objects", "count")]
    columns += [(f"AP {analysis.run.name}", "percent") for analysis in analyses]
    return Table("frequencies", [*columns, ("with a detection", "percent"), ("first name right", "percent")], rows)


def class_table(analyses: Sequence[Analysis], truth: GroundTruth) -> Table:
    """Return the AP of each annotated class in all runs, and what its objects are called in the first."""
    first, mistakes = analyses[0], dict[int, tuple[int, int]]()
    for target, name, count in first.confusions:  # the most frequent come first
        mistakes.setdefault(target, (name, count))
    has_frequencies = any(truth.frequencies)
    columns = [("class", "text")] + [("frequency", "text")] * has_frequencies + [("objects", "count")]
    columns += [(f"AP {analysis.run.name}", "percent") for analysis in analyses]
    columns += [(f"{analysis.run.name} − {first.run.name}", "points") for analysis in analyses[1:]]
    columns += [("mask AP", "percent")] * ("segm" in first.per_class)
    columns += [("with a detection", "percent"), ("first name right", "percent"), ("most frequent wrong name", "text")]
    rows = []
    for index, class_name in enumerate(truth.class_names):
        objects = int(first.objects[index])
        aps = [_number(analysis.per_class["bbox"][index]) for analysis in analyses]
        if not objects and aps[0] is None:
            continue
        row: list[Any] = [class_name] + [GROUPS.get(truth.frequencies[index] or "", "")] * has_frequencies
        row += [objects, *aps, *(_difference(ap, aps[0]) for ap in aps[1:])]
        row += [_number(first.per_class["segm"][index])] if "segm" in first.per_class else []
        wrong = mistakes.get(index)
        text = f"{truth.class_names[wrong[0]]} ({wrong[1]})" if wrong else ""
        row += [_share(int(first.located[index]), objects), _share(int(first.right[index]), objects), text]
        rows.append(row)
    return Table("classes", columns, rows, is_searchable=True)


def error_table(analyses: Sequence[Analysis]) -> Table:
    """Return each kind of error: how many there are, and the AP50 that correcting all of them gains."""
    columns = [("kind", "text"), ("meaning", "text")]
    for analysis in analyses:
        columns += [(f"errors {analysis.run.name}", "count"), (f"AP50 gained {analysis.run.name}", "points")]
    rows: list[list[Any]] = []
    for kind in KINDS:
        pairs = [(analysis.error_counts[kind], analysis.error_gains[kind]) for analysis in analyses]
        rows.append([kind, MEANINGS[kind], *(value for pair in pairs for value in pair)])
    return Table("errors", columns, rows)


def confusion_table(analysis: Analysis, truth: GroundTruth) -> Table:
    """Return the most frequent pairs of an object's name and the wrong name that it gets first."""
    names, objects = truth.class_names, analysis.objects
    rows = [
        [names[target], names[name], count, _share(count, int(objects[target]))]
        for target, name, count in analysis.confusions[:MAX_PAIRS]
    ]
    columns = [("annotated", "text"), ("called first", "text"), ("objects", "count"), ("share of the class", "percent")]
    return Table("confusion", columns, rows, is_searchable=True, visible=15)


def _difference(value: float | None, first: float | None) -> float | None:
    return None if value is None or first is None else value - first


def _share(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


def _number(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
