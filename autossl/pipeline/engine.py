"""Engines run what is missing of a list of steps. There is one: `local`.

Another engine is a class with the method `run` of `Engine` and an entry in `engine_named`. A step with a command can be
sent anywhere as it is (its words are an installed command); one with a function is run anywhere by `autossl_run ...
--step NAME` with the options of the experiment. What a step needs and makes is declared, so the order can be relaxed.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, Protocol

from autossl.data.problems import InvalidInput, Problem, nearest
from autossl.data.signals import terminated_as_interrupted
from autossl.evaluation.benchmark.provenance import package_commit
from autossl.evaluation.benchmark.results import add_attempt
from autossl.pipeline.steps import Ledger, Report, Step, check_order, file_name, missing_inputs, total_of

logger = logging.getLogger(__name__)

LOOK_EVERY_S, REPORT_EVERY_S, ESTIMATE_EVERY_S = 0.2, 2.0, 30.0
TAIL_LINES = 15


@dataclass(frozen=True)
class Event:
    """What an engine reports."""

    step: Step
    number: int
    """Of the step, from 1."""
    n_steps: int
    state: Literal["there", "started", "going on", "done"]
    """ "there": it was done before."""
    done: int = 0
    total: int = 0
    """Of what the step is made of; 0 where that is not known."""
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds_left: float | None = None
    """Of all steps whose time is known; None where it is of none."""


OnEvent = Callable[[Event], None]


class Engine(Protocol):
    """Runs steps."""

    def run(self, steps: Sequence[Step], ledger: Ledger, on_event: OnEvent | None = None) -> None:
        """Runs in order what the ledger does not know as done.

        Raises:
            StepFailed: commands that ended with an error; what did not need them was run.
            KeyboardInterrupt: asked to stop; another call goes on.
        """
        ...


class StepFailed(RuntimeError):
    """Commands that did not come to their end, each with the last lines of its output."""


def engine_named(name: str, devices: Sequence[str], logs: Path, inherited: Sequence[int] = ()) -> Engine:
    """The engine of that name.

    Args:
        name: "local".
        devices: Where commands may run, one at a time on each.
        logs: Folder for their output.
        inherited: Descriptors that they keep open, such as that of a lock.

    Raises:
        InvalidInput: with the names there are.
    """
    if name != "local":
        raise InvalidInput(Problem(f"engine '{name}'", f"one of {nearest(name, ['local'])}", "correct --engine"))
    return LocalEngine(tuple(devices), logs, tuple(inherited))


@dataclass
class _Running:
    number: int
    step: Step
    device: str
    process: subprocess.Popen[bytes]
    pipe: int
    """Writing end; the process ends when it is closed."""
    log: Path
    made_from: str
    began: float
    attempt: dict[str, object]


class LocalEngine:
    """On this machine: functions in this process, commands one at a time on each device.

    Args:
        devices: "cpu", or one name per GPU.
        logs: Folder for the output of commands, one file per step.
        inherited: Descriptors that commands keep open.
    """

    def __init__(self, devices: Sequence[str], logs: Path, inherited: Sequence[int] = ()) -> None:
        self._devices, self._logs, self._inherited = tuple(devices), logs, tuple(inherited)

    def run(self, steps: Sequence[Step], ledger: Ledger, on_event: OnEvent | None = None) -> None:
        """See `Engine`."""
        check_order(steps)
        _Course(steps, ledger, on_event or (lambda event: None), self._devices, self._logs, self._inherited).run()


class _Course:
    """One call of the local engine."""

    def __init__(
        self,
        steps: Sequence[Step],
        ledger: Ledger,
        on_event: OnEvent,
        devices: tuple[str, ...],
        logs: Path,
        inherited: tuple[int, ...],
    ) -> None:
        self._steps, self._ledger, self._on_event = steps, ledger, on_event
        self._devices, self._logs, self._inherited = devices, logs, inherited
        self._waiting = list(enumerate(steps, start=1))
        self._running: list[_Running] = []
        self._failed: list[str] = []
        self._blocked: set[Path] = set()
        """Folders in which a command failed."""
        self._reported = self._estimated = time.monotonic() - ESTIMATE_EVERY_S
        self._seconds_left: float | None = None

    def run(self) -> None:
        """To the end, or to the first function that would need a command that failed."""
        with terminated_as_interrupted():
            try:
                while self._waiting or self._running:
                    self._start_all()
                    if self._running:
                        time.sleep(LOOK_EVERY_S)
                        self._look()
            finally:
                self._stop()
        self._raise_failures()

    def _start_all(self) -> None:
        """Starts commands while there are devices; runs functions while nothing else runs."""
        while self._waiting:
            number, step = self._waiting[0]
            if step.run is None:
                if not self._start_a_command():
                    return
                continue
            if self._running:
                return
            self._raise_failures()
            self._waiting.pop(0)
            self._call(number, step, step.run)

    def _start_a_command(self) -> bool:
        """The first of the commands before the next function that may start now; False where none may."""
        busy = {running.device for running in self._running}
        free = [device for device in self._devices if device not in busy]
        taken = {running.step.alone_in for running in self._running}
        for index, (number, step) in enumerate(self._waiting):
            if step.run is not None:
                return False
            if step.alone_in is not None and step.alone_in in self._blocked:
                del self._waiting[index]
                return True
            if step.alone_in is not None and step.alone_in in taken:
                continue
            if self._ledger.is_done(step):
                del self._waiting[index]
                self._say(number, step, "there")
                return True
            if free and step.command is not None:
                del self._waiting[index]
                self._start(number, step, step.command(free[0]), free[0])
                return True
        return False

    def _call(self, number: int, step: Step, function: Callable[[Report], None]) -> None:
        """Runs a function, unless it is done."""
        if self._ledger.is_done(step):
            self._say(number, step, "there")
            return
        self._begin(number, step)
        made_from, began = self._ledger.made_from(step), time.monotonic()
        function(lambda done, total, figures: self._say(number, step, "going on", done, total, figures))
        self._ledger.close(step, time.monotonic() - began, made_from)
        self._say(number, step, "done")

    def _begin(self, number: int, step: Step) -> None:
        missing = missing_inputs(step)
        if missing:
            made = {path: other.name for other in self._steps for path in other.outputs}
            raise RuntimeError(
                f"step '{step.name}' needs {missing[0]}, which is not there"
                + (f" although step '{made[missing[0]]}' is done" if missing[0] in made else "")
            )
        self._say(number, step, "started")

    def _start(self, number: int, step: Step, words: list[str], device: str) -> None:
        """Starts a command."""
        self._begin(number, step)
        self._logs.mkdir(parents=True, exist_ok=True)
        log = self._logs / f"{file_name(step.name)}.log"
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        attempt: dict[str, object] = {"started": now, "commit": package_commit(), "jobs": len(self._devices)}
        reading, writing = os.pipe()
        with log.open("a", encoding="utf-8") as output:
            output.write(f"{now} $ {' '.join(words)}\n")
            output.flush()
            process = subprocess.Popen(
                child_words(reading, words),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(reading, *self._inherited),
            )
        os.close(reading)
        made_from = self._ledger.made_from(step)
        self._running.append(
            _Running(number, step, device, process, writing, log, made_from, time.monotonic(), attempt)
        )

    def _look(self) -> None:
        """Reports what runs, and closes what has ended."""
        if time.monotonic() - self._reported >= REPORT_EVERY_S:
            self._reported = time.monotonic()
            for running in self._running:
                done, total = running.step.progress() if running.step.progress else (0, 0)
                self._say(running.number, running.step, "going on", done, total)
        for running in [running for running in self._running if running.process.poll() is not None]:
            self._running.remove(running)
            self._close(running)

    def _close(self, running: _Running) -> None:
        """Notes how a command ended."""
        step, seconds = running.step, self._ended(running)
        code = running.process.returncode
        if code == 0 and all(path.is_file() for path in step.outputs):
            self._ledger.close(step, seconds, running.made_from)
            self._say(running.number, step, "done")
            return
        lines = running.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        ended = f"ended with exit code {code}" if code else "ended without its files"
        self._failed.append(f"{step.name} {ended}; {running.log} ends with:\n" + "\n".join(lines))
        logger.error("%s %s, see %s; what does not need it goes on", step.name, ended, running.log)
        if step.alone_in is not None:
            self._blocked.add(step.alone_in)

    def _ended(self, running: _Running) -> float:
        """Waits for the end; seconds that it took."""
        code = running.process.wait()
        os.close(running.pipe)
        seconds = time.monotonic() - running.began
        if running.step.record_in is not None:
            attempt = {**running.attempt, "seconds": round(seconds, 1), "exit_code": code}
            add_attempt(running.step.record_in, attempt)
        return seconds

    def _stop(self) -> None:
        """Every command saves its state and ends."""
        for running in self._running:
            running.process.terminate()
        for running in self._running:
            self._ended(running)
        self._running = []

    def _raise_failures(self) -> None:
        if self._failed:
            raise StepFailed("\n\n".join(self._failed))

    def _say(
        self,
        number: int,
        step: Step,
        state: Literal["there", "started", "going on", "done"],
        done: int = 0,
        total: int = 0,
        figures: Mapping[str, float] | None = None,
    ) -> None:
        due = time.monotonic() - self._estimated >= ESTIMATE_EVERY_S
        if state in ("started", "done") or due:  # it reads many files
            self._estimated = time.monotonic()
            left = [other for _, other in self._waiting] + [running.step for running in self._running]
            if state in ("started", "going on") and step not in left:
                left.append(step)
            seconds = total_of([other.estimate().seconds for other in left])
            self._seconds_left = None if seconds is None else seconds / len(self._devices)
        self._on_event(Event(step, number, len(self._steps), state, done, total, figures or {}, self._seconds_left))


def child_words(pipe: int, words: Sequence[str]) -> list[str]:
    """A command in a process that ends when the pipe closes."""
    return [sys.executable, "-P", "-m", "autossl.pipeline.child", str(pipe), *words]
