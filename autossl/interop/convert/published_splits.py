"""Published lists as splits of ours, so that results are comparable with those of papers.

Without a validation list the folds are drawn as always. With one, fold 0 is the published split: it validates that list
and trains on the training list; folds 1 to 4 divide the training list, so that every case is validated once. By custom
the first N names of the training list are the labeled ones: they become the draw 0 of `--labeled N`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from autossl.data.draws import draw_folds
from autossl.data.files import read_json, write_json
from autossl.data.problems import InvalidInput, Problem
from autossl.data.splits import (
    N_FOLDS,
    Fold,
    Split,
    SplitCase,
    extend_default_split,
    load_or_make_split,
    make_default_split,
    split_name,
)
from autossl.interop.convert.source import PublishedLists

DRAW = 0


def published_splits(cases: Sequence[SplitCase], lists: PublishedLists) -> list[Split]:
    """The default split and one per budget; nothing where the lists say nothing beyond who trains.

    Raises:
        InvalidInput: a fold has fewer cases than a budget asks for.
    """
    if not lists.validation and not lists.budgets:
        return []
    default = _default(cases, lists) if lists.validation else make_default_split(cases)
    return [default, *(_budget(default, lists, budget) for budget in lists.budgets)]


def split_faults(preprocessed_folder: Path, splits: Sequence[Split]) -> list[Problem]:
    """Splits that are there already and say something else."""
    problems = []
    for split in splits:
        path = _path(preprocessed_folder, split)
        there = read_json(path) if path.is_file() else None
        ours = split.model_dump(mode="json", by_alias=True)
        if there is not None and any(there.get(key) != ours[key] for key in ("assigned", "drawn")):
            fix = f"choose another dataset number, or delete {preprocessed_folder}"
            found = f"split {split.name} is there and differs from the published lists"
            problems.append(Problem(found, "no split, or the same", fix, file=path))
    return problems


def write_splits(preprocessed_folder: Path, splits: Sequence[Split], cases: Sequence[SplitCase]) -> list[Path]:
    """Writes the splits that are not there yet, with their lists of cases; returns their files."""
    paths = []
    for split in splits:
        path = _path(preprocessed_folder, split)
        paths.append(path)
        if not path.is_file():
            write_json(path, split.model_dump(mode="json", by_alias=True))
        load_or_make_split(preprocessed_folder, cases, split.budget, split.draw)
    return paths


def _path(preprocessed_folder: Path, split: Split) -> Path:
    return preprocessed_folder / "splits" / f"{split.name}.json"


def _default(cases: Sequence[SplitCase], lists: PublishedLists) -> Split:
    validation = set(lists.validation)
    labeled = sorted((case for case in cases if case.pool == "labeled"), key=lambda case: case.id)
    training = draw_folds([case for case in labeled if case.id not in validation], N_FOLDS - 1)
    if not training:
        found, fix = "training cases of a single patient beside a validation list", "leave the validation list out"
        raise InvalidInput(Problem(found, "training cases of at least 2 patients", fix))
    split = Split(
        name="default",
        kind="default",
        added=(tuple(case.id for case in labeled),),
        n_folds=max(training.values()) + 2,
        assigned=dict.fromkeys(sorted(validation), 0) | {case: fold + 1 for case, fold in training.items()},
    )
    return extend_default_split(split, cases)


def _budget(default: Split, lists: PublishedLists, budget: int) -> Split:
    """In each fold the first cases of the training list, after them those of the validation list."""
    order = (*lists.train, *lists.validation)
    named = {str(number): fold for number, fold in enumerate(default.folds)} | {"all": default.everything}
    drawn = {}
    for key, fold in named.items():
        usable = [case for case in order if case in set(fold.labeled)]
        if budget > len(usable):
            found, fix = f"{budget} labeled cases, but fold {key} trains on {len(usable)}", "lower --labeled"
            raise InvalidInput(Problem(found, f"at most {len(usable)}", fix))
        drawn[key] = tuple(sorted(usable[:budget]))
    update = {
        "name": split_name("benchmark", budget, DRAW),
        "kind": "benchmark",
        "budget": str(budget),
        "draw": DRAW,
        "drawn": drawn,
        "folds": (),
        "everything": Fold(labeled=()),
    }
    return default.model_copy(update=update)
