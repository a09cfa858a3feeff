"""The table as text, CSV and JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from autossl.data.files import atomic_write, write_json
from autossl.evaluation.benchmark.costs import Cost
from autossl.evaluation.benchmark.provenance import machine, package_commit
from autossl.evaluation.benchmark.request import BenchmarkPlan, PlannedRun, RowKey
from autossl.evaluation.benchmark.results import Training, defined, mean_per_class
from autossl.evaluation.benchmark.tables import Difference, Row
from autossl.evaluation.statistics import LEVEL, RESAMPLES

TEXT, CSV, JSON = "table.txt", "table.csv", "table.json"
WIDTH = 200
FEW_PATIENTS = 10
ESTIMAND = (
    "Difference: mean over the classes of the mean over runs and validation cases of (method - supervised twin), in "
    "Dice points (0.01 Dice), paired by draw, fold, seed and case."
)
TEST = (
    "p: the larger of two: sign flips of whole patients (permutation test, of these very runs) and the level at which "
    "the bootstrap interval reaches zero; Holm-corrected over the methods of a budget."
)


@dataclass(frozen=True)
class Table:
    """All that is known of a benchmark."""

    plan: BenchmarkPlan
    rows: tuple[Row, ...]
    costs: Mapping[RowKey, Cost]
    """Row → what its steps cost; rows that were not timed are absent."""
    missing: tuple[PlannedRun, ...]
    """Runs of the table that are not finished."""

    def cost_factor(self, key: RowKey) -> float:
        """1 for the twin and for full labels, which take the twin's steps; NaN where it was not timed."""
        if key.role != "method":
            return 1.0 if self.costs else math.nan
        return self.costs[key].factor if key in self.costs else math.nan


def summary_cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Column names and one line per row."""
    classes = table.plan.classes
    columns = ["method", "labeled", "runs", *classes, "mean Dice", "to the twin", "95 % interval", "p (Holm)"]
    columns += ["gap closed", "cost", "memory MB"]
    lines = []
    for row in table.rows:
        line = [label(row.key), row.key.labeled or "all", f"{len(row.trainings)}/{row.n_wanted}"]
        line += [*(_dice(row.dice[name]) for name in classes), _dice(row.mean_dice), *_difference_cells(row.to_twin)]
        line += [_format(row.gap_closed, "{:.0%}"), _format(table.cost_factor(row.key), "{:.2f}")]
        lines.append([*line, _format(row.peak_memory_mb, "{:.0f}")])
    return columns, lines


def run_cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Column names and one line per run: where each figure comes from."""
    columns = ["method", "labeled", "draw", "fold", "seed", "mean Dice", "plans", "commit", "hours", "run folder"]
    lines = []
    for row in table.rows:
        for training in row.trainings:
            run = training.run
            line = [label(row.key), row.key.labeled or "all", "-" if run.draw is None else str(run.draw), run.fold]
            line += [str(run.seed), _dice(training.mean_dice), training.spec.plans_hash, training.commit or "unknown"]
            lines.append([*line, f"{training.wall_seconds / 3600:.2f}", _relative(table, run.folder)])
    return columns, lines


def notes(table: Table) -> list[str]:
    """What the figures mean, and what is not as it should be."""
    lines = [ESTIMAND, f"Interval: {interval_in_words(table.rows)}", TEST]
    lines += ["Cost: time of a step relative to the twin's, timed alone. Memory: peak of a training."]
    differences = [row.to_twin for row in table.rows if row.to_twin is not None]
    fewest = min((found.n_patients for found in differences), default=FEW_PATIENTS)
    if fewest < FEW_PATIENTS:
        lines.append(f"Only {fewest} patients validate: the intervals are too narrow, go by p.")
    longer = {run.row: run.spec.total_steps for run in table.plan.runs if run.spec.total_steps != table.plan.steps}
    if longer:
        rows = ", ".join(f"{label(key)} ({steps})" for key, steps in longer.items())
        lines.append(
            f"Other steps than the twin's {table.plan.steps}: {rows}. Part of that difference is the longer training."
        )
    commits = {commit for row in table.rows for commit in row.commits}
    if len(commits) > 1:
        lines.append(f"The runs were trained with several versions of the package: {', '.join(sorted(commits))}.")
    if table.missing:
        lines.append(f"Not finished, so not in the figures: {'; '.join(map(str, table.missing))}.")
    return lines


def interval_in_words(rows: Sequence[Row]) -> str:
    """What was resampled."""
    levels = dict.fromkeys(level for row in rows if row.to_twin for level in row.to_twin.resampled)
    names = {"patients": "patients (within folds)", "draws": "draws", "seeds": "seeds (within draw and fold)"}
    what = " and ".join(text for name, text in names.items() if name in levels) or "patients"
    fixed = [f"one {name.removesuffix('s')}" for name in ("draws", "seeds") if name not in levels]
    rest = f" Only {' and '.join(fixed)}: the interval says nothing about others." if fixed else ""
    return f"{LEVEL:.0%} percentile bootstrap over {what}, {RESAMPLES} resamples.{rest}"


def label(key: RowKey) -> str:
    """A row's name in the table."""
    return {"twin": f"{key.method} (twin)", "full labels": f"{key.method}, all labels"}.get(key.role, key.method)


# ------------------------------------------------------------------------------------------------------------- files


def write_table(table: Table, folder: Path) -> None:
    """Writes table.txt, table.csv and table.json."""
    with atomic_write(folder / TEXT) as partial:
        partial.write_text(as_text(table), encoding="utf-8")
    with atomic_write(folder / CSV) as partial:
        partial.write_text(as_csv(table), encoding="utf-8")
    write_json(folder / JSON, as_json(table))


def as_text(table: Table) -> str:
    """Both tables and the notes, as they are printed."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(file=io.StringIO(), width=WIDTH, highlight=False)
    for title, (columns, lines) in (("", summary_cells(table)), ("runs", run_cells(table))):
        drawn = RichTable(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for number, column in enumerate(columns):
            drawn.add_column(column, justify="left" if number == 0 or column == "run folder" else "right")
        for line in lines:
            drawn.add_row(*line)
        console.print(drawn)
    for note in notes(table):
        console.print(note)
    written: io.StringIO = console.file  # type: ignore[assignment]
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"


def as_csv(table: Table) -> str:
    """One line per row with all its figures; Dice as fractions, undefined ones empty."""
    entries = [_row_json(table, row) for row in table.rows]
    lines = []
    for entry in entries:
        difference = entry["to_twin"] or {}
        line = {key: value for key, value in entry.items() if not isinstance(value, list | dict) and key != "to_twin"}
        line |= {f"dice {name}": value for name, value in entry["dice"].items()}
        line |= {f"to_twin {name}": difference.get(name) for name in ("estimate", "low", "high", "p", "p_holm")}
        line |= {name: ";".join(entry[name]) for name in ("plans_hashes", "commits")}
        line["run_folders"] = ";".join(dict.fromkeys(run["run"] for run in entry["runs"]))
        lines.append({key: value for key, value in line.items() if key != "full_labels_minus_twin"})
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def as_json(table: Table) -> dict[str, Any]:
    """Everything, with paths relative to the workspace."""
    plan, request = table.plan, table.plan.request
    return {
        "what": "full-volume Dice of validation cases, final weights, and differences to the supervised twin",
        "dataset": plan.dataset,
        "configuration": request.configuration,
        "preset": plan.preset,
        "steps": plan.steps,
        "folds": list(dict.fromkeys(run.fold for run in plan.runs)),
        "seeds": list(request.seeds),
        "labeled": list(request.labeled) or ["all"],
        "draws": list(request.draws) if request.labeled else [],
        "estimand": ESTIMAND,
        "interval": interval_in_words(table.rows),
        "test": TEST,
        "rows": [_row_json(table, row) for row in table.rows],
        "timing": [asdict(cost) for cost in dict.fromkeys(table.costs.values())],
        "not_finished": [str(run) for run in table.missing],
        "written": {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": package_commit(),
            "machine": machine(plan.device),
        },
    }


def _row_json(table: Table, row: Row) -> dict[str, Any]:
    return {
        "role": row.key.role,
        "method": row.key.method,
        "labeled": row.key.labeled or "all",
        "n_runs": len(row.trainings),
        "n_runs_wanted": row.n_wanted,
        "dice": {name: defined(value) for name, value in row.dice.items()},
        "mean_dice": defined(row.mean_dice),
        "to_twin": _difference_json(row.to_twin),
        **({"full_labels_minus_twin": _difference_json(row.gap)} if row.key.role == "twin" else {}),
        "gap_closed": defined(row.gap_closed),
        "cost_factor": defined(table.cost_factor(row.key)),
        "peak_memory_mb": defined(row.peak_memory_mb),
        "wall_seconds": round(row.wall_seconds, 1),
        "plans_hashes": row.plans_hashes,
        "commits": row.commits,
        "runs": [_run_json(table, training) for training in row.trainings],
    }


def _difference_json(found: Difference | None) -> dict[str, Any] | None:
    if found is None:
        return None
    figures = {name: defined(value) for name, value in asdict(found.comparison).items()}
    return {
        **figures,
        "p": defined(found.comparison.p),
        "p_holm": defined(found.p_holm),
        "n_pairs_of_runs": found.n_pairs_of_runs,
        "n_cases": found.n_cases,
        "n_patients": found.n_patients,
        "resampled": list(found.resampled),
    }


def _run_json(table: Table, training: Training) -> dict[str, Any]:
    run = training.run
    return {
        "run": _relative(table, run.folder),
        "draw": run.draw,
        "fold": run.fold,
        "seed": run.seed,
        "settings": training.spec.changed_settings,
        "dice": {name: defined(value) for name, value in mean_per_class([training.dice], table.plan.classes).items()},
        "mean_dice": defined(training.mean_dice),
        "alternatives": {name: defined(value) for name, value in training.alternatives.items()},
        "plans_hash": training.spec.plans_hash,
        "commit": training.commit,
        "labeled_batch_size": training.spec.labeled_batch_size,
        "unlabeled_batch_size": training.spec.unlabeled_batch_size,
        "device": training.spec.device,
        "threads": training.spec.threads,
        "finished": training.finished,
        "wall_seconds": round(training.wall_seconds, 1),
        "wall_seconds_from": training.wall_seconds_from,
        "peak_memory_mb": defined(training.peak_memory_mb),
    }


def _difference_cells(found: Difference | None) -> list[str]:
    """Points, interval, corrected p."""
    if found is None:
        return ["-", "-", "-"]
    low, high = (_format(100 * value, "{:+.2f}") for value in (found.comparison.low, found.comparison.high))
    interval = "-" if "-" in (low, high) else f"{low} to {high}"
    return [_format(100 * found.comparison.estimate, "{:+.2f}"), interval, _format(found.p_holm, "{:.4f}")]


def _dice(value: float) -> str:
    return _format(value, "{:.4f}")


def _format(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)


def _relative(table: Table, folder: Path) -> str:
    return folder.relative_to(table.plan.workspace.root).as_posix()
