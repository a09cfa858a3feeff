"""A finished run goes on: what may be extended, and what that does to its schedule."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from autossl.data.files import remove_folder, write_json
from autossl.data.problems import InvalidInput, Problem
from autossl.data.runs import (
    CHECKPOINT_FINAL,
    CHECKPOINT_LATEST,
    RUN_FILE,
    RunSpec,
    fold_state,
    read_run,
    spec_differences,
)
from autossl.inference.checkpoint import read_checkpoint
from autossl.trainers.base import SemiSupervisedTrainer
from autossl.trainers.checkpoints import remove_earlier
from autossl.trainers.optimization import default_groups
from autossl.trainers.phases import Timetable

logger = logging.getLogger(__name__)


def extend_run(folder: Path, asked: RunSpec, method: SemiSupervisedTrainer) -> None:
    """Writes the larger number of steps into run.json where a finished run is asked for with more; else nothing.

    Args:
        folder: of the run.
        asked: the specification with the larger number of steps.
        method: as built for that number.

    Raises:
        InvalidInput: folds would end up with different lengths, or the method has phases or rounds.
    """
    if not (folder / RUN_FILE).is_file():
        return
    stored = read_run(folder)
    same = asked.model_copy(update={"total_steps": stored.total_steps, "extended_at": stored.extended_at})
    started = {path.name.removeprefix("fold_"): fold_state(path) for path in folder.glob("fold_*") if path.is_dir()}
    finished = bool(started) and set(started.values()) == {"finished"}
    if asked.total_steps <= stored.total_steps or not finished or spec_differences(stored, same, list(started)):
        return
    _check(folder, asked, method, started)
    logger.warning("%s", what_changes(method, stored.total_steps, asked.total_steps))
    extended = (*stored.extended_at, stored.total_steps)
    changed = stored.model_copy(update={"total_steps": asked.total_steps, "extended_at": extended})
    write_json(folder / RUN_FILE, changed.model_dump(mode="json"))


def _check(folder: Path, asked: RunSpec, method: SemiSupervisedTrainer, started: Collection[str]) -> None:
    problems = []
    if set(asked.folds) != set(started):
        folds = " ".join(sorted(started))
        problems.append(
            Problem(
                f"folds {' '.join(sorted(asked.folds))} are to be extended, folds {folds} were trained",
                "all trained folds and no others: the folds of a run have one length",
                f"name the folds {folds}",
                file=folder,
            )
        )
    phases = method.phases()
    if len(phases) > 1 or phases[0].refreshes:
        problems.append(
            Problem(
                f"{method.name} lays out phases or rounds over the whole length of a run",
                "a method of one phase: only such a run can be extended",
                "train anew with the larger --steps, and --tag to keep both",
                file=folder,
            )
        )
    if problems:
        raise InvalidInput(problems)


def what_changes(method: SemiSupervisedTrainer, before: int, after: int) -> str:
    """What the extension does to the schedule, in words and figures."""
    phase = method.phases()[0]
    group = (phase.groups or default_groups(method.parts))[0]
    start = method.job.configuration.learning_rate if group.learning_rate is None else group.learning_rate
    old, new = Timetable([phase], before), Timetable([phase], after)
    last, following = (start * group.factor(at) for at in (old.progress(before - 1), new.progress(before)))
    return (
        f"a finished run of {before} steps is extended to {after}: its learning rate, which had come to {last:.3g}, "
        f"goes on with {following:.3g} and falls again; ramps of the method go on at {before / after:.0%} of the run. "
        f"This is not the run that {after} steps from the start would have given: run.json says so (extended_at)"
    )


def reopen_fold(folder: Path, total_steps: int) -> None:
    """Makes a finished fold that is shorter than its run one that goes on.

    What was predicted with its weights is removed first.
    """
    if fold_state(folder) != "finished":
        return
    if int(read_checkpoint(folder / CHECKPOINT_FINAL)["progress"]["total"]) >= total_steps:
        return
    remove_earlier(folder)
    for path in folder.glob("validation*"):
        remove_folder(path)
    (folder / CHECKPOINT_FINAL).replace(folder / CHECKPOINT_LATEST)
