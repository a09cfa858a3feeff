"""Progress bars with the time left, fed by the callbacks of the functions behind the commands.

On a terminal a live bar; elsewhere (a log file, CI) a line now and then. Nothing of it goes to standard output.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

SECONDS_BETWEEN_LINES = 30.0
Update = Callable[..., None]
"""Called with (done, total) or (done, total, named values to show beside the bar)."""


class CommandProgress:
    """Shows how far each part of a command is; a context manager.

    Args:
        quiet: Show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._lines: dict[str, _Lines] = {}

    def __enter__(self) -> CommandProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def part(self, name: str) -> Update:
        """The callback of one part, to be handed to a function's `progress` argument."""

        def update(done: int, total: int, values: Mapping[str, float] | None = None) -> None:
            self.update(name, done, total, values)

        return update

    def update(self, name: str, done: int, total: int, values: Mapping[str, float] | None = None) -> None:
        """Sets a part to `done` of `total`; the part appears with its first call."""
        if self._quiet:
            return
        details = " ".join(f"{key} {value:.3g}" for key, value in (values or {}).items())
        if sys.stderr.isatty() or self._bars is not None:
            self._move_bar(name, done, total, details)
        else:
            self._say_line(name, done, total, details)

    def say(self, line: str) -> None:
        """A line of its own, above the bars where there are some."""
        if self._bars is not None:
            self._bars.console.print(line, highlight=False, markup=False)
        elif not self._quiet:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def _move_bar(self, name: str, done: int, total: int, details: str) -> None:
        if self._bars is None:
            self._bars = _new_bars()
            self._bars.start()
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, completed=done, details=details)
        self._bars.update(self._tasks[name], completed=done, total=total, details=details)

    def _say_line(self, name: str, done: int, total: int, details: str) -> None:
        now = time.monotonic()
        lines = self._lines.get(name)
        if lines is None or done < lines.done:  # the first call, or the same part once more (of the next fold, say)
            lines = self._lines[name] = _Lines(started=now, said=now)
        repeated, lines.done = done == lines.done, done
        if repeated or (done < total and now - lines.said < SECONDS_BETWEEN_LINES):
            return
        lines.said = now
        took = now - lines.started
        ending = f" in {duration(took)}" if done == total else f", about {duration(took / done * (total - done))} left"
        sys.stderr.write(f"{name}: {done} of {total}{ending}{'  ' + details if details else ''}\n")


@dataclass
class _Lines:
    """What was said of a part, away from a terminal."""

    started: float
    said: float
    done: int = 0


def _new_bars() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[details]}"),
        console=Console(stderr=True),
    )


def duration(seconds: float) -> str:
    """Seconds in words: 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
