"""A benchmark from request to files: the function behind `autossl_benchmark`."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from autossl.data.runs import RunFilter, find_runs
from autossl.evaluation.benchmark import costs, history
from autossl.evaluation.benchmark.execute import FailedRun, OnProgress, run_missing
from autossl.evaluation.benchmark.plot import FILE as PLOT
from autossl.evaluation.benchmark.plot import draw_table
from autossl.evaluation.benchmark.report import Table, write_table
from autossl.evaluation.benchmark.request import BenchmarkPlan, BenchmarkRequest, PlannedRun, plan_benchmark
from autossl.evaluation.benchmark.results import last_step, median_steps_per_second, read_training
from autossl.evaluation.benchmark.tables import build_rows
from autossl.evaluation.benchmark.verify import Verification, verify
from autossl.trainers.provide import provide_cases

__all__ = ["BenchmarkOptions", "BenchmarkRequest", "BenchmarkResult", "Outlook", "run_benchmark", "what_would_run"]


@dataclass(frozen=True)
class BenchmarkOptions:
    """What to do besides training, and where results go."""

    output: Path | None = None
    """Folder; None: results/DATASET/benchmarks/NAME in the workspace, NAME from what is compared."""
    history: Path | None = None
    """File; None: results/DATASET/benchmarks/history.jsonl in the workspace."""
    table_only: bool = False
    """Train and time nothing."""
    cost: bool = True
    """Time the methods that were not timed yet."""
    cost_steps: int | None = None
    """Time all methods anew, with so many steps."""
    verify: bool = False


@dataclass(frozen=True)
class BenchmarkResult:
    """What came out."""

    table: Table
    output: Path
    history: Path
    n_new_in_history: int
    failed: tuple[FailedRun, ...]
    verification: Verification | None


def run_benchmark(
    request: BenchmarkRequest, options: BenchmarkOptions | None = None, on_progress: OnProgress | None = None
) -> BenchmarkResult:
    """Runs what is missing, times the methods, and writes table.txt, table.csv, table.json, table.png and the history.

    Args:
        request: What is compared.
        options: Where results go, and what is left out.
        on_progress: Called with (what, done, total, figures).

    Raises:
        InvalidInput: the request cannot be met, or runs on disk have another specification; nothing was run.
        KeyboardInterrupt: asked to stop; another call goes on.
    """
    options = options or BenchmarkOptions()
    plan = plan_benchmark(request)
    place = plan.workspace.results_folder(plan.dataset) / "benchmarks"
    output = options.output or place / plan.name
    failed: list[FailedRun] = []
    timed = costs.read_costs(output / costs.FILE)
    if not options.table_only:
        for setup in plan.setups:  # before trainings that share the files run side by side
            provide_cases(setup)
        failed = run_missing(plan, output / "logs", on_progress)
        if options.cost:
            timed = costs.time_methods(plan, output / costs.FILE, options.cost_steps, on_progress)
    table = make_table(plan, timed)
    write_table(table, output)
    draw_table(output / PLOT, table)
    history_file = options.history or place / history.FILE
    trainings = [training for row in table.rows for training in row.trainings]
    n_new = history.append_history(history_file, trainings, plan.workspace.root)
    verification = None
    if options.verify:
        report = None if on_progress is None else lambda what, done, total: on_progress(what, done, total, {})
        verification = verify(plan, table.rows, report)
    return BenchmarkResult(table, output, history_file, n_new, tuple(failed), verification)


def make_table(plan: BenchmarkPlan, timed: list[costs.Cost]) -> Table:
    """The table of the runs that are finished."""
    trainings = [read_training(run) for run in plan.runs if run.is_finished]
    rows = build_rows(Counter(run.row for run in plan.runs), trainings, plan.classes, plan.patients)
    found = {run.row: cost for run in plan.runs if (cost := costs.cost_of(timed, plan, run)) is not None}
    return Table(plan, tuple(rows), found, tuple(run for run in plan.runs if not run.is_finished))


# ---------------------------------------------------------------------------------------------------- before running


@dataclass(frozen=True)
class Outlook:
    """What a call would run."""

    plan: BenchmarkPlan
    steps_left: Mapping[PlannedRun, int]
    """Runs that are not finished, in the order of the table."""
    seconds: Mapping[PlannedRun, float]
    """Of those whose method was trained here before with the same plans; estimates."""

    @property
    def total_seconds(self) -> float:
        """Of the runs whose speed is known, shared among the jobs."""
        return sum(self.seconds.values()) / self.plan.request.jobs


def what_would_run(request: BenchmarkRequest) -> Outlook:
    """Checks a request and says what is missing; trains nothing.

    Raises:
        InvalidInput: as `run_benchmark`.
    """
    plan = plan_benchmark(request)
    missing = [run for run in plan.runs if not run.is_finished]
    left = {run: max(0, run.spec.total_steps - last_step(run.fold_folder)) for run in missing}
    speeds = _known_speeds(plan)
    known = {run: steps / speeds[run.spec.method] for run, steps in left.items() if run.spec.method in speeds}
    return Outlook(plan, left, known)


def _known_speeds(plan: BenchmarkPlan) -> dict[str, float]:
    """Method → steps per second, of runs with the same configuration, preset and plans, finished or not."""
    hashes = {run.spec.plans_hash for run in plan.runs}
    wanted = RunFilter(configuration=plan.request.configuration, preset=plan.preset)
    speeds: dict[str, list[float]] = {}
    for found in find_runs(plan.workspace, plan.dataset, wanted):
        if found.spec.plans_hash in hashes:
            folders = [found.folder / f"fold_{fold}" for fold in found.states]
            speeds.setdefault(found.spec.method, []).extend(filter(None, map(median_steps_per_second, folders)))
    return {method: statistics.median(values) for method, values in speeds.items() if values}
