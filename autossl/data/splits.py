"""Splits: which cases of each fold are labeled for training, validate, are unlabeled, or are a hidden test set.

What is drawn once and kept: the validation fold of each labeled case, the labeled cases of a budget, a hidden test set.
The lists of the folds follow from these, from the cases that are there, and from the duplicates among them; they are
derived anew whenever a split is loaded, so that a new case or a newly found duplicate finds its place and nothing else
moves.

The default folds are scikit-learn's shuffled k-fold over the sorted patients with seed 12345: nnU-Net v2's folds, where
every patient has one case. Budgets take cases in the order of SHA-256 of draw and patient, those that were added later
after all earlier ones; so the 4 of a draw are among its 8, on every machine.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from autossl.data.draws import budget_size, draw_folds, draw_order, normal_budget, place_new
from autossl.data.files import read_json, write_json
from autossl.data.leaks import SplitCase, leaks
from autossl.data.problems import InvalidInput, Problem, schema_faults

if TYPE_CHECKING:
    from autossl.data.hashes import DuplicatePair
    from autossl.data.raw_dataset import RawDataset

logger = logging.getLogger(__name__)

__all__ = [
    "Fold",
    "Split",
    "SplitCase",
    "extend_default_split",
    "fold_cases",
    "load_or_make_split",
    "make_benchmark_split",
    "make_default_split",
    "make_deployment_split",
    "read_split",
    "split_cases",
    "split_name",
]

N_FOLDS = 5
HIDDEN_TEST_PERCENT = 20
"""Share of the patients without drawn cases that a deployment split keeps as a hidden test set."""
SplitKind = Literal["default", "benchmark", "deployment"]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Fold(_Schema):
    """The cases of one fold; every list is sorted."""

    labeled: tuple[str, ...]
    """Trained on with their labels."""
    validation: tuple[str, ...] = ()
    unlabeled: tuple[str, ...] = ()
    """Trained on without labels; those of the labeled pool are here because a budget hides their labels."""
    hidden_test: tuple[str, ...] = ()
    excluded: dict[str, str] = {}
    """Cases that could have been trained on but would leak a validation or test case, with the reason."""


class Split(_Schema):
    """A named split. `folds` and `everything` follow from the other fields and the cases that exist."""

    name: str
    kind: SplitKind
    budget: str | None = None
    draw: int = 0
    added: tuple[tuple[str, ...], ...]
    """Labeled cases in the order in which they came; one entry per time."""
    n_folds: int = Field(ge=0)
    assigned: dict[str, int]
    """Case → fold in which it validates. To move a case by hand, edit this and delete `folds` and `all`."""
    drawn: dict[str, tuple[str, ...]] = {}
    """Fold ("0", …, "all") → the cases that a budget leaves labeled."""
    hidden_test: tuple[str, ...] = ()
    folds: tuple[Fold, ...] = ()
    everything: Fold = Field(default=Fold(labeled=()), alias="all")
    """The fold that trains on everything and has no validation cases."""

    @model_validator(mode="after")
    def _fits_together(self) -> Split:
        for case, fold in self.assigned.items():
            if fold not in range(self.n_folds):
                raise ValueError(f"assigned: case {case} is in fold {fold}, there are {self.n_folds} folds")
        for number, fold_ in enumerate(self.folds):
            wrong = sorted(case for case in fold_.validation if self.assigned.get(case) != number)
            if wrong:
                raise ValueError(f"folds.{number}.validation: {', '.join(wrong)} not assigned to this fold")
        return self


def split_cases(raw: RawDataset) -> list[SplitCase]:
    """What a split has to know of a raw dataset's cases."""
    return [SplitCase(case.id, case.patient, case.pool) for case in raw.cases]


def split_name(kind: SplitKind, budget: str | int | None = None, draw: int = 0) -> str:
    """ "default", "benchmark-8_draw-0", "deployment-0.2_draw-3"."""
    return "default" if budget is None else f"{kind}-{normal_budget(budget)}_draw-{draw}"


# ------------------------------------------------------------------------------------------------------------ making


def make_default_split(
    cases: Sequence[SplitCase], n_folds: int = N_FOLDS, duplicates: Sequence[DuplicatePair] = ()
) -> Split:
    """All labeled cases, in folds by patient."""
    table = _Table(cases, duplicates)
    assigned = draw_folds(table.labeled_cases, n_folds)
    split = Split(
        name="default",
        kind="default",
        added=(table.labeled_ids,),
        n_folds=max(assigned.values(), default=-1) + 1,
        assigned=assigned,
    )
    return _derive(split, table)


def extend_default_split(split: Split, cases: Sequence[SplitCase], duplicates: Sequence[DuplicatePair] = ()) -> Split:
    """The same split with new cases appended to folds; nothing that was assigned moves, cases that left may return."""
    table = _Table(cases, duplicates)
    if split.n_folds == 0:
        return make_default_split(cases, duplicates=duplicates)
    known = {case for generation in split.added for case in generation}
    new = [case for case in table.labeled_cases if case.id not in split.assigned]
    gone = sorted(known - set(table.labeled_ids))
    if gone:
        logger.warning("%d labeled cases of the split are not there any more: %s", len(gone), ", ".join(gone))
    if new:
        logger.info("%d new labeled cases are appended to the folds", len(new))
    generation = tuple(sorted(case.id for case in new if case.id not in known))
    update = {
        "added": (*split.added, generation) if generation else split.added,
        "assigned": split.assigned | place_new(new, split.assigned, table.patients, split.n_folds),
    }
    return _derive(split.model_copy(update=update), table)


def make_benchmark_split(
    default: Split,
    cases: Sequence[SplitCase],
    budget: str | int,
    draw: int = 0,
    duplicates: Sequence[DuplicatePair] = (),
) -> Split:
    """The default folds with their validation cases; in each, a budget of its labeled cases, the others as unlabeled.

    Raises:
        InvalidInput: where the budget is no number or a fold has fewer labeled cases.
    """
    table, budget = _Table(cases, duplicates), normal_budget(budget)
    order = draw_order(default.added, table.patients, draw)
    drawn = {}
    for key, fold in _named_folds(_derive(default, table)):
        size = budget_size(budget, len(fold.labeled), f"fold {key}")
        drawn[key] = tuple(sorted([case for case in order if case in set(fold.labeled)][:size]))
    update = {
        "name": split_name("benchmark", budget, draw),
        "kind": "benchmark",
        "budget": budget,
        "draw": draw,
        "drawn": drawn,
    }
    return _derive(default.model_copy(update=update), table)


def make_deployment_split(
    cases: Sequence[SplitCase],
    budget: str | int,
    draw: int = 0,
    duplicates: Sequence[DuplicatePair] = (),
    default: Split | None = None,
) -> Split:
    """A budget of cases drawn once, five folds of those only, a hidden test set of other patients, the rest unlabeled.

    The hidden patients are the last ones of the draw's order, so the hidden test set of a larger budget lies within
    that of a smaller one.

    Args:
        cases: all cases.
        budget: number or fraction of all labeled cases.
        draw: which draw.
        duplicates: of the fingerprint.
        default: the default split, which knows when cases were added.

    Raises:
        InvalidInput: where the budget is no number or there are fewer labeled cases.
    """
    table, budget = _Table(cases, duplicates), normal_budget(budget)
    added = default.added if default is not None else (table.labeled_ids,)
    usable = set(table.fold(table.labeled_ids).labeled)
    order = [case for case in draw_order(added, table.patients, draw) if case in usable]
    drawn = set(order[: budget_size(budget, len(order), "the dataset")])
    linked = leaks(table.cases, dict.fromkeys(drawn, "drawn"), duplicates)
    patients = list(dict.fromkeys(table.patients[case] for case in order))
    taken = {table.patients[case] for case in drawn}
    tied = taken | {table.patients[case] for case in linked}
    n_hidden = ceil(sum(patient not in taken for patient in patients) * HIDDEN_TEST_PERCENT / 100)
    free = [patient for patient in patients if patient not in tied]
    hidden = set(free[max(0, len(free) - n_hidden) :])
    assigned = draw_folds([case for case in table.labeled_cases if case.id in drawn], N_FOLDS)
    split = Split(
        name=split_name("deployment", budget, draw),
        kind="deployment",
        budget=budget,
        draw=draw,
        added=added,
        n_folds=max(assigned.values(), default=-1) + 1,
        assigned=assigned,
        drawn={"all": tuple(sorted(drawn))},
        hidden_test=tuple(case.id for case in table.labeled_cases if case.patient in hidden),
    )
    return _derive(split, table)


def fold_cases(split: Split, fold: int | str) -> Fold:
    """The cases of one fold: a number, or "all".

    Raises:
        InvalidInput: naming the folds there are.
    """
    folds = dict(_named_folds(split))
    if str(fold) in folds:
        return folds[str(fold)]
    few = "; cross-validation needs labeled cases of at least 2 patients" if not split.folds else ""
    raise InvalidInput(
        Problem(f"fold '{fold}' is not in split {split.name}", f"one of {', '.join(folds)}{few}", "choose one of these")
    )


# ------------------------------------------------------------------------------------------------------------- files


def load_or_make_split(
    preprocessed_folder: Path,
    cases: Sequence[SplitCase],
    budget: str | int | None = None,
    draw: int = 0,
    kind: Literal["benchmark", "deployment"] = "benchmark",
    *,
    duplicates: Sequence[DuplicatePair] = (),
) -> Split:
    """The split from splits/<name>.json, brought up to date with the cases, or a new one; files are written at the end.

    Args:
        preprocessed_folder: of the dataset.
        cases: all cases of the dataset.
        budget: None gives the default split.
        draw: which draw of the budget.
        kind: of the budget.
        duplicates: of the fingerprint.

    Raises:
        InvalidInput: where the budget cannot be met, or a split file is damaged.
    """
    folder = Path(preprocessed_folder) / "splits"
    default_path = folder / "default.json"
    stored_default = read_split(default_path) if default_path.exists() else None
    default = (
        make_default_split(cases, duplicates=duplicates)
        if stored_default is None
        else extend_default_split(stored_default, cases, duplicates)
    )
    result, path = default, default_path
    if budget is not None:
        path = folder / f"{split_name(kind, budget, draw)}.json"
        if path.exists():
            result = _refreshed(read_split(path), default, _Table(cases, duplicates))
        elif kind == "benchmark":
            result = make_benchmark_split(default, cases, budget, draw, duplicates)
        else:
            result = make_deployment_split(cases, budget, draw, duplicates, default)
    for target, split in {default_path: default, path: result}.items():
        content = split.model_dump(mode="json", by_alias=True)
        if not target.exists() or read_json(target) != content:
            write_json(target, content)
    return result


def read_split(path: Path) -> Split:
    """Reads and checks a split.

    Raises:
        InvalidInput: naming the field that makes no sense.
    """
    content = read_json(path)
    try:
        return Split.model_validate(content)
    except ValidationError as error:
        fix = "undo the edit; to move a case to another fold, edit 'assigned' and delete the lists 'folds' and 'all'"
        faults = schema_faults(error, "the split")
        raise InvalidInput(
            [Problem(fault, "a split as autossl_train writes it", fix, file=path) for fault in faults]
        ) from error


def _refreshed(split: Split, default: Split, table: _Table) -> Split:
    """A stored budget split with the cases of today; its drawn cases stay."""
    if split.kind == "benchmark":
        if split.n_folds != default.n_folds:
            raise InvalidInput(
                Problem(
                    f"split {split.name} has {split.n_folds} folds, the default split {default.n_folds}",
                    "the same number of folds",
                    f"use another --draw, or delete splits/{split.name}.json",
                )
            )
        split = split.model_copy(update={"added": default.added, "assigned": default.assigned})
    return _derive(split, table)


# ---------------------------------------------------------------------------------------------------------- deriving


@dataclass(frozen=True)
class _Table:
    """The cases that are there, and the duplicates among them."""

    cases: Sequence[SplitCase]
    duplicates: Sequence[DuplicatePair] = ()

    @cached_property
    def labeled_cases(self) -> list[SplitCase]:
        """Cases with a label, sorted by id."""
        return sorted((case for case in self.cases if case.pool == "labeled"), key=lambda case: case.id)

    @cached_property
    def labeled_ids(self) -> tuple[str, ...]:
        """Their ids."""
        return tuple(case.id for case in self.labeled_cases)

    @cached_property
    def patients(self) -> Mapping[str, str]:
        """Case → patient."""
        return {case.id: case.patient for case in self.cases}

    def fold(self, labeled: Iterable[str], validation: Collection[str] = (), hidden_test: Collection[str] = ()) -> Fold:
        """A fold without leaks: of the cases asked for those that may be trained on, all others as unlabeled."""
        there = set(self.labeled_ids)
        validation = sorted(there.intersection(validation))
        hidden_test = sorted(there.intersection(hidden_test))
        held_out = {case.id: "test" for case in self.cases if case.pool == "test"}
        held_out |= dict.fromkeys(validation, "validation") | dict.fromkeys(hidden_test, "hidden test")
        reasons = leaks(self.cases, held_out, self.duplicates)
        usable = {case.id for case in self.cases} - set(held_out) - set(reasons)
        with_label = usable & there & set(labeled)
        return Fold(
            labeled=tuple(sorted(with_label)),
            validation=tuple(validation),
            unlabeled=tuple(sorted(usable - with_label)),
            hidden_test=tuple(hidden_test),
            excluded=dict(sorted(reasons.items())),
        )


def _derive(split: Split, table: _Table) -> Split:
    """The split with its folds as they follow from what was drawn and from the cases that are there."""

    def fold(key: str, validation: Collection[str]) -> Fold:
        allowed = table.labeled_ids if split.budget is None else split.drawn.get(key, split.drawn["all"])
        made = table.fold(set(allowed) - set(validation), validation, split.hidden_test)
        lost = sorted(set(allowed) - set(validation) - set(made.labeled)) if split.budget is not None else []
        if lost:
            logger.warning(
                "%s, fold %s: %d drawn cases are missing or would leak, and are not replaced: %s",
                split.name,
                key,
                len(lost),
                ", ".join(lost),
            )
        return made

    folds = tuple(
        fold(str(number), [case for case, assigned in split.assigned.items() if assigned == number])
        for number in range(split.n_folds)
    )
    values: dict[str, Any] = split.model_dump(exclude={"folds", "everything"})
    return Split.model_validate({**values, "folds": folds, "all": fold("all", ())})


def _named_folds(split: Split) -> Iterable[tuple[str, Fold]]:
    yield from ((str(number), fold) for number, fold in enumerate(split.folds))
    yield "all", split.everything
