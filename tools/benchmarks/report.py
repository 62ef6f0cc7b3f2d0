"""The tables of benchmarks in a document, between markers; the text around them is written by hand.

A table is between ``<!-- benchmark:NAME -->`` and ``<!-- /benchmark -->``. NAME is the benchmark and the device,
"model-cpu" or "train-cuda": figures of a CPU and of a card stand next to each other, and a machine replaces its own.
"""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from regionspot.utils.files import atomic_path, read_json
from tools.benchmarks.table import to_cells

END = "<!-- /benchmark -->"


def render(report: dict[str, Any]) -> str:
    """Return a benchmark's table in Markdown, below what it was measured by and on."""
    headers, cells = to_cells(report["rows"])
    table = tabulate(cells, headers=headers, tablefmt="pipe", disable_numparse=True)
    return f"`{report['command']}`\n\n{describe(report)}\n\n{table}\n"


def describe(report: dict[str, Any]) -> str:
    """Return a sentence about the machine and the precision."""
    machine = report["machine"]
    parts = [machine["name"]]
    if machine["device"] == "cpu":
        parts += [f"{machine['cores']} cores {'with' if machine['bf16'] else 'without'} bf16 instructions"]
        parts += [f"{machine['threads']} threads"]
    parts += [f"PyTorch {machine['torch']}", f"frozen parts in {report['precision']}"]
    if "training_precision" in report:
        parts += [f"the step in {report['training_precision']}"]
    parts += ["the plain way in float32"]
    if report["batch"] > 1:
        parts += [f"{report['batch']} images at once"]
    parts += [f"a large matrix product: {report['peak_flops'] / 1e12:.3g} TFLOP/s"]
    return f"{', '.join(parts)}."


def replace_section(text: str, name: str, content: str, where: str) -> str:
    """Return ``text`` with ``content`` between the markers of ``name``; ``where`` names the text in messages.

    Raises:
        ValueError: the markers are missing, or there twice.
    """
    start = f"<!-- benchmark:{name} -->"
    # a section ends before the next begins: one without an end must not swallow it
    pattern = re.compile(f"({re.escape(start)}\n)(?:(?!<!-- benchmark:).)*?({re.escape(END)})", re.DOTALL)
    if text.count(start) != 1 or not pattern.search(text):
        raise ValueError(
            f"{where}: expected the line {start} once, with a line {END} after it, found the first {text.count(start)} "
            "times; add both where the table belongs"
        )
    return pattern.sub(lambda match: f"{match[1]}\n{content}\n{match[2]}", text)


def write_tables(document: Path, files: list[Path]) -> None:
    """Write the tables of benchmarks' JSON files into a document; those with the same name one after the other.

    Raises:
        ValueError: a file that is not a benchmark's, or a marker that is missing; the document is then as before.
    """
    sections: dict[str, list[str]] = {}
    for path in files:
        report = read_json(path, "benchmark")
        if not isinstance(report, dict) or not {"benchmark", "command", "machine", "rows"} <= set(report):
            raise ValueError(f"{path}: expected what `python -m tools.benchmarks ... --json FILE` writes")
        sections.setdefault(f"{report['benchmark']}-{report['machine']['device']}", []).append(render(report))
    if not document.is_file():
        raise FileNotFoundError(f"{document}: no such file")
    text = document.read_text(encoding="utf-8")
    for name, tables in sections.items():
        text = replace_section(text, name, "\n".join(tables), str(document))
    with atomic_path(document) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main(args: Namespace) -> None:
    write_tables(args.document, args.files)
