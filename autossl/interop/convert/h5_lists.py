"""The list files beside h5 data sets: which names there are, which file each stands for, and slices of one volume.

The layouts in use differ in where the files lie: data/NAME.h5, data/slices/NAME_slice_3.h5, NAME/mri_norm2.h5,
NAME_norm.h5. All files below the folder are looked through, and a name stands for the one that fits it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from autossl.data.problems import InvalidInput, Problem, nearest
from autossl.data.raw_dataset import Pool

logger = logging.getLogger(__name__)

ROLES: dict[str, tuple[Pool, tuple[str, ...]]] = {
    "train": ("labeled", ("train_slices.list", "train.list", "train.txt")),
    "val": ("labeled", ("val.list", "val.txt", "eval.list")),
    "test": ("test", ("test.list", "test.txt", "test_vol.txt")),
    "unlabeled": ("unlabeled", ("unlabeled.list", "unlabeled.txt")),
}
"""Role → pool, and the names that its list has where none is given. The list of slices comes first, because methods
that train on slices take their first ones from it."""
LIST_FOLDERS = (".", "data", "lists")
SLICE = re.compile(r"^(?P<volume>.+?)_?slice_?(?P<number>\d+)$")
ENDINGS = (".h5", ".hdf5", ".npy.h5")
PATIENTS = re.compile(r"^patient\d+(?=_frame\d+)")
"""ACDC: two frames of each patient."""


@dataclass(frozen=True)
class ListedCase:
    """A case and its files: one volume, or its slices in order."""

    id: str
    pool: Pool
    role: str
    files: tuple[Path, ...]
    is_stack: bool = False


def listed_cases(folder: Path, lists: Mapping[str, Path]) -> list[ListedCase]:
    """The cases of all lists, in the lists' order; without any list all files as training cases.

    Raises:
        InvalidInput: with all problems: no h5 file, names without a file or with several, names in two lists, slices
            that are missing.
    """
    if not folder.is_dir():
        raise InvalidInput(Problem("the folder does not exist", "a folder of h5 files", "check the path", file=folder))
    files = _FileIndex(folder)
    if not files.by_stem:
        expected = "files that end with .h5, below this folder"
        raise InvalidInput(Problem("no h5 file", expected, "name the dataset's folder", file=folder))
    named = _names(folder, lists)
    if not any(named.values()):
        logger.warning("no list file in %s: all files count as training cases", folder)
        slices = {name for name in files.by_stem if SLICE.match(name)}
        volumes = [name for name in files.by_stem if name not in slices]
        named = {"train": volumes or sorted(slices)}
    cases: list[ListedCase] = []
    problems: list[Problem] = []
    for role, names in named.items():
        found, faults = _cases_of(role, names, files)
        cases, problems = cases + found, problems + faults
    problems += _repeated(cases)
    if problems:
        raise InvalidInput(problems)
    _say_what_is_not_listed(folder, files, cases)
    return cases


def patient_of(case: str, pattern: str | None) -> str:
    """The patient in a case id: what the pattern's first group, or all of it, matches; else the id.

    Raises:
        InvalidInput: the pattern is no regular expression.
    """
    try:
        match = (re.compile(pattern) if pattern else PATIENTS).search(case)
    except re.error as error:
        fix = "correct --patient"
        raise InvalidInput(
            Problem(f"'{pattern}' ({error})", "a regular expression such as 'patient\\d+'", fix)
        ) from error
    return (match[1] if match.re.groups else match[0]) or case if match else case


class _FileIndex:
    """The h5 files below a folder by the names that lists may call them."""

    def __init__(self, folder: Path) -> None:
        paths = [
            path
            for path in sorted(folder.rglob("*"))
            if path.name.endswith(ENDINGS) and path.is_file() and not path.name.startswith(".")
        ]
        self.by_stem: dict[str, list[Path]] = {}
        self.by_other: dict[str, list[Path]] = {}
        alone: dict[Path, list[Path]] = {}
        for path in paths:
            self.by_stem.setdefault(_stem(path.name), []).append(path)
            alone.setdefault(path.parent, []).append(path)
            if _stem(path.name).endswith("_norm"):
                self.by_other.setdefault(_stem(path.name).removesuffix("_norm"), []).append(path)
        for parent, inside in alone.items():
            if len(inside) == 1 and parent != folder:
                self.by_other.setdefault(parent.name, []).append(inside[0])
        if self.by_stem and all(len(same) > 1 for same in self.by_stem.values()):
            # NAME/mri_norm2.h5: the folders are the names
            self.by_stem = {parent.name: list(inside) for parent, inside in alone.items() if len(inside) == 1}

    def find(self, name: str) -> list[Path]:
        """The files that a name may mean."""
        return self.by_stem.get(name) or self.by_other.get(name) or []


def _stem(name: str) -> str:
    for ending in (".h5", ".hdf5", ".npy", ".npz"):
        name = name.removesuffix(ending)
    return name


def _names(folder: Path, lists: Mapping[str, Path]) -> dict[str, list[str]]:
    """Role → names in its list."""
    named: dict[str, list[str]] = {}
    problems = []
    for role, (_, usual) in ROLES.items():
        places = [folder / place / name for name in usual for place in LIST_FOLDERS]
        path = lists.get(role) or next((place for place in places if place.is_file()), None)
        if path is None:
            continue
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            expected, fix = "a text file with one name a line", "check the path"
            problems.append(Problem(f"it cannot be read ({error})", expected, fix, file=path))
            continue
        entries = (line.split(",")[0].strip() for line in lines)
        named[role] = [_entry_name(entry) for entry in entries if entry]
    if problems:
        raise InvalidInput(problems)
    return named


def _entry_name(entry: str) -> str:
    """The name in a line, which may be a path; of NAME/mri_norm2.h5 the folder."""
    parts = PurePosixPath(entry.replace("\\", "/"))
    generic = parts.suffix in ENDINGS and len(parts.parts) > 1 and parts.name.startswith("mri_norm")
    return parts.parent.name if generic else _stem(parts.name)


def _cases_of(role: str, names: list[str], files: _FileIndex) -> tuple[list[ListedCase], list[Problem]]:
    """The cases of a list; slices become the volume that they are of."""
    pool = ROLES[role][0]
    cases: dict[str, ListedCase] = {}
    slices: dict[str, dict[int, Path]] = {}
    problems = []
    for name in dict.fromkeys(names):
        match = SLICE.match(name)
        if match and len(files.find(match["volume"])) == 1:
            volume = match["volume"]
            cases.setdefault(volume, ListedCase(volume, pool, role, tuple(files.find(volume))))
            continue
        found = files.find(name)
        if len(found) != 1:
            problems.append(_not_one(name, found, role, files))
        elif match:
            slices.setdefault(match["volume"], {})[int(match["number"])] = found[0]
            cases.setdefault(match["volume"], ListedCase(match["volume"], pool, role, (), is_stack=True))
        else:
            cases[name] = ListedCase(name, pool, role, (found[0],))
    for volume, numbered in slices.items():
        missing = sorted(set(range(min(numbered), max(numbered) + 1)) - set(numbered))
        if missing:
            found_text = f"slices {', '.join(map(str, missing[:10]))} are not in the list"
            expected, fix = "all slices of a volume in one list", "add them, or list the volumes"
            problems.append(Problem(found_text, expected, fix, case=volume))
        ordered = tuple(path for _, path in sorted(numbered.items()))
        cases[volume] = ListedCase(volume, pool, role, ordered, is_stack=True)
    return list(cases.values()), problems


def _not_one(name: str, found: list[Path], role: str, files: _FileIndex) -> Problem:
    if found:
        listed = ", ".join(str(path) for path in found[:3])
        fix = "remove the others, or name a folder that has it once"
        return Problem(f"{len(found)} files could be it: {listed}", "one file", fix, case=name)
    expected = f"one of {nearest(name, files.by_stem)}"
    return Problem(f"the {role} list names it, but there is no such file", expected, "correct the list", case=name)


def _repeated(cases: list[ListedCase]) -> list[Problem]:
    first: dict[str, ListedCase] = {}
    problems = []
    for case in cases:
        other = first.setdefault(case.id, case)
        if other is not case:
            expected, fix = "every case in one list", "remove it from one of them"
            problems.append(Problem(f"it is in the lists {other.role} and {case.role}", expected, fix, case=case.id))
    return problems


def _say_what_is_not_listed(folder: Path, files: _FileIndex, cases: list[ListedCase]) -> None:
    used = {path for case in cases for path in case.files}
    ids = {case.id for case in cases}
    others = []
    for name, paths in files.by_stem.items():
        match = SLICE.match(name)
        if not used.intersection(paths) and not (match and match["volume"] in ids):
            others.append(name)
    if others:
        names = ", ".join(others[:10]) + (", …" if len(others) > 10 else "")
        logger.warning("%d h5 files of %s are in no list and are passed over: %s", len(others), folder, names)
