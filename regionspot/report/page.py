"""The report: its sections, rendered as one HTML file that needs no other file and no network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from regionspot.evaluation.average_precision import RECALLS
from regionspot.evaluation.ground_truth import GroundTruth
from regionspot.report.analysis import Analysis, analyze_run, show_nothing
from regionspot.report.charts import Chart, make_chart
from regionspot.report.panels import Attend, Panel, make_panel
from regionspot.report.run import Run, open_runs, protocol_differences
from regionspot.report.tables import (
    MAX_PAIRS,
    Table,
    class_table,
    confusion_table,
    difference_table,
    error_table,
    frequency_table,
    metrics_table,
    region_table,
)
from regionspot.report.training_curves import draw_curves, find_training_log
from regionspot.utils.files import atomic_path


@dataclass
class Section:
    """A part of the page."""

    name: str  # its anchor
    title: str
    warnings: list[str] = field(default_factory=list)
    protocols: list[tuple[str, str]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    images: list[Panel] = field(default_factory=list)


def write_report(
    directories: Sequence[str | Path],
    output: str | Path,
    num_images: int = 20,
    images: str | Path = "",
    attend: Attend | None = None,
    progress: Callable[[str], None] = show_nothing,
) -> None:
    """Write the report of an evaluation, compared with others of the same data set.

    Args:
        directories: the evaluation, then the others, see ``open_runs``.
        output: the HTML file.
        num_images: number of worst images.
        images: directory of the images; by default where the evaluation read them.
        attend: draws attention maps of the worst images, such as ``AttentionMaps``.
        progress: called with each of the ``STAGES`` of each run when it starts.

    Raises:
        FileNotFoundError, ValueError: see ``open_runs`` and ``analyze_run``.
    """
    runs = open_runs(directories)
    truth = GroundTruth(runs[0].record.annotations)
    analyses = [analyze_run(run, truth, num_images * (run is runs[0]), progress) for run in runs]
    panels = [make_panel(image, str(images) or runs[0].record.images, attend) for image in analyses[0].worst]
    sections = [_summary(runs), *_classes(analyses, truth), _curves(analyses), *_errors(analyses, truth)]
    sections += [_calibration(analyses), *_worst(panels, analyses[0].threshold), *_training(runs[0])]
    data = runs[0].record.dataset or Path(runs[0].record.annotations).name
    with atomic_path(output) as path:
        path.write_text(render(f"{runs[0].name} on {data}", sections), encoding="utf-8")


def render(title: str, sections: Sequence[Section]) -> str:
    """Return the page; all texts are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("regionspot.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["cell"] = format_cell
    return environment.get_template("page.html").render(title=title, sections=sections)


def format_cell(value: Any, kind: str) -> str:
    """Return the text of a cell, as templates/tables.js writes it after sorting."""
    if value is None:
        return "–"
    if kind == "text":
        return str(value)
    if kind == "count":
        return f"{value:,}"
    text = f"{abs(value):.2f}"
    sign = "" if text == "0.00" else "−" if value < 0 else "+" if kind == "points" else ""
    return sign + text


def _summary(runs: list[Run]) -> Section:
    section = Section("summary", "Summary", protocols=[(run.name, run.protocol) for run in runs])
    section.warnings = [
        f"The runs differ in {key}: " + "; ".join(f"{run.name}: {value}" for run, value in zip(runs, values))
        for key, values in protocol_differences(runs)
        if key not in ("checkpoint", "config", "predictions")  # what one usually compares
    ]
    section.warnings += [f"{run.name}: {run.metrics['warning']}" for run in runs if run.metrics.get("warning")]
    differences, regions = difference_table(runs), region_table(runs)
    section.tables = [metrics_table(runs), *([differences] if differences else [])]
    section.texts = ["AP in percent; – where nothing is annotated."]
    if regions:
        section.tables.append(regions)
        section.texts.append("The last table is the accuracy of the names of annotated boxes.")
    return section


def _classes(analyses: list[Analysis], truth: GroundTruth) -> list[Section]:
    text = (
        "An object has a detection if the IoU of their boxes is at least 0.5; its first name is that of the detection "
        f"with the best score. Both are of {analyses[0].run.name}."
    )
    frequencies = frequency_table(analyses, truth)
    groups = [Section("frequencies", "By frequency", texts=[text], tables=[frequencies])] if frequencies else []
    texts = [] if frequencies else [text]
    return [*groups, Section("classes", "By class", texts=texts, tables=[class_table(analyses, truth)])]


def _curves(analyses: list[Analysis]) -> Section:
    charts = [
        make_chart(title, "recall", "precision", [(a.run.name, RECALLS, a.curves[row]) for a in analyses], (0.0, 1.0))
        for row, title in enumerate(("at IoU 0.5", "mean of IoU 0.5 to 0.95"))
    ]
    text = "Boxes, averaged over the annotated classes; the area under a curve is AP50, and AP."
    return Section("curves", "Precision and recall", texts=[text], charts=charts)


def _errors(analyses: list[Analysis], truth: GroundTruth) -> list[Section]:
    ap50 = ", ".join(f"{analysis.run.name} {analysis.ap50:.2f}" for analysis in analyses)
    texts = [
        f"Kinds as defined by TIDE (arXiv 2008.08115), of boxes; AP50: {ap50}. The points of AP50 are gained if all "
        "errors of the kind, and only these, are corrected; they do not add up."
    ]
    first = analyses[0]
    errors = Section("errors", "Errors by kind", texts=texts, tables=[error_table(analyses)])
    num_wrong = sum(count for _, _, count in first.confusions)
    texts = [f"{num_wrong:,} of {int(first.located.sum()):,} objects with a detection get another name first."]
    if len(first.confusions) > MAX_PAIRS:
        texts.append(f"The {MAX_PAIRS} most frequent of {len(first.confusions):,} pairs.")
    confusion = Section("confusion", "Confusion between names", texts=texts)
    confusion.tables = [confusion_table(first, truth)] if first.confusions else []
    return [errors, confusion]


def _calibration(analyses: list[Analysis]) -> Section:
    section, series = Section("calibration", "Calibration"), []
    for analysis in analyses:
        calibration = analysis.calibration
        if calibration is None:
            section.texts.append(f"{analysis.run.name}: scores are not in [0, 1], or no object has a detection.")
            continue
        error = f"{analysis.run.name} (expected calibration error {calibration.error:.3f})"
        series.append((error, calibration.confidence, calibration.accuracy))
    if series:
        section.texts.append("How often the first name of an object is right, by its score in bins of 0.1.")
        title = "score and accuracy of first names"
        section.charts = [make_chart(title, "score", "share that is right", series, (0.0, 1.0), has_diagonal=True)]
    return section


def _worst(panels: list[Panel], threshold: float) -> list[Section]:
    if not panels:
        return []
    text = (
        f"The {len(panels)} images with most objects that are not found and false detections. Only detections with a "
        f"score of at least {threshold:.3f} count here and are drawn: it gives the best F1 over the whole data set."
    )
    return [Section("worst", "Worst images", texts=[text], images=panels)]


def _training(run: Run) -> list[Section]:
    path = find_training_log(run.directory)
    charts = draw_curves(path) if path else []
    return [Section("training", "Training", charts=charts)] if charts else []
