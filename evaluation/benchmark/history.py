"""The history of a benchmark: one line of JSON per finished run ever seen, so that no figure is lost or chosen."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from autossl.data.files import content_hash
from autossl.evaluation.benchmark.results import Training, defined, mean_per_class

logger = logging.getLogger(__name__)

FILE = "history.jsonl"
IDENTITY = ("run", "fold", "commit", "steps", "plans_hash", "settings", "dice")
"""What makes a line another one. A run that was made again by another commit, or came out otherwise, is a new line."""


def append_history(path: Path, trainings: Iterable[Training], root: Path) -> int:
    """Appends the runs that the file does not hold yet; the number of new lines.

    Args:
        path: Of the file, JSON lines; it is only ever appended to.
        trainings: Finished runs.
        root: Of the workspace; run folders are written relative to it.
    """
    known = {_identity(line) for line in read_history(path)}
    lines = {_identity(line): line for training in trainings if _identity(line := _line(training, root)) not in known}
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
        with path.open("a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + "".join(json.dumps(line) + "\n" for line in lines.values()))
    return len(lines)


def read_history(path: Path) -> list[dict[str, Any]]:
    """All whole lines."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            logger.warning("%s: a line is cut off and was left out", path)
    return lines


def _line(training: Training, root: Path) -> dict[str, Any]:
    run, spec = training.run, training.spec
    return {
        "date": training.finished,
        "commit": training.commit,
        "dataset": spec.dataset,
        "configuration": spec.configuration,
        "preset": spec.preset,
        "method": spec.method,
        "settings": spec.changed_settings,
        "labeled": run.row.labeled,
        "draw": run.draw,
        "fold": run.fold,
        "seed": run.seed,
        "steps": spec.total_steps,
        "plans_hash": spec.plans_hash,
        "dice": {name: defined(value) for name, value in mean_per_class([training.dice]).items()},
        "mean_dice": defined(training.mean_dice),
        "wall_seconds": round(training.wall_seconds, 1),
        "run": run.folder.relative_to(root).as_posix(),
    }


def _identity(line: dict[str, Any]) -> str:
    return content_hash({name: line.get(name) for name in IDENTITY})
