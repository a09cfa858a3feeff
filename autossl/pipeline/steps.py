"""Steps: named functions of files. A step is done when its outputs are there and were made from today's inputs.

What a step was made from is kept as a hash, one small file per step, so that a killed experiment goes on where it was
and a change (another method beside the first, other cases) redoes what depends on it and nothing else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from autossl.data.files import content_hash, file_hash, read_json, write_json
from autossl.data.problems import InvalidInput, Problem

NOT_CONTENT = ("written",)
"""Entries of a JSON file that say when and with what it was written; the same content written again is no change."""

Report = Callable[[int, int, Mapping[str, float]], None]
"""Called by a step with what is done of it, the total, and figures to show beside."""


@dataclass(frozen=True)
class Estimate:
    """What a step is expected to take; None where nothing is known of it."""

    seconds: float | None = None
    disk_bytes: float | None = None
    memory_bytes: float | None = None


@dataclass(frozen=True)
class Step:
    """One step. It has either a function or a command.

    Steps must be safe to repeat: one that was killed is run again from its start, and takes up what it left itself.
    """

    name: str
    inputs: tuple[Path, ...]
    """Files."""
    outputs: tuple[Path, ...]
    """Files; the one that makes the others valid is written last."""
    run: Callable[[Report], None] | None = None
    """What is done in this process."""
    command: Callable[[str], list[str]] | None = None
    """Device → words of a command that does it in a process of its own; other engines can send it elsewhere."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """What decides the outputs besides the inputs, as plain values."""
    is_done: Callable[[], bool] | None = None
    """Given, it decides instead of the kept hash: for files that know themselves what they were made from."""
    holds: Callable[[], bool] | None = None
    """Must hold besides the kept hash: for outputs that another step may have overwritten in part."""
    progress: Callable[[], tuple[int, int]] | None = None
    """Of a command: what is done of it, and the total, read from its files."""
    alone_in: Path | None = None
    """Steps that share this folder never run side by side."""
    record_in: Path | None = None
    """Folder of a training that keeps which calls worked on it."""
    estimate: Callable[[], Estimate] = Estimate
    """What is left of it, by what is known now."""

    def __post_init__(self) -> None:
        if (self.run is None) == (self.command is None):
            raise ValueError(f"step '{self.name}' needs a function or a command, and not both")


class Ledger:
    """What each step was made from. One file per step, so that several machines can write side by side.

    Args:
        folder: Of its files.
        root: What paths are named relative to, so that an experiment can be moved.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self._root = folder, root

    def is_done(self, step: Step) -> bool:
        """Whether nothing is left to do."""
        if step.is_done is not None:
            return step.is_done()
        if not all(path.is_file() for path in step.outputs):
            return False
        record = self.record(step)
        if record is None or record.get("made_from") != self.made_from(step):
            return False
        return step.holds is None or step.holds()

    def close(self, step: Step, seconds: float, made_from: str) -> None:
        """Notes that a step has ended well; `made_from` is of the moment when it began.

        Nothing of steps whose files know themselves.
        """
        if step.is_done is not None:
            return
        finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
        content = {"step": step.name, "made_from": made_from, "seconds": round(seconds, 1), "finished": finished}
        write_json(self._path(step), content)

    def record(self, step: Step) -> dict[str, Any] | None:
        """What was noted when it ended the last time; None where nothing was, or not readably."""
        try:
            found = read_json(self._path(step))
        except InvalidInput:
            return None
        return found if isinstance(found, dict) else None

    def made_from(self, step: Step) -> str:
        """Hash of inputs and parameters as they are now."""
        inputs = {self._relative(path): input_hash(path) for path in step.inputs}
        return content_hash({"inputs": inputs, "parameters": dict(step.parameters)}, 16)

    def _path(self, step: Step) -> Path:
        return self.folder / f"{file_name(step.name)}.json"

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self._root)) if path.is_relative_to(self._root) else str(path)


def file_name(name: str) -> str:
    """A step's name as that of a file."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_")


def input_hash(path: Path) -> str | None:
    """Of a file's content; JSON without the entries that say when it was written. None where the file is not there."""
    if not path.is_file():
        return None
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError):
            return file_hash(path)
        if isinstance(content, dict):
            content = {key: value for key, value in content.items() if key not in NOT_CONTENT}
        return content_hash(content, 16)
    return file_hash(path)


def check_order(steps: Sequence[Step]) -> None:
    """Raises where a name stands twice, or a step needs what a later one makes: a defect of whoever listed them."""
    names = [step.name for step in steps]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"steps with the same name: {', '.join(twice)}")
    later: set[Path] = {path for step in steps for path in step.outputs}
    for step in steps:
        missing = later.intersection(step.inputs)
        if missing:
            raise ValueError(f"step '{step.name}' needs {sorted(map(str, missing))[0]}, which a later step makes")
        later -= set(step.outputs)


def missing_inputs(step: Step) -> list[Path]:
    """Inputs that are not there."""
    return [path for path in step.inputs if not path.is_file()]


def find_step(steps: Sequence[Step], name: str) -> Step:
    """The step of that name.

    Raises:
        InvalidInput: with the names there are.
    """
    named = {step.name: step for step in steps}
    if name not in named:
        raise InvalidInput(Problem(f"no step '{name}'", f"one of: {', '.join(named)}", "correct the name"))
    return named[name]


def total_of(estimates: Collection[float | None]) -> float | None:
    """Sum of what is known; None where nothing is."""
    known = [value for value in estimates if value is not None]
    return sum(known) if known else None
