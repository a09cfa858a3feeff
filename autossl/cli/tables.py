"""Results as tables on standard output."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autossl.evaluation.evaluate import Evaluation

WIDTH_IN_FILES = 160
HEADINGS = {
    "dice": "Dice",
    "iou": "IoU",
    "volume_error_relative": "volume error (relative)",
    "volume_difference_ml": "volume difference (mL)",
    "hd95_mm": "HD95 (mm)",
    "assd_mm": "ASSD (mm)",
    "hd95_px": "HD95 (pixels)",
    "assd_px": "ASSD (pixels)",
    "nsd": "NSD",
    "lesion_f1": "lesion F1",
    "ece": "ECE",
}


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Prints a table; the first column is flush left, the others flush right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else WIDTH_IN_FILES, highlight=False).print(table)


def print_evaluation(evaluation: Evaluation) -> None:
    """Prints the means over the cases per class, and over the classes."""
    summaries = {name: evaluation.class_summary(name) for name in evaluation.class_names}
    metrics = list(evaluation.foreground_mean)
    rows = [
        [
            name,
            *(figure(summary.means[metric]) for metric in metrics),
            str(summary.n_both_empty),
            str(summary.n_false_alarm),
            str(summary.n_missed),
        ]
        for name, summary in summaries.items()
    ]
    if len(rows) > 1:
        rows.append(["mean of the classes", *(figure(v) for v in evaluation.foreground_mean.values()), "", "", ""])
    headings = [HEADINGS.get(metric, metric) for metric in metrics]
    columns = ["class", *headings, "both empty", "false alarm", "missed"]
    print_table(columns, rows, title=f"means over {len(evaluation.cases)} cases")
    if settings := evaluation.surface_settings:
        tolerances = ", ".join(f"{name} {value:g}" for name, value in settings["nsd_tolerance"].items())
        print(f"NSD tolerance in {settings['unit']}: {tolerances}; distances between {settings['convention']}")


def figure(value: float | None) -> str:
    """Four decimals; a dash where a metric is undefined (NaN, or null in a file)."""
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"
