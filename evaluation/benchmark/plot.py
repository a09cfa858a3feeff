"""One picture of a benchmark: the Dice of every run, and each method's difference to its twin with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autossl.data.files import atomic_write
from autossl.evaluation.benchmark.report import Table, label
from autossl.evaluation.benchmark.tables import Row

FILE = "table.png"
COLORS = {"twin": "#555555", "method": "#0072B2", "full labels": "#009E73"}
"""Okabe and Ito's palette: apart for every common kind of color vision, and in gray."""
HATCHES = {"twin": "", "method": "", "full labels": "///"}
ROW_INCHES = 0.42


def draw_table(path: Path, table: Table) -> None:
    """Writes a PNG; left the mean Dice of every run with its mean, right the differences in points with intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in table.rows if row.trainings]
    several_budgets = len({row.key.labeled for row in rows if row.key.role != "full labels"}) > 1
    figure = Figure(figsize=(11, 1.9 + ROW_INCHES * max(3, len(rows))), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
    _draw_dice(left, rows)
    _draw_differences(right, rows)
    names = [_name(row, several_budgets) for row in rows]
    left.set_yticks(range(len(rows)), names, fontsize=10)
    left.set_ylim(len(rows) - 0.4, -0.6)
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
        axis.tick_params(axis="x", labelsize=10)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    request = table.plan.request
    budget = f", {request.labeled[0]} labeled cases" if len(request.labeled) == 1 else ""
    figure.suptitle(
        f"{table.plan.dataset}, {request.configuration}, preset {table.plan.preset}, {table.plan.steps} steps{budget}",
        fontsize=12,
    )
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130)


def _name(row: Row, several_budgets: bool) -> str:
    budget = f", {row.key.labeled or 'all'}" if several_budgets and row.key.role != "full labels" else ""
    missing = "" if len(row.trainings) == row.n_wanted else f" ({len(row.trainings)} of {row.n_wanted} runs)"
    return f"{label(row.key)}{budget}{missing}"


def _draw_dice(axis: Any, rows: Sequence[Row]) -> None:
    """Dots, because bars would have to begin at 0."""
    for y, row in enumerate(rows):
        color = COLORS[row.key.role]
        values = [training.mean_dice for training in row.trainings]
        axis.plot(values, [y] * len(values), "o", color=color, alpha=0.55, markersize=6)
        axis.plot([row.mean_dice], [y], "|", color=color, markersize=18, markeredgewidth=2.5)
    axis.margins(x=0.08)
    axis.set_xlabel("mean Dice (dots: runs, line: their mean)", fontsize=10)


def _draw_differences(axis: Any, rows: Sequence[Row]) -> None:
    for y, row in enumerate(rows):
        if row.to_twin is None:
            continue
        found = row.to_twin.comparison
        low, high, mean = (100 * value for value in (found.low, found.high, found.estimate))
        axis.barh(y, mean, height=0.62, color=COLORS[row.key.role], hatch=HATCHES[row.key.role], edgecolor="white")
        if not math.isnan(low):
            axis.plot([low, high], [y, y], color="black", linewidth=1.6, solid_capstyle="butt")
            axis.plot([low, high], [y, y], "|", color="black", markersize=9, markeredgewidth=1.6)
        end = max(mean, high) if mean >= 0 or math.isnan(low) else min(mean, low)
        axis.annotate(
            f"{mean:+.2f}",
            (0 if math.isnan(end) else end, y),
            xytext=(7 if mean >= 0 else -7, 0),
            textcoords="offset points",
            ha="left" if mean >= 0 else "right",
            va="center",
            fontsize=10,
        )
    axis.axvline(0, color=COLORS["twin"], linewidth=1.2)
    axis.margins(x=0.14)
    axis.set_xlabel("difference to the supervised twin, Dice points (line: 95 % interval)", fontsize=10)
    axis.tick_params(axis="y", length=0)
