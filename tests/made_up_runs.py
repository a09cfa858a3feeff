"""Finished run folders without any training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from autossl.data.runs import CHECKPOINT_FINAL, RUN_FILE, RunSpec
from autossl.evaluation.benchmark.request import PlannedRun, Role, RowKey

Dice = Mapping[str, Mapping[str, float | None]]


def planned_run(
    results: Path,
    method: str = "supervised",
    role: Role = "method",
    labeled: str | None = "8",
    fold: str = "0",
    seed: int = 0,
    draw: int | None = 0,
) -> PlannedRun:
    """A run of Dataset001_X below `results`."""
    split = "default" if labeled is None else f"benchmark-{labeled}_draw-{draw}"
    spec = RunSpec(
        dataset="Dataset001_X",
        split=split,
        configuration="2d",
        preset="nano",
        method=method,
        seed=seed,
        plans_hash="abc",
        total_steps=100,
    )
    folder = results / "Dataset001_X" / split / f"2d__nano__{method}__seed-{seed}"
    return PlannedRun(RowKey(role, method, labeled), draw, fold, seed, spec, folder, spec.total_steps)


def write_fold(run: PlannedRun, dice: Dice, memory_mb: float = 500.0, seconds_per_step: float = 0.5) -> None:
    """The files of a finished fold: checkpoint, log, scores."""
    run.summary.parent.mkdir(parents=True, exist_ok=True)
    (run.folder / RUN_FILE).write_text(run.spec.model_dump_json())
    (run.fold_folder / CHECKPOINT_FINAL).write_bytes(b"")
    lines = [
        {"step": step, "phase": "train", "steps_per_second": 1 / seconds_per_step, "memory_mb": memory_mb + step}
        for step in (50, 100)
    ]
    (run.fold_folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_summary(run.summary, dice)


def write_summary(path: Path, dice: Dice) -> None:
    """As evaluation writes it, as far as a benchmark reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = list(next(iter(dice.values())))
    known = {name: [case[name] for case in dice.values() if case[name] is not None] for name in classes}
    means = [sum(values) / len(values) for values in known.values() if values]
    content = {
        "foreground_mean": {"dice": sum(means) / len(means) if means else None},
        "cases": {case: {name: {"dice": value} for name, value in scores.items()} for case, scores in dice.items()},
    }
    path.write_text(json.dumps(content))
