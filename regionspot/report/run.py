"""The evaluations of a report: their directories, names, and whether they can be compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regionspot.evaluation.record import FILE, EvaluationRecord
from regionspot.utils.files import read_json, sha256_of_file


@dataclass(eq=False)
class Run:
    """An evaluation on the disk.

    Attributes:
        name: what the report calls it.
        directory: of ``evaluation.json``, ``metrics.json`` and the predictions.
        record: what was evaluated.
        metrics: the content of ``metrics.json``: percent, by task and metric; None where nothing is annotated.
    """

    name: str
    directory: Path
    record: EvaluationRecord
    metrics: dict[str, Any]

    @property
    def protocol(self) -> str:
        """What the numbers mean, in one line."""
        fields = "".join(f"; {key}: {value}" for key, value in self.record.protocol.items())
        return self.metrics.get("protocol") or f"protocol: {self.record.metric}{fields}"

    @property
    def tasks(self) -> dict[str, dict[str, float | None]]:
        """The metrics of "bbox" and "segm", as far as they were evaluated."""
        return {task: self.metrics[task] for task in ("bbox", "segm") if task in self.metrics}

    @property
    def predictions(self) -> Path:
        return self.directory / self.record.predictions  # an absolute path replaces the directory


def open_runs(directories: Sequence[str | Path]) -> list[Run]:
    """Open evaluations of one data set.

    Args:
        directories: of evaluations, or ``OUTPUT_DIR`` of runs that evaluated one data set.

    Raises:
        FileNotFoundError: no evaluation there, or its predictions are missing.
        ValueError: damaged files, several evaluations in an ``OUTPUT_DIR``, or evaluations of different annotations.
    """
    places = [_find_evaluation(Path(directory)) for directory in directories]
    runs = [_open_run(place, name) for place, name in zip(places, _names(places))]
    first = runs[0]
    for run in runs[1:]:
        if not _is_same_file(run.record.annotations, first.record.annotations):
            raise ValueError(
                f"{run.directory} was evaluated on {run.record.annotations}, and {first.directory} on "
                f"{first.record.annotations}: expected evaluations of the same annotations"
            )
    return runs


def protocol_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return each field of the protocol in which runs differ, with its value in each run."""
    protocols = [{"metric": run.record.metric, **run.record.protocol} for run in runs]
    keys = dict.fromkeys(key for protocol in protocols for key in protocol)
    values = {key: [str(protocol.get(key, "unknown")) for protocol in protocols] for key in keys}
    return [(key, row) for key, row in values.items() if len(set(row)) > 1]


def _find_evaluation(directory: Path) -> Path:
    if (directory / FILE).is_file() or not (directory / "inference").is_dir():
        return directory
    inside = sorted(path.parent for path in (directory / "inference").glob(f"*/{FILE}"))
    if len(inside) > 1:
        names = ", ".join(str(path) for path in inside)
        raise ValueError(f"{directory} has {len(inside)} evaluations: give one of {names}")
    return inside[0] if inside else directory


def _open_run(directory: Path, name: str) -> Run:
    record = EvaluationRecord.read(directory)
    metrics = read_json(directory / "metrics.json", "metrics")
    if not isinstance(metrics, dict) or not all(isinstance(metrics.get(t, {}), dict) for t in ("bbox", "segm")):
        raise ValueError(f"{directory / 'metrics.json'}: expected the metrics of an evaluation; evaluate again")
    run = Run(name, directory, record, metrics)
    if not run.tasks:
        raise ValueError(f"{directory / 'metrics.json'}: neither boxes nor masks were evaluated")
    for what, path in (("annotations", Path(record.annotations)), ("predictions", run.predictions)):
        if not path.is_file():
            raise FileNotFoundError(f"{directory}: its {what} {path} are not there; evaluate again, or move them back")
    return run


def _names(places: list[Path]) -> list[str]:
    """Return what tells the runs' directories apart, or else their own names."""
    parts = []
    for place in places:
        absolute = place.absolute()
        is_inside = absolute.parent.name == "inference"  # OUTPUT_DIR/inference/<data set>
        parts.append(list(absolute.parents[1].parts if is_inside else absolute.parts))
    distinct = set(map(tuple, parts))
    if len({own[-1] for own in distinct}) == len(distinct):
        parts = [own[-1:] for own in parts]
    # else what is left without the common beginning and end of the paths
    while min(map(len, parts)) > 1 and len({own[-1] for own in parts}) == 1:
        parts = [own[:-1] for own in parts]
    while min(map(len, parts)) > 1 and len({own[0] for own in parts}) == 1:
        parts = [own[1:] for own in parts]
    names = [str(Path(*own)) for own in parts]
    if len(set(names)) < len(names):
        names = [f"{name} ({number})" for number, name in enumerate(names, 1)]
    return names


def _is_same_file(first: str, second: str) -> bool:
    return first == second or sha256_of_file(first) == sha256_of_file(second)
