"""What a step of each method costs, relative to the twin's: short runs alone on the machine, thrown away afterwards.

The trainings of a benchmark may run side by side and slow each other down, so their speeds are no costs.
"""

from __future__ import annotations

import logging
import math
import statistics
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from autossl.data.files import content_hash, read_json, write_json
from autossl.data.runs import read_run
from autossl.data.signals import terminated_as_interrupted
from autossl.data.workspace import Workspace
from autossl.evaluation.benchmark.execute import OnProgress, environment, train_command
from autossl.evaluation.benchmark.provenance import machine, package_commit
from autossl.evaluation.benchmark.request import BenchmarkPlan, PlannedRun
from autossl.evaluation.benchmark.results import read_log

logger = logging.getLogger(__name__)

FILE = "costs.json"
STEPS = 60
DRIFT = 0.1
"""The twin is timed first and last; where both differ by more, the machine was not quiet."""
KEY = ("method", "settings_hash", "configuration", "plan_hash")
FOLD = "all"
"""Has no validation cases, so that a timing run ends with its last step."""


@dataclass(frozen=True)
class Cost:
    """A method's step beside the twin's, timed one after the other."""

    method: str
    settings_hash: str
    configuration: str
    plan_hash: str
    """Of the configuration's plan: network, patch, batch."""
    seconds_per_step: float
    twin_seconds_per_step: float
    """Mean of the two timings before and after."""
    twin_drift: float
    """Relative difference of these two."""
    factor: float
    peak_memory_mb: float
    steps: int
    threads: int | None
    device: str
    machine: str
    commit: str
    date: str


def read_costs(path: Path) -> list[Cost]:
    """What was timed before; the latest of each method."""
    return [Cost(**entry) for entry in read_json(path)["costs"]] if path.is_file() else []


def cost_of(costs: Iterable[Cost], plan: BenchmarkPlan, run: PlannedRun) -> Cost | None:
    """The cost of the method of a run; None where it was not timed with these settings and this plan."""
    return next((cost for cost in costs if _key_of(cost) == _key(plan, run)), None)


def time_methods(
    plan: BenchmarkPlan, path: Path, steps: int | None = None, on_progress: OnProgress | None = None
) -> list[Cost]:
    """Times the methods that were not timed yet (all of them where `steps` is given), alone, and keeps the figures.

    Args:
        plan: Whose methods; the first budget, draw and seed are used.
        path: Where the figures are kept, JSON.
        steps: Length of a timing run; None: 60, and methods that have a figure are left as they are.
        on_progress: Called with ("timing", done, total, {}).
    """
    known = read_costs(path)
    first = plan.runs[0]
    runs = {run.row.method: run for run in reversed(plan.runs) if run.row.labeled == first.row.labeled}
    wanted = [run for run in runs.values() if run.row.role == "method"]
    wanted = [run for run in reversed(wanted) if steps is not None or cost_of(known, plan, run) is None]
    if not wanted:
        return known
    timed = _time_beside_twin(plan, first, wanted, steps or STEPS, on_progress)
    keys = [_key_of(cost) for cost in timed]
    costs = [cost for cost in known if _key_of(cost) not in keys] + timed
    write_json(path, {"costs": [asdict(cost) for cost in costs]})
    return costs


@dataclass(frozen=True)
class _Timing:
    seconds_per_step: float
    peak_memory_mb: float
    threads: int | None


def _time_beside_twin(
    plan: BenchmarkPlan, twin: PlannedRun, runs: Sequence[PlannedRun], steps: int, on_progress: OnProgress | None
) -> list[Cost]:
    """Twin, methods, twin again; a method that fails is left out with a warning."""
    order = [twin, *runs, twin]
    timings: list[_Timing | None] = []
    with terminated_as_interrupted():
        for number, run in enumerate(order):
            if on_progress is not None:
                on_progress("timing", number, len(order), {})
            timings.append(_time(plan, run, steps))
    if on_progress is not None:
        on_progress("timing", len(order), len(order), {})
    twins = [timing.seconds_per_step for timing in (timings[0], timings[-1]) if timing is not None]
    if not twins:
        return []
    base = statistics.mean(twins)
    drift = (max(twins) - min(twins)) / base
    if drift > DRIFT:
        logger.warning(
            "the twin's step took %.3f s before the timings and %.3f s after them: the machine was not quiet, the cost "
            "factors are rough; give --cost_steps to time them again",
            twins[0],
            twins[-1],
        )
    shared: dict[str, Any] = {
        "twin_seconds_per_step": base,
        "twin_drift": drift,
        "steps": steps,
        "device": plan.device,
        "machine": machine(plan.device),
        "commit": package_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    pairs = [(run, timing) for run, timing in zip(runs, timings[1:-1], strict=True) if timing is not None]
    return [
        Cost(**_key(plan, run), factor=timing.seconds_per_step / base, **asdict(timing), **shared)
        for run, timing in pairs
    ]


def _time(plan: BenchmarkPlan, run: PlannedRun, steps: int) -> _Timing | None:
    """Trains for some steps in a workspace of its own that only points to the data; None where that fails."""
    short = replace(run, fold=FOLD, asked_steps=steps)
    with tempfile.TemporaryDirectory(prefix="autossl_timing_") as folder:
        scratch = Workspace(Path(folder))
        for target, source in (
            (scratch.raw / plan.dataset, plan.workspace.raw_folder(plan.dataset)),
            (scratch.preprocessed_folder(plan.dataset), plan.workspace.preprocessed_folder(plan.dataset)),
        ):
            target.parent.mkdir()
            target.symlink_to(source, target_is_directory=True)
        words = train_command(replace(plan, workspace=scratch), short)
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment(plan.one_thread_each))
        runs = sorted(scratch.results.glob("*/*/*/run.json"))
        if done.returncode != 0 or len(runs) != 1:
            said = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            logger.warning("%s could not be timed, exit code %d:\n%s", run.row, done.returncode, said)
            return None
        log = read_log(runs[0].parent / f"fold_{FOLD}")
        memory = max(line["memory_mb"] for line in log)
        return _Timing(seconds_per_step(log), memory, read_run(runs[0].parent).threads)


def seconds_per_step(log: Sequence[Mapping[str, Any]]) -> float:
    """Of a timing run: per phase the median of its second half, weighted by the steps of the phase."""
    phases: dict[str, list[float]] = {}
    steps: dict[str, int] = {}
    before = 0
    for line in log:
        phases.setdefault(line["phase"], []).append(1 / line["steps_per_second"])
        steps[line["phase"]] = steps.get(line["phase"], 0) + line["step"] - before
        before = line["step"]
    times = {name: statistics.median(seconds[len(seconds) // 2 :]) for name, seconds in phases.items()}
    return math.fsum(times[name] * steps[name] for name in times) / sum(steps.values())


def _key(plan: BenchmarkPlan, run: PlannedRun) -> dict[str, Any]:
    """What a figure is of."""
    return {
        "method": run.row.method,
        "settings_hash": content_hash(run.spec.settings),
        "configuration": plan.request.configuration,
        "plan_hash": content_hash(plan.setups[0].configuration.model_dump(mode="json")),
    }


def _key_of(cost: Cost) -> dict[str, Any]:
    return {name: value for name, value in asdict(cost).items() if name in KEY}
