"""Runs: their folders, the specification each was made with, and finding them again."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autossl.data.draws import normal_budget
from autossl.data.files import REMOVING, content_hash, read_json, remove_folder, remove_remnants, write_json
from autossl.data.locks import lock_beside
from autossl.data.problems import InvalidInput, Problem, nearest, schema_faults
from autossl.data.splits import Fold
from autossl.data.workspace import Workspace

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
CHECKPOINT_LATEST = "checkpoint_latest.pth"
CHECKPOINT_PREVIOUS = "checkpoint_previous.pth"
CHECKPOINT_FINAL = "checkpoint_final.pth"
NAME_PART = re.compile(r"^[A-Za-z0-9][A-Za-z0-9.-]*(_[A-Za-z0-9.-]+)*$")
"""No double underscore (it parts the names of a folder), nothing that a file system refuses."""
IDENTITY = (
    "dataset",
    "split",
    "configuration",
    "preset",
    "method",
    "tag",
    "seed",
    "plans_hash",
    "settings",
    "total_steps",
    "extended_at",
    "labeled_batch_size",
    "unlabeled_batch_size",
    "initial_weights",
)
"""Fields that must agree for a run to be the same; the cases are compared per fold besides."""
FoldState = Literal["absent", "unfinished", "finished"]


class RunSpec(BaseModel):
    """The whole specification of a run, as run.json holds it. Keys of later versions are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    dataset: str
    split: str
    configuration: str
    preset: str
    method: str
    tag: str | None = None
    seed: int
    plans_hash: str
    settings: dict[str, Any] = {}
    """All of the method's settings, resolved."""
    changed_settings: dict[str, Any] = {}
    """Those that differ from the defaults."""
    total_steps: int = Field(ge=1)
    extended_at: tuple[int, ...] = ()
    """Steps at which the run was finished and then extended: its schedule was not made for its length."""
    deterministic: bool = False
    """Whether only deterministic operations were allowed (--deterministic). Not compared."""
    labeled_batch_size: int | None = None
    unlabeled_batch_size: int | None = None
    initial_weights: str | None = None
    """What --init named: the hash of a file, or that of the specification of a run."""
    initial: dict[str, dict[str, Any]] = {}
    """Fold → the weights it started from: hash, run and fold, which weights matched, which cases they have seen."""
    folds: dict[str, Fold] = {}
    """Fold ("0", …, "all") → its cases at the time it was started."""
    fold_facts: dict[str, dict[str, Any]] = {}
    """Fold → what was measured of its labeled cases and decided from it, with the why. Not compared."""
    memory: dict[str, Any] = {}
    """What the method's memory asked for, with the why. Not compared; the batch size that it decided is."""
    compile: dict[str, Any] = {}
    """Whether networks are compiled in training, with the why. Not compared: a run keeps what it began with."""
    threads: int | None = None
    device: str | None = None
    versions: dict[str, str] = {}


@dataclass(frozen=True)
class FoundRun:
    """A run on disk."""

    folder: Path
    spec: RunSpec

    @property
    def states(self) -> dict[str, FoldState]:
        """Fold → state, of the folds that were started."""
        names = sorted(path.name for path in self.folder.glob("fold_*") if path.is_dir())
        return {name.removeprefix("fold_"): fold_state(self.folder / name) for name in names}

    def __str__(self) -> str:
        return f"{self.folder} ({', '.join(f'{k} {v}' for k, v in self.states.items()) or 'nothing trained'})"


@dataclass(frozen=True)
class RunFilter:
    """What a run must be; None accepts all."""

    configuration: str | None = None
    preset: str | None = None
    method: str | None = None
    labeled: str | None = None
    """A benchmark budget; "all" for runs without one."""
    draw: int | None = None
    seed: int | None = None
    tag: str | None = None
    """ "" for runs without a tag."""
    split: str | None = None

    def accepts(self, spec: RunSpec) -> bool:
        """Whether a run's specification fits."""
        actual: dict[str, Any] = {
            "configuration": spec.configuration,
            "preset": spec.preset,
            "method": spec.method,
            "seed": spec.seed,
            "tag": spec.tag or "",
        }
        return self.accepts_split(spec.split) and all(getattr(self, k) in (None, value) for k, value in actual.items())

    def accepts_split(self, split: str) -> bool:
        """Whether the name of a split fits: its budget and draw, and the name itself."""
        budget, draw = _budget_of(split)
        labeled = self.labeled if self.labeled in (None, "all") else normal_budget(self.labeled)
        return labeled in (None, budget) and self.draw in (None, draw) and self.split in (None, split)

    def __str__(self) -> str:
        given = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return ", ".join(f"{name} {value!r}" for name, value in given.items() if value is not None) or "no condition"


def tag_for(changed_settings: Mapping[str, Any]) -> str | None:
    """A tag that is the same for the same changed settings; None where nothing was changed."""
    return f"set-{content_hash(dict(changed_settings), 8)}" if changed_settings else None


def run_folder(workspace: Workspace, spec: RunSpec) -> Path:
    """results/<dataset>/<split>/<configuration>__<preset>__<method>[__<tag>]__seed-<s>.

    Raises:
        InvalidInput: where a part cannot be in a folder's name.
    """
    parts = {"configuration": spec.configuration, "preset": spec.preset, "method": spec.method}
    if spec.tag:
        parts["tag"] = spec.tag
    problems = [
        Problem(
            f"the {name} '{part}'",
            "letters, digits, '.', '-' and single '_' between them",
            f"choose another {name}",
        )
        for name, part in parts.items()
        if not NAME_PART.match(part)
    ]
    if problems:
        raise InvalidInput(problems)
    return workspace.results_folder(spec.dataset) / spec.split / "__".join([*parts.values(), f"seed-{spec.seed}"])


def fold_state(fold_folder: Path) -> FoldState:
    """Of one fold_k folder: finished with its final checkpoint, unfinished with anything less."""
    if (fold_folder / CHECKPOINT_FINAL).is_file():
        return "finished"
    return "unfinished" if fold_folder.is_dir() and any(fold_folder.iterdir()) else "absent"


def fold_lock(folder: Path, fold: str) -> Path:
    """The lock that a training of the fold holds."""
    return lock_beside(folder, f"fold-{fold}")


def open_run(folder: Path, spec: RunSpec, resume: bool = False, overwrite: bool = False) -> RunSpec:
    """Starts a run, or opens one that exists with the same specification; writes run.json.

    Args:
        folder: `run_folder(workspace, spec)`.
        spec: what is asked for; `folds` names the folds that are about to be trained.
        resume: unfinished folds go on, with the cases they were started with.
        overwrite: what exists is removed: the folds that are asked for, or the whole run where it differs.

    Returns:
        The specification that holds: that of run.json with the new folds added. Train with its cases.

    Raises:
        InvalidInput: where the folder holds a run with another specification (naming each field), a fold is unfinished
            and neither `resume` nor `overwrite` was asked for, an extended run would get another fold, or run.json is
            damaged.
    """
    for remnant in folder.parent.glob(f"{REMOVING}*-{folder.name}"):
        shutil.rmtree(remnant, ignore_errors=True)
    remove_remnants(folder, below=False)  # folds are those of who trains them
    stored = _stored_spec(folder, overwrite)
    if stored is None:
        if overwrite:
            remove_folder(folder)
        write_json(folder / RUN_FILE, spec.model_dump(mode="json"))
        return spec
    if not overwrite:
        spec = spec.model_copy(update={"extended_at": stored.extended_at})
    states = {key: fold_state(folder / f"fold_{key}") for key in spec.folds}
    different = spec_differences(stored, spec, [key for key in spec.folds if states[key] != "absent" and not resume])
    if overwrite:
        return _start_again(folder, None if different else stored, spec)
    if different:
        raise InvalidInput(different, title=f"{folder} holds a run with another specification:")
    stuck = [key for key, state in states.items() if state == "unfinished" and not resume]
    if stuck:
        raise InvalidInput(
            Problem(
                f"fold {', '.join(stuck)} of this run was started and not finished",
                "a fold that is absent or finished",
                "continue with --resume, or start again with --overwrite",
                file=folder,
            )
        )
    new = [key for key, state in states.items() if state == "absent"]
    if stored.extended_at and new:
        raise InvalidInput(
            Problem(
                f"fold {', '.join(new)} was not trained when this run was extended",
                "the folds that were extended: those of a run are trained alike",
                "train all folds anew with --tag NAME, or with --overwrite",
                file=folder,
            )
        )
    _log_environment(stored, spec)
    kept = {key for key in spec.folds if states[key] != "absent" and key in stored.folds}
    for key in sorted(kept):
        if stored.folds[key] != spec.folds[key]:
            logger.warning("fold %s goes on with the cases it was started with; the split has changed since", key)
    return _write_merged(folder, stored, spec, kept)


def find_runs(workspace: Workspace, dataset: str, wanted: RunFilter | None = None) -> list[FoundRun]:
    """The dataset's runs that fit, by folder name. Folders with a damaged run.json are passed over with a warning."""
    found = []
    for path in sorted(workspace.results_folder(dataset).glob(f"*/*/{RUN_FILE}")):
        if path.parent.name.startswith(REMOVING):  # a killed --overwrite was about to remove it
            continue
        try:
            spec = read_run(path.parent)
        except InvalidInput as error:
            logger.warning("%s", error)
            continue
        if wanted is None or wanted.accepts(spec):
            found.append(FoundRun(path.parent, spec))
    return found


def choose_run(workspace: Workspace, dataset: str, wanted: RunFilter | None = None) -> FoundRun:
    """The only run that fits.

    Raises:
        InvalidInput: where none or several fit, with the list.
    """
    wanted = wanted or RunFilter()
    found = find_runs(workspace, dataset, wanted)
    if len(found) == 1:
        return found[0]
    listed = "".join(f"\n    {run}" for run in found or find_runs(workspace, dataset))
    if found:
        raise InvalidInput(
            Problem(
                f"{len(found)} runs of {dataset} fit ({wanted}):{listed}\n  ",
                "exactly one",
                "say more with -c -m --preset --labeled --draw --seed --tag, or name the folder with --model",
            )
        )
    raise InvalidInput(
        Problem(
            f"no run of {dataset} fits ({wanted})",
            f"one of these:{listed}\n  " if listed else f"a run in {workspace.results_folder(dataset)}",
            "correct the options" + _suggestion(workspace, dataset, wanted)
            if listed
            else "train one with autossl_train",
        )
    )


def read_run(folder: Path) -> RunSpec:
    """Reads run.json.

    Raises:
        InvalidInput: where it is missing, cut off or makes no sense.
    """
    path = folder / RUN_FILE
    expected = "the specification that autossl_train writes when a run starts"
    try:
        return RunSpec.model_validate(read_json(path))
    except ValidationError as error:
        found = "; ".join(schema_faults(error))
    except InvalidInput as error:
        found = error.problems[0].found
    fix = "restore the file, or start the run again with --overwrite"
    raise InvalidInput(Problem(f"the run's specification cannot be read: {found}", expected, fix, file=path))


def _stored_spec(folder: Path, overwrite: bool) -> RunSpec | None:
    """What run.json says; None where there is no run, or one that will be overwritten is damaged."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    if not (folder / RUN_FILE).exists() and not any(folder.glob("fold_*")):
        return None
    try:
        return read_run(folder)
    except InvalidInput:
        if overwrite:
            return None
        raise


def spec_differences(stored: RunSpec, asked: RunSpec, folds: list[str]) -> list[Problem]:
    """One problem per field that differs; settings one by one, and one for the cases of the given folds."""
    fix = "keep both with --tag NAME, or replace it with --overwrite"
    pairs = [(name, getattr(stored, name), getattr(asked, name)) for name in IDENTITY if name != "settings"]
    for key in sorted(set(stored.settings) | set(asked.settings)):
        if key in stored.settings or key in asked.changed_settings:  # else it came later than the run: its default
            pairs.append((f"settings.{key}", stored.settings.get(key), asked.settings.get(key)))
    found = [
        Problem(f"{name} is {_shown(before)} in run.json, {_shown(now)} was asked for", "the same value", fix)
        for name, before, now in pairs
        if content_hash(before) != content_hash(now)
    ]
    for key in sorted(set(stored.initial) & set(asked.initial)):
        before, now = (spec.initial[key].get("hash") for spec in (stored, asked))
        if before != now:
            change = f"folds.{key} started from the weights {before}, {now} was asked for"
            found.append(Problem(change, "the same weights", fix))
    changed = {key: changes for key in folds if key in stored.folds and (changes := _changed_cases(stored, asked, key))}
    if changed:
        first, *others = changed
        rest = [f"and the cases of fold{'s' * (len(others) > 1)} {', '.join(others)}"] if others else []
        found.append(Problem("; ".join(changed[first] + rest), "the same cases", fix))
    return found


def _changed_cases(stored: RunSpec, asked: RunSpec, key: str) -> list[str]:
    """How the cases of a fold differ."""
    changes = []
    for name in ("labeled", "validation", "unlabeled", "hidden_test"):
        before, now = (set(getattr(spec.folds.get(key, Fold(labeled=())), name)) for spec in (stored, asked))
        if before != now:
            change = f"without {_some(before - now)}" if before - now else f"with {_some(now - before)} besides"
            changes.append(f"folds.{key}.{name} has {len(before)} cases, now {len(now)} {change}")
    return changes


def _start_again(folder: Path, stored: RunSpec | None, spec: RunSpec) -> RunSpec:
    """Removes the folds that are asked for (stored: the same run), or everything."""
    if stored is None:
        remove_folder(folder)
        write_json(folder / RUN_FILE, spec.model_dump(mode="json"))
        return spec
    for key in spec.folds:
        remove_folder(folder / f"fold_{key}")
    return _write_merged(folder, stored, spec, set())


def _write_merged(folder: Path, stored: RunSpec, spec: RunSpec, kept: set[str]) -> RunSpec:
    """run.json with the folds of both; for `kept` the stored ones win."""
    new = {key: fold for key, fold in spec.folds.items() if key not in kept}
    facts = {key: value for key, value in spec.fold_facts.items() if key not in kept}
    initial = {key: value for key, value in spec.initial.items() if key not in kept}
    merged = stored.model_copy(
        update={
            "folds": dict(sorted((stored.folds | new).items())),
            "fold_facts": dict(sorted((stored.fold_facts | facts).items())),
            "initial": dict(sorted((stored.initial | initial).items())),
        }
    )
    if merged != stored:
        write_json(folder / RUN_FILE, merged.model_dump(mode="json"))
    return merged


def _log_environment(stored: RunSpec, asked: RunSpec) -> None:
    for name in ("threads", "device", "deterministic", "versions"):
        before, now = getattr(stored, name), getattr(asked, name)
        unknown = None in (before, now) or {} in (before, now)
        if not unknown and before != now:
            logger.warning(
                "%s was %s when the run began, now %s: results may differ in the last bits", name, before, now
            )


def _budget_of(split: str) -> tuple[str, int]:
    """Budget and draw of a split's name; "all" and 0 for the default split."""
    match = re.match(r"^(?:benchmark|deployment)-(?P<budget>[\d.]+)_draw-(?P<draw>-?\d+)$", split)
    return (match["budget"], int(match["draw"])) if match else ("all", 0)


def _suggestion(workspace: Workspace, dataset: str, wanted: RunFilter) -> str:
    """The nearest value for each option that no run has."""
    specs = [run.spec for run in find_runs(workspace, dataset)]
    hints = []
    for name in ("configuration", "preset", "method"):
        value, there = getattr(wanted, name), {getattr(spec, name) for spec in specs}
        if value is not None and value not in there:
            hints.append(f"{name}: {nearest(value, there)}")
    return f" ({'; '.join(hints)})" if hints else ""


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def _some(cases: set[str]) -> str:
    names = sorted(cases)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
