"""Tables of runs with several seeds."""

from collections.abc import Mapping, Sequence

import numpy as np
from tabulate import tabulate

# What ``experiment.measure`` returns, and its heading. Accuracies are shares there and percent here, as AP is.
COLUMNS = {
    "base_top1": "base top-1",
    "novel_top1": "novel top-1",
    "novel_top1_novel_vocabulary": "novel of novel names",
    "AP": "AP",
    "APr": "APr",
    "jittered_base_top1": "base, jittered boxes",
    "jittered_novel_top1": "novel, jittered boxes",
}


def format_runs(
    runs: Mapping[str, Sequence[Mapping[str, float]]],
    columns: Mapping[str, str] = COLUMNS,
    heading: str = "",
    published: Mapping[str, str] | None = None,
) -> str:
    """Return a table in Markdown: mean and standard deviation of the runs of each row, what they lack left empty.

    Args:
        runs: for each row the numbers of its runs.
        columns: the numbers to show, and their headings.
        heading: of the rows' names.
        published: the paper's AP of rows that it has; a last column.
    """
    lines = []
    for row, numbers in runs.items():
        cells = [row]
        for column in columns:
            scale = 1 if column.startswith("AP") else 100
            values = [scale * run[column] for run in numbers if column in run]
            cells.append(f"{np.mean(values):.1f} ± {np.std(values):.1f}" if values else "")
        lines.append(cells if published is None else [*cells, published[row]])
    headers = [heading, *columns.values(), *([] if published is None else ["the paper's AP"])]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
