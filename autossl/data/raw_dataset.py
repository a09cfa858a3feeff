"""A raw dataset: nnU-Net v2's folders, `imagesUn/` for unlabeled cases, and `cases.csv` for patients and sites."""

from __future__ import annotations

import csv
import logging
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from autossl.data.case_files import case_files, files_of, find_case_files, id_fault, links_out
from autossl.data.description import DatasetDescription, read_description
from autossl.data.files import read_text
from autossl.data.problems import InvalidInput, Problem, nearest

logger = logging.getLogger(__name__)

__all__ = [
    "Case",
    "DatasetDescription",
    "Pool",
    "RawDataset",
    "case_files",
    "inspect_raw_dataset",
    "read_description",
    "read_raw_dataset",
]

Pool = Literal["labeled", "unlabeled", "test"]
IMAGE_FOLDERS: dict[str, Pool] = {"imagesTr": "labeled", "imagesUn": "unlabeled", "imagesTs": "test"}
LABEL_FOLDERS = {"imagesTr": "labelsTr", "imagesTs": "labelsTs"}
TABLE = "cases.csv"
LAYOUT = (
    "dataset.json, imagesTr/CASE_0000.nii.gz (one file per channel), labelsTr/CASE.nii.gz, "
    "and where they exist imagesUn/, imagesTs/, labelsTs/, cases.csv"
)


@dataclass(frozen=True)
class Case:
    """One case on disk."""

    id: str
    images: tuple[Path, ...]
    """One file per channel, in channel order (a color picture: one file)."""
    label: Path | None
    pool: Pool
    patient: str
    """Cases of one patient never part between training and validation; the case id where nothing is known."""
    attributes: dict[str, str] = field(default_factory=dict)
    """Further columns of cases.csv: phase, site, …"""


@dataclass(frozen=True)
class RawDataset:
    """A dataset as it was delivered."""

    name: str
    folder: Path
    description: DatasetDescription
    cases: tuple[Case, ...]
    """Sorted by id within each pool: labeled, unlabeled, test."""

    @property
    def labeled(self) -> tuple[Case, ...]:
        """Cases of imagesTr that have a label file."""
        return self._pool("labeled")

    @property
    def unlabeled(self) -> tuple[Case, ...]:
        """Cases of imagesUn, and those of imagesTr without a label file."""
        return self._pool("unlabeled")

    @property
    def test(self) -> tuple[Case, ...]:
        """Cases of imagesTs; some may have labels."""
        return self._pool("test")

    @property
    def without_label_file(self) -> tuple[Case, ...]:
        """Cases of imagesTr that count as unlabeled because labelsTr has no file for them."""
        return tuple(case for case in self.unlabeled if case.images[0].parent.name == "imagesTr")

    def _pool(self, pool: Pool) -> tuple[Case, ...]:
        return tuple(case for case in self.cases if case.pool == pool)


def read_raw_dataset(folder: Path) -> RawDataset:
    """Reads the names of all files, not their voxels.

    Raises:
        InvalidInput: with all problems together: no dataset, faults in dataset.json, missing channels, labels without
            an image, mixed file endings, unusable or repeated case ids, faults in cases.csv.
    """
    dataset, problems = inspect_raw_dataset(folder)
    if problems:
        raise InvalidInput(problems, title=f"{dataset.name} has {len(problems)} problem{'s'[: len(problems) > 1]}:")
    return dataset


def inspect_raw_dataset(folder: Path) -> tuple[RawDataset, list[Problem]]:
    """As `read_raw_dataset`, with the problems beside the cases that have none, so that a scan can add its own.

    Raises:
        InvalidInput: where the folder is no dataset or its dataset.json cannot be used.
    """
    folder = Path(folder)
    _check_is_dataset(folder)
    links = links_out(folder, ("dataset.json", TABLE, *IMAGE_FOLDERS, *LABEL_FOLDERS.values()))
    if links:
        raise InvalidInput(links, title=f"{folder.name}: {len(links)} links lead out of the data set:")
    problems: list[Problem] = []
    try:
        description = read_description(folder)
    except InvalidInput as error:
        raise InvalidInput(error.problems, title=f"{folder.name}: dataset.json cannot be used:") from error
    cases: list[Case] = []
    for images, pool in IMAGE_FOLDERS.items():
        found, faults = _read_pool(folder, images, pool, description)
        cases += found
        problems += faults
    problems += _repeated_ids(cases)
    cases, faults = _with_table(folder / TABLE, cases)
    problems += faults
    if not problems and not any(case.pool == "labeled" for case in cases):
        expected = f"at least one labelsTr/CASE{description.file_ending} beside its images in imagesTr"
        problems.append(Problem("no labeled case", expected, "add label files", file=folder / "labelsTr"))
    dataset = RawDataset(folder.name, folder, description, tuple(cases))
    forgotten = [case.id for case in dataset.without_label_file]
    if forgotten:
        logger.warning(
            "%d cases in imagesTr have no label file and count as unlabeled: %s", len(forgotten), ", ".join(forgotten)
        )
    return dataset, problems


def _check_is_dataset(folder: Path) -> None:
    if not folder.is_dir():
        raise InvalidInput(Problem("the folder does not exist", f"a dataset: {LAYOUT}", "check the path", file=folder))
    missing = [name for name in ("dataset.json", "imagesTr") if not (folder / name).exists()]
    if missing:
        raise InvalidInput(
            Problem(
                f"the folder is no dataset: {' and '.join(missing)} missing",
                LAYOUT,
                "name a dataset's own folder, or bring the files into this layout (nnU-Net v2's)",
                file=folder,
            )
        )


def _read_pool(
    folder: Path, images: str, pool: Pool, description: DatasetDescription
) -> tuple[list[Case], list[Problem]]:
    """The cases of one image folder with their labels, and what is wrong with them."""
    if not (folder / images).is_dir():
        return [], []
    ending = description.file_ending
    labels: dict[str, Path] = {}
    problems: list[Problem] = []
    label_folder = folder / LABEL_FOLDERS.get(images, "")
    if images in LABEL_FOLDERS and label_folder.is_dir():
        paths, problems = files_of(label_folder, ending)
        labels = {path.name[: -len(ending)]: path for path in paths}
    found = find_case_files(folder / images, ending, description.n_channels, labels)
    problems = found.problems + problems
    faulty = {problem.case for problem in found.problems}
    for case in sorted(set(labels) - set(found.cases) - faulty):
        problems.append(
            Problem(
                "a label without an image",
                f"{images}/{case}_0000{ending}",
                "add the image or remove the label",
                case=case,
                file=labels[case],
            )
        )
    cases = [
        Case(case, files, labels.get(case), "unlabeled" if pool == "labeled" and case not in labels else pool, case)
        for case, files in found.cases.items()
    ]
    return cases, problems


def _repeated_ids(cases: Iterable[Case]) -> list[Problem]:
    """Cases whose id occurs twice, with upper and lower case and the ways to write an accent taken as equal."""
    first: dict[str, Case] = {}
    problems = []
    for case in cases:
        other = first.setdefault(unicodedata.normalize("NFC", case.id).casefold(), case)
        if other is not case:
            spelled = "" if case.id == other.id else f" (there as {other.id!a}, which some systems hold for the same)"
            problems.append(
                Problem(
                    f"the id occurs twice, in {other.images[0].parent.name} and {case.images[0].parent.name}{spelled}",
                    "every case once, in one of imagesTr, imagesUn, imagesTs",
                    "remove one, or rename it if it is another scan",
                    case=case.id,
                    file=case.images[0],
                )
            )
    return problems


def _with_table(path: Path, cases: list[Case]) -> tuple[list[Case], list[Problem]]:
    """The cases in order of pool and id, with patient and attributes from cases.csv where it exists."""
    cases = sorted(cases, key=lambda case: (("labeled", "unlabeled", "test").index(case.pool), case.id))
    if not path.is_file():
        return cases, []
    rows, problems = _read_table(path)
    ids = {case.id for case in cases}
    unknown, unlisted = sorted(set(rows) - ids), sorted(ids - set(rows))
    if unknown and unlisted:
        problems += [
            Problem(
                f"cases.csv has a row for '{case}', but there is no such case",
                f"one of the cases without a row: {nearest(case, unlisted)}",
                "correct the name, or remove the row and give every case one (a wrong name parts a patient's scans)",
                file=path,
            )
            for case in unknown
        ]
    elif unknown:
        logger.info("cases.csv has rows for %d cases that are not there: %s", len(unknown), ", ".join(unknown))
    elif unlisted:
        logger.warning(
            "%d cases have no row in cases.csv and count as patients of their own: %s",
            len(unlisted),
            ", ".join(unlisted),
        )
    completed = []
    for case in cases:
        row = dict(rows.get(case.id, {}))
        patient = row.pop("patient", "") or case.id
        completed.append(replace(case, patient=patient, attributes=row))
    return completed, problems


def _read_table(path: Path) -> tuple[dict[str, dict[str, str]], list[Problem]]:
    """Rows of cases.csv by case, without the column "case"; comma, semicolon or tab between the columns."""
    try:
        lines = read_text(path, "a UTF-8 table", encoding="utf-8-sig").splitlines()
        entries = list(csv.reader(lines[1:], delimiter=_delimiter(lines)))
    except InvalidInput as error:
        return {}, list(error.problems)
    except csv.Error as error:
        return {}, [Problem(f"no table ({error})", "a CSV table in UTF-8", "save it as CSV in UTF-8", file=path)]
    head = lines[0] if lines else ""
    columns = [name.strip() for name in head.split(_delimiter(lines))]
    if "case" not in columns:
        found = f"the first line is {head[:80]!a}"
        return {}, [Problem(found, "columns case, patient, …", "name the column of the case ids 'case'", file=path)]
    rows: dict[str, dict[str, str]] = {}
    problems = []
    for number, values in enumerate(entries, start=2):
        row = dict(zip(columns, (value.strip() for value in values), strict=False))
        case = row.pop("case", "")
        if not any(values):
            continue
        if id_fault(case) or case in rows:
            found = id_fault(case) or f"case '{case}' has two rows"
            problems.append(Problem(f"line {number}: {found}", "one row per case", "correct the line", file=path))
            continue
        rows[case] = row
    return rows, problems


def _delimiter(lines: Sequence[str]) -> str:
    return max(",;\t", key=(lines[0] if lines else "").count)
