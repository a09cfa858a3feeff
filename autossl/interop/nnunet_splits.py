"""Which cases the folds of an nnU-Net model were trained on, as its splits_final.json says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autossl.data.files import read_json
from autossl.data.problems import InvalidInput, Problem
from autossl.data.raw_dataset import inspect_raw_dataset
from autossl.data.splits import Fold
from autossl.data.workspace import Workspace

EXPECTED = 'a list with {"train": [cases], "val": [cases]} for each fold, as nnU-Net writes splits_final.json'
NAMED = 3


def folds_of_splits(path: Path | None, folds: Sequence[str], home: Workspace, dataset: str) -> dict[str, Fold]:
    """Fold → its cases; nothing without a file, so that whoever starts from these weights is told that nobody knows.

    Args:
        path: of splits_final.json.
        folds: of the model; "all" has seen every case of the file.
        home: the workspace; where it has the dataset, the cases must be its own.
        dataset: full name.

    Raises:
        InvalidInput: the file makes no sense, has no such fold, or is of another dataset.
    """
    if path is None:
        return {}
    content = read_json(path)
    if not _is_splits(content):
        raise InvalidInput(
            Problem("no splits of nnU-Net", EXPECTED, "name preprocessed/DATASET/splits_final.json", file=path)
        )
    _check_cases(path, {case for split in content for key in ("train", "val") for case in split[key]}, home, dataset)
    missing = [fold for fold in folds if fold.isdecimal() and int(fold) >= len(content)]
    if missing:
        found, expected = f"{len(content)} folds, none numbered {', '.join(missing)}", "the splits of this model"
        raise InvalidInput(Problem(found, expected, "name its own splits_final.json", file=path))
    everything = sorted({case for split in content for key in ("train", "val") for case in split[key]})
    return {
        fold: Fold(labeled=tuple(everything))
        if not fold.isdecimal()
        else Fold(
            labeled=tuple(sorted(content[int(fold)]["train"])), validation=tuple(sorted(content[int(fold)]["val"]))
        )
        for fold in folds
    }


def _is_splits(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(split, dict)
        and all(
            isinstance(split.get(key), list) and all(isinstance(c, str) for c in split[key]) for key in ("train", "val")
        )
        for split in content
    )


def _check_cases(path: Path, named: set[str], home: Workspace, dataset: str) -> None:
    folder = home.raw_folder(dataset)
    if not folder.is_dir():
        return
    unknown = sorted(named - {case.id for case in inspect_raw_dataset(folder)[0].cases})
    if unknown:
        shown = ", ".join(unknown[:NAMED]) + (f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else "")
        found = f"{len(unknown)} of {len(named)} cases are not in {dataset}: {shown}"
        fix = "name the splits of this dataset, or leave out --splits"
        raise InvalidInput(Problem(found, "cases of the dataset, so that leaks are seen", fix, file=path))
