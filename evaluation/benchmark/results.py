"""Reads finished runs: scores per case, speed, memory, and the record of how they were made."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from autossl.data.files import read_json, write_json
from autossl.data.runs import RunSpec, read_run
from autossl.evaluation.benchmark.request import PlannedRun
from autossl.evaluation.metrics import mean_of_defined

RECORD = "benchmark.json"
"""In a fold's folder: which commit trained it and how long that took; one entry per call that worked on it."""
Dice = Mapping[str, Mapping[str, float]]
"""Case → class → Dice; NaN where it is undefined."""


@dataclass(frozen=True)
class Training:
    """A finished run of the table, as it lies on disk."""

    run: PlannedRun
    spec: RunSpec
    """As run.json holds it, with what was decided and measured when it started."""
    dice: Dice
    mean_dice: float
    """As in the fold's summary: the mean over the classes of the means over the cases."""
    alternatives: Mapping[str, float]
    """Predictions that are not deployed, such as a teacher's → mean Dice."""
    commit: str | None
    """Of the package when it was trained; None where another command trained it."""
    wall_seconds: float
    wall_seconds_from: str
    """ "record": start to end of the command; "log": the steps alone, where another command trained it."""
    peak_memory_mb: float
    finished: str
    """When the scores were written, UTC."""


def read_training(run: PlannedRun) -> Training:
    """What a finished run reached.

    Raises:
        InvalidInput: run.json or summary.json is damaged.
    """
    summary = read_json(run.summary)
    log = read_log(run.fold_folder)
    attempts = read_attempts(run.fold_folder)
    finished = datetime.fromtimestamp(run.summary.stat().st_mtime, timezone.utc)
    return Training(
        run=run,
        spec=read_run(run.folder),
        dice=dice_of(summary),
        mean_dice=_number(summary["foreground_mean"]["dice"]),
        alternatives={
            path.parent.name.removeprefix("validation_"): _number(read_json(path)["foreground_mean"]["dice"])
            for path in sorted(run.fold_folder.glob("validation_*/summary.json"))
        },
        commit=" then ".join(dict.fromkeys(entry["commit"] for entry in attempts)) or None,
        wall_seconds=math.fsum(entry["seconds"] for entry in attempts) if attempts else _seconds_of_steps(log),
        wall_seconds_from="record" if attempts else "log",
        peak_memory_mb=max((line["memory_mb"] for line in log), default=math.nan),
        finished=finished.isoformat(timespec="seconds"),
    )


def dice_of(summary: Mapping[str, Any]) -> Dice:
    """Case → class → Dice of a summary.json."""
    return {
        case: {name: _number(scores["dice"]) for name, scores in classes.items()}
        for case, classes in summary["cases"].items()
    }


def mean_per_class(dice: Sequence[Dice], classes: Sequence[str] = ()) -> dict[str, float]:
    """Class → mean over all trainings and cases where it is defined; NaN where it is nowhere."""
    names = classes or list(dict.fromkeys(name for scores in dice for case in scores.values() for name in case))
    values = {name: [case[name] for scores in dice for case in scores.values() if name in case] for name in names}
    return {name: mean_of_defined(found)[0] for name, found in values.items()}


def defined(value: float) -> float | None:
    """As it is written to JSON: null where it is undefined."""
    return None if math.isnan(value) else value


# -------------------------------------------------------------------------------------------------------------- logs


def read_log(fold_folder: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl; one that is just being written is left out."""
    path, lines = fold_folder / "log.jsonl", []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def last_step(fold_folder: Path) -> int:
    """Steps done, as far as the log knows; 0 where there is none."""
    lines = read_log(fold_folder)
    return int(lines[-1]["step"]) if lines else 0


def median_steps_per_second(fold_folder: Path) -> float | None:
    """While it was trained, beside whatever else ran; None without a log. For estimates only."""
    lines = read_log(fold_folder)
    return statistics.median(line["steps_per_second"] for line in lines) if lines else None


def _seconds_of_steps(log: Sequence[Mapping[str, Any]]) -> float:
    before = [0, *(line["step"] for line in log[:-1])]
    return math.fsum((line["step"] - start) / line["steps_per_second"] for start, line in zip(before, log, strict=True))


# ------------------------------------------------------------------------------------------------------------ record


def read_attempts(fold_folder: Path) -> list[dict[str, Any]]:
    """Calls of the benchmark that worked on this fold: started, seconds, commit, exit_code, jobs."""
    path = fold_folder / RECORD
    return list(read_json(path)["attempts"]) if path.is_file() else []


def add_attempt(fold_folder: Path, attempt: Mapping[str, Any]) -> None:
    """Keeps how a fold was made beside it; nothing where its training never began."""
    if fold_folder.is_dir():
        write_json(fold_folder / RECORD, {"attempts": [*read_attempts(fold_folder), dict(attempt)]})


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
