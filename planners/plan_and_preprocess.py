"""From a raw data set to plans and preprocessed cases: the function behind `autossl_plan_and_preprocess`."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from autossl.data.files import write_json
from autossl.data.image_io import orientation_for
from autossl.data.integrity import parse_remap_labels
from autossl.data.locks import hold, lock_beside
from autossl.data.problems import InvalidInput, Problem, nearest
from autossl.data.raw_dataset import RawDataset, inspect_raw_dataset
from autossl.data.splits import Split, load_or_make_split, split_cases
from autossl.data.store import CaseStore
from autossl.data.workspace import Workspace
from autossl.planners.facts import dataset_facts
from autossl.planners.fingerprint import (
    Fingerprint,
    ScanOptions,
    extract_fingerprint,
    previous_fingerprint,
    write_fingerprint,
)
from autossl.planners.grown import PlanBasis, keep_sizes, log_kept, plan_basis, read_basis, write_basis
from autossl.planners.plan_experiment import PlanOptions, check_options, plan_from_facts
from autossl.planners.plans import Plans, read_plans, write_plans
from autossl.preprocessing.preprocess import preprocess_cases

logger = logging.getLogger(__name__)

FINGERPRINT = "fingerprint.json"
DEFAULT_PRESET = "plain"
PLANS_PREFIX = "plans_"
MAX_NAMED_CHANGES = 8

Progress = Callable[[str, str, int, int], None]
"""Called with the stage ("scan", or a configuration), the case just done, how many are done, and how many there are."""


@dataclass(frozen=True)
class PlanResult:
    """What was planned and prepared."""

    dataset_name: str
    folder: Path
    """preprocessed/DatasetXXX_Name."""
    fingerprint: Fingerprint
    split: Split
    plans: Plans
    plans_file: Path
    data_folders: dict[str, Path] = field(default_factory=dict)
    """Configuration → folder of its preprocessed cases; empty without preprocessing."""


@dataclass(frozen=True)
class PlanRequest:
    """What `plan_and_preprocess` is asked for."""

    dataset: str
    """4, 004, Hippocampus or Dataset004_Hippocampus."""
    workspace: Path | None = None
    """None: as `Workspace.locate` finds it."""
    options: PlanOptions = field(default_factory=PlanOptions)
    """`options.configurations` says which are preprocessed; None: all that are planned."""
    preprocess: bool = True
    """False stops after the plans."""
    n_workers: int | None = None
    """Processes; None: one per usable CPU, fewer where memory is short."""
    verify_dataset_integrity: bool = False
    """Reads and checks every case again, also those that did not change."""
    remap_labels: tuple[str, ...] = ()
    """OLD=NEW texts; kept with the data set. None given: those of the last time."""
    replan: bool = False
    """Makes all sizes anew where labels were added; else they stay, and with them what was preprocessed."""
    wait_s: float = 0.0
    """For another command that plans or preprocesses this data set."""


def plan_and_preprocess(request: PlanRequest, on_progress: Progress | None = None) -> PlanResult:
    """Reads a raw data set, plans it, writes the plans and preprocesses its cases.

    Plans hold every configuration that the rules give. What is on disk and still right is kept: cases that did not
    change are neither scanned nor preprocessed again.

    Raises:
        InvalidInput: With all problems that were found; nothing was written then. Also where another command plans or
            preprocesses the data set.
        WorkerError: A worker died; the cases that were finished stay.
    """
    check_options(request.options)
    workspace = Workspace.locate(request.workspace)
    name = workspace.find_dataset(request.dataset)
    with hold(lock_beside(workspace.preprocessed_folder(name)), f"the preprocessing of {name}", request.wait_s):
        return _plan_and_preprocess(request, workspace, name, on_progress)


def _plan_and_preprocess(
    request: PlanRequest, workspace: Workspace, name: str, on_progress: Progress | None
) -> PlanResult:
    options, folder = request.options, workspace.preprocessed_folder(name)
    with _as_it_was(folder):
        raw, problems = inspect_raw_dataset(workspace.raw_folder(name))
        remap, n_workers = request.remap_labels, request.n_workers
        mapping = parse_remap_labels(remap, raw.description.label_schema()) if remap else None
        scan = ScanOptions(mapping, folder, known_problems=problems, on_case=_on_case(on_progress, "scan"))
        previous = previous_fingerprint(folder / FINGERPRINT)
        orientation = orientation_for(raw.description.file_ending)
        verify = request.verify_dataset_integrity
        fingerprint = extract_fingerprint(raw, orientation, n_workers, verify, previous, scan)
        patients = len({case.patient for case in raw.labeled})
        fresh = plan_from_facts(dataset_facts(fingerprint, raw.description, name, patients), options)
        plans, basis = _settle(folder, fresh, fingerprint, request)
        split = load_or_make_split(folder, split_cases(raw), duplicates=fingerprint.duplicates)
    write_basis(plans_file(folder, plans.preset), basis)  # knows the plans of before as well, which are still there
    _write(folder, raw, fingerprint, plans)
    wanted = options.configurations or tuple(plans.configurations)
    data = {}
    if request.preprocess:
        data = _preprocess_planned(raw, fingerprint, plans, wanted, folder, n_workers, on_progress)
    return PlanResult(name, folder, fingerprint, split, plans, plans_file(folder, plans.preset), data)


def preprocess_planned(
    raw: RawDataset,
    fingerprint: Fingerprint,
    plans: Plans,
    configurations: Sequence[str],
    preprocessed_folder: Path,
    n_workers: int | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Path]:
    """Preprocesses what is missing for these configurations; also for plans that were edited by hand.

    Waits for another command that does the same: what it makes need not be made again.

    Returns:
        Configuration → folder of its cases.

    Raises:
        InvalidInput: A configuration is not planned, or a case cannot be prepared.
        WorkerError: A worker died; the cases that were finished stay.
    """
    with hold(lock_beside(preprocessed_folder), f"the preprocessing of {preprocessed_folder.name}", math.inf):
        return _preprocess_planned(raw, fingerprint, plans, configurations, preprocessed_folder, n_workers, on_progress)


def _preprocess_planned(
    raw: RawDataset,
    fingerprint: Fingerprint,
    plans: Plans,
    configurations: Sequence[str],
    preprocessed_folder: Path,
    n_workers: int | None,
    on_progress: Progress | None,
) -> dict[str, Path]:
    folders = {name: preprocessed_folder / "data" / plans.data_hash(name) for name in configurations}
    for name, folder in folders.items():
        preprocess_cases(
            raw,
            plans,
            name,
            CaseStore(folder),
            n_workers,
            remap_labels=fingerprint.remap_labels,
            progress=None if on_progress is None else partial(_case_last, on_progress, name),
        )
    return folders


def _case_last(on_progress: Progress, stage: str, done: int, total: int, case: str) -> None:
    on_progress(stage, case, done, total)


def plans_file(preprocessed_folder: Path, preset: str) -> Path:
    """Where the plans of a preset lie."""
    return Path(preprocessed_folder) / f"{PLANS_PREFIX}{preset}.json"


def find_plans(preprocessed_folder: Path, preset: str | None = None) -> Plans:
    """The plans of a data set: of the preset that is named, else of `plain`, else the only ones that there are.

    Raises:
        InvalidInput: Where there are none, or several and none is named; with the list.
    """
    folder = Path(preprocessed_folder)
    planned = sorted(path.stem.removeprefix(PLANS_PREFIX) for path in folder.glob(f"{PLANS_PREFIX}*.json"))
    chosen = preset or (DEFAULT_PRESET if DEFAULT_PRESET in planned else planned[0] if len(planned) == 1 else None)
    if chosen in planned:
        plans = read_plans(plans_file(folder, chosen))
        _check_belongs(plans, folder)
        return plans
    command = f"autossl_plan_and_preprocess -d {folder.name}"
    if chosen is None and planned:
        raise InvalidInput(
            Problem(
                f"{folder.name} is planned for {len(planned)} presets: {', '.join(planned)}",
                "the name of one of them",
                "choose one with --preset",
            )
        )
    raise InvalidInput(
        Problem(
            f"{folder.name} is not planned{f' for preset {chosen!r}' if chosen else ''}",
            f"one of {nearest(chosen or '', planned)}" if planned else f"{PLANS_PREFIX}PRESET.json in {folder}",
            f"run {command}{f' --preset {chosen}' if chosen else ''}"
            + (", or choose another preset" if planned else ""),
        )
    )


def _write(folder: Path, raw: RawDataset, fingerprint: Fingerprint, plans: Plans) -> None:
    """Each file appears whole; plans last, because other commands look for them."""
    write_fingerprint(folder / FINGERPRINT, fingerprint)
    write_json(folder / "dataset.json", raw.description.to_json())
    path = plans_file(folder, plans.preset)
    if path.exists():
        _keep_replaced(path, plans)
    write_plans(path, plans)


def _settle(folder: Path, fresh: Plans, fingerprint: Fingerprint, request: PlanRequest) -> tuple[Plans, PlanBasis]:
    """The plans that hold, and their basis: fresh ones, or those on disk where the data set only got more labels."""
    options, path = request.options, plans_file(folder, fresh.preset)
    now, basis = plan_basis(fresh, fingerprint, options), read_basis(path)
    if request.replan or basis is None or not path.exists():
        return fresh, now
    try:
        old = read_plans(path)
    except InvalidInput:
        return fresh, now
    basis = basis.of(old)
    kept = keep_sizes(fresh, now, old, basis)
    if kept is None or any(name not in kept.configurations for name in options.configurations or ()):
        return fresh, now
    log_kept(kept, _changed_paths(kept.to_json(), fresh.to_json()))
    return kept, basis.model_copy(update={"plans_hash": kept.hash()})


def _keep_replaced(path: Path, plans: Plans) -> None:
    """Plans that differ, perhaps by a hand edit, are kept beside the new ones, and the difference is named."""
    try:
        old = read_plans(path)
    except InvalidInput as error:
        changes = [f"it could not be read ({error})"]
    else:
        if old.hash() == plans.hash():
            return
        changes = _changed_paths(old.to_json(), plans.to_json())
    kept = path.with_name(f"replaced_{path.name}")
    shutil.copyfile(path, kept)
    more = f" and {len(changes) - MAX_NAMED_CHANGES} more" if len(changes) > MAX_NAMED_CHANGES else ""
    logger.warning(
        "%s is replaced; the old one is kept as %s. What differs: %s",
        path.name,
        kept.name,
        ", ".join(changes[:MAX_NAMED_CHANGES]) + more,
    )


def _changed_paths(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted paths of the values that differ, the reasons left out."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [path]
    keys = [key for key in {**new, **old} if (path, key) != ("", "why")]
    return [
        change
        for key in keys
        for change in _changed_paths(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    ]


@contextmanager
def _as_it_was(folder: Path) -> Iterator[None]:
    """Where the block fails, a folder that was not there before is not there after it."""
    existed = folder.exists()
    parents = [parent for parent in folder.parents if not parent.exists()]
    try:
        yield
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in parents:
                with suppress(OSError):
                    parent.rmdir()
        raise


def _check_belongs(plans: Plans, folder: Path) -> None:
    if plans.dataset_name != folder.name:
        raise InvalidInput(
            Problem(
                f"plans of {plans.dataset_name} lie in the folder of {folder.name}",
                f"plans of {folder.name}",
                f"plan again with autossl_plan_and_preprocess -d {folder.name} --preset {plans.preset}",
                file=plans_file(folder, plans.preset),
            )
        )


def _on_case(on_progress: Progress | None, stage: str) -> Callable[[str, int, int], None] | None:
    return None if on_progress is None else partial(on_progress, stage)
