"""Runs what is missing: each training is an `autossl_train` of its own, several side by side."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from autossl.data.problems import InvalidInput, Problem
from autossl.data.signals import terminated_as_interrupted
from autossl.evaluation.benchmark.provenance import package_commit
from autossl.evaluation.benchmark.request import BenchmarkPlan, PlannedRun
from autossl.evaluation.benchmark.results import add_attempt, last_step

logger = logging.getLogger(__name__)

OnProgress = Callable[[str, int, int, Mapping[str, float]], None]
"""(what, done, total, figures beside them)."""
TAIL_LINES = 15
LOOK_EVERY_S, LOG_EVERY_S = 0.2, 2.0
TRAIN_COMMAND = "autossl_train"


@dataclass(frozen=True)
class FailedRun:
    """A training that did not come to its end."""

    run: PlannedRun
    exit_code: int
    log: Path
    tail: str
    """The last lines of its output."""

    def __str__(self) -> str:
        return f"{self.run} ended with exit code {self.exit_code}; {self.log} ends with:\n{self.tail}"


@dataclass
class _Job:
    """The missing folds of one run folder: one after the other, because they share its run.json."""

    waiting: list[PlannedRun]
    process: subprocess.Popen[bytes] = field(init=False)
    run: PlannedRun = field(init=False)
    """The fold that is being trained."""
    log: Path = field(init=False)
    attempt: dict[str, object] = field(init=False)
    began: float = 0.0

    @property
    def has_ended(self) -> bool:
        """Whether the training is over, well or not."""
        return self.process.poll() is not None


def run_missing(plan: BenchmarkPlan, logs: Path, on_progress: OnProgress | None = None) -> list[FailedRun]:
    """Trains every run of the plan that is not finished; one that fails does not stop the others.

    The first seed of all rows comes before the second of any. Ctrl-C and SIGTERM let the trainings save their state.

    Args:
        plan: What is wanted.
        logs: Folder for the output of the trainings, one file per fold.
        on_progress: Called with ("steps", done, total, runs left).

    Raises:
        KeyboardInterrupt: asked to stop; another call goes on.
    """
    missing = [run for run in plan.runs if not run.is_finished]
    if not missing:
        return []
    logs.mkdir(parents=True, exist_ok=True)
    tally = _Tally(missing, on_progress)
    jobs, running, failed = _jobs(missing), list[_Job](), list[FailedRun]()
    with terminated_as_interrupted():
        try:
            while jobs or running:
                while jobs and len(running) < plan.request.jobs:
                    _start_next(plan, jobs[0], logs)
                    running.append(jobs.pop(0))
                time.sleep(LOOK_EVERY_S)
                tally.look([job.run for job in running])
                for job in [job for job in running if job.has_ended]:
                    failed += _close(job)
                    tally.close(job.run)
                    running.remove(job)
                    jobs = [job, *jobs] if job.waiting else jobs
        finally:
            _stop(running)
    return failed


def train_command(plan: BenchmarkPlan, run: PlannedRun) -> list[str]:
    """The command that trains one fold, or goes on with it."""
    request = plan.request
    words = [_executable(), plan.dataset, request.configuration, run.fold, "-m", run.spec.method, "--resume"]
    words += ["--preset", plan.preset, "--steps", str(run.asked_steps), "--seed", str(run.seed)]
    words += ["--device", plan.device, "--workspace", str(plan.workspace.root)]
    if run.row.labeled is not None:
        words += ["--labeled", run.row.labeled, "--draw", str(run.draw)]
    if request.num_workers is not None:
        words += ["--num_workers", str(request.num_workers)]
    if run.settings:
        words += ["--set", *(f"{key}={value}" for key, value in run.settings.items())]
    return words


def environment(one_thread: bool) -> dict[str, str]:
    """Of a training."""
    return {**os.environ, "OMP_NUM_THREADS": "1"} if one_thread else dict(os.environ)


def _executable() -> str:
    """The command beside this Python, else on the path."""
    beside = Path(sys.executable).parent / TRAIN_COMMAND
    found = str(beside) if beside.is_file() else shutil.which(TRAIN_COMMAND)
    if found is None:
        fix = "install autossl into this environment"
        raise InvalidInput(Problem(f"no command {TRAIN_COMMAND}", f"it beside {sys.executable}", fix))
    return found


def _jobs(missing: Sequence[PlannedRun]) -> list[_Job]:
    """One per run folder, ordered by seed and then as in the table."""
    seeds = list(dict.fromkeys(run.seed for run in missing))
    folders: dict[Path, list[PlannedRun]] = {}
    for run in sorted(missing, key=lambda run: seeds.index(run.seed)):
        folders.setdefault(run.folder, []).append(run)
    return [_Job(waiting=runs) for runs in folders.values()]


def _start_next(plan: BenchmarkPlan, job: _Job, logs: Path) -> None:
    run = job.run = job.waiting.pop(0)
    words = train_command(plan, run)
    job.log = logs / f"{run.spec.split}__{run.folder.name}__fold-{run.fold}.log"
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    job.attempt = {"started": now, "commit": package_commit(), "jobs": plan.request.jobs}
    job.began = time.monotonic()
    logger.info("%s: started", run)
    with job.log.open("a", encoding="utf-8") as output:
        output.write(f"{now} $ {' '.join(words)}\n")
        output.flush()
        job.process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(plan.one_thread_each),
        )


def _close(job: _Job) -> list[FailedRun]:
    """Says how a training ended, and keeps its record; the run where it failed."""
    code, seconds = _keep_record(job)
    if code == 0 and job.run.is_finished:
        logger.info("%s: finished in %.0f s", job.run, seconds)
        return []
    lines = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
    failed = FailedRun(job.run, code, job.log, "\n".join(lines[-TAIL_LINES:]))
    logger.error("%s: exit code %d, see %s; the others go on", job.run, code, job.log)
    return [failed]


def _stop(running: Sequence[_Job]) -> None:
    """Every training saves its state and ends."""
    for job in running:
        job.process.terminate()
    for job in running:
        _keep_record(job)


def _keep_record(job: _Job) -> tuple[int, float]:
    """Exit code and seconds of what has ended or is about to."""
    code, seconds = job.process.wait(), time.monotonic() - job.began
    add_attempt(job.run.fold_folder, {**job.attempt, "seconds": round(seconds, 1), "exit_code": code})
    return code, seconds


class _Tally:
    """Steps done of what was missing, read from the logs of the trainings."""

    def __init__(self, missing: Sequence[PlannedRun], on_progress: OnProgress | None) -> None:
        self._left = {run.fold_folder: run.spec.total_steps - last_step(run.fold_folder) for run in missing}
        self._total = sum(self._left.values())
        self._runs_left = len(missing)
        self._on_progress = on_progress
        self._looked = -LOG_EVERY_S
        self.look([])

    def look(self, running: Sequence[PlannedRun]) -> None:
        """Reports what is done now; reads the logs now and then only."""
        if self._on_progress is None or time.monotonic() - self._looked < LOG_EVERY_S:
            return
        self._looked = time.monotonic()
        for run in running:
            left = run.spec.total_steps - last_step(run.fold_folder)
            self._left[run.fold_folder] = min(self._left[run.fold_folder], left)
        self._report()

    def close(self, run: PlannedRun) -> None:
        """A training that ended: nothing is left of it, whether it failed or not."""
        self._left[run.fold_folder] = 0
        self._runs_left -= 1
        self._report()

    def _report(self) -> None:
        if self._on_progress is not None and self._total:
            done = self._total - sum(self._left.values())
            self._on_progress("steps", done, self._total, {"runs left": float(self._runs_left)})
