"""A dataset of another layout becomes a raw dataset of the workspace: nothing appears before everything is written."""

from __future__ import annotations

import csv
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from autossl.data.description import DatasetDescription
from autossl.data.files import replace_folder, write_json
from autossl.data.parallel import parallel_map
from autossl.data.problems import InvalidInput, Problem, schema_faults
from autossl.data.raw_dataset import Pool, RawDataset, read_raw_dataset
from autossl.data.splits import Split, SplitCase
from autossl.data.workspace import DATASET_NAME, Workspace
from autossl.interop.convert.msd import dataset_name, read_msd
from autossl.interop.convert.published_splits import published_splits, split_faults, write_splits
from autossl.interop.convert.source import (
    FILE_ENDING,
    BidsOptions,
    CaseFiles,
    ConvertRequest,
    H5Options,
    Progress,
    SourceCase,
    SourceDataset,
)

logger = logging.getLogger(__name__)

FOLDERS: dict[Pool, tuple[str, str]] = {
    "labeled": ("imagesTr", "labelsTr"),
    "unlabeled": ("imagesUn", ""),
    "test": ("imagesTs", "labelsTs"),
}
STAGING_PREFIX = ".converting-"
STALE_SECONDS = 24 * 3600
"""What a killed conversion left behind is removed after a day."""


@dataclass(frozen=True)
class Converted:
    """What was written."""

    folder: Path
    raw: RawDataset
    splits: tuple[Path, ...]
    """Split files made of published lists."""


def convert(request: ConvertRequest, progress: Progress | None = None) -> Converted:
    """Reads a dataset of the named layout and writes it as a raw dataset; the source stays as it is.

    Args:
        request: what to convert, and into which dataset.
        progress: called with what is done, how many, of how many.

    Raises:
        InvalidInput: with all problems of the source's names and headers, or of the target, before anything is
            written; with the first problem of a file's content, and nothing is left behind.
        WorkerError: a file could not be written.
    """
    workspace = Workspace.locate(request.workspace)
    name, problems = _target(request, workspace)
    problems += _option_faults(request)
    try:
        source = _read(request, progress)
        _check_description(source, request)
    except InvalidInput as error:
        raise InvalidInput([*problems, *error.problems]) from error
    if request.test_as_unlabeled:
        source = replace(source, cases=tuple(_without_test(case) for case in source.cases))
    split_cases = [SplitCase(case.id, case.patient or case.id, case.pool) for case in source.cases]
    splits = published_splits(split_cases, source.lists)
    problems += split_faults(workspace.preprocessed_folder(name), splits)
    if problems:
        raise InvalidInput(problems)
    return _write(source, request, workspace, name, (splits, split_cases), progress)


def _target(request: ConvertRequest, workspace: Workspace) -> tuple[str, list[Problem]]:
    """The dataset's full name, and what speaks against writing it."""
    name = request.dataset or (dataset_name(Path(request.source).absolute()) if request.layout == "msd" else None)
    match = DATASET_NAME.match(name or "")
    if name is None or match is None or "/" in name or "\\" in name:
        found = f"the dataset name '{name}'" if name else "no dataset name"
        expected = "DatasetXXX_Name with a number of three digits, as Dataset005_Prostate"
        return name or "", [Problem(found, expected, "name it with -d")]
    problems = []
    target = workspace.raw / name
    if target.exists() and not request.overwrite:
        fix = "choose another number and name with -d, or replace it with --overwrite"
        problems.append(Problem("the dataset is there already", "a name that is free", fix, file=target))
    places = (workspace.raw, workspace.preprocessed, workspace.results)
    others = {path.name for place in places for path in place.glob(f"Dataset{match['number']}_*")} - {name}
    if others:
        found = f"number {match['number']} belongs to {', '.join(sorted(others))}"
        problems.append(Problem(found, "a number that is free", "choose another number with -d"))
    return name, problems


def _option_faults(request: ConvertRequest) -> list[Problem]:
    """Options of another layout, which would have no effect."""
    given = {"bids": request.bids != BidsOptions(), "h5": request.h5 != H5Options()}
    return [
        Problem(f"options of the layout {other}", f"those of {request.layout}", "leave them out (see --help)")
        for other, there in given.items()
        if there and other != request.layout
    ]


def _read(request: ConvertRequest, progress: Progress | None) -> SourceDataset:
    if request.layout == "msd":
        return read_msd(request)
    if request.layout == "bids":
        from autossl.interop.convert.bids import read_bids

        return read_bids(request)
    from autossl.interop.convert.h5 import read_h5

    return read_h5(request, progress)


def _without_test(case: SourceCase) -> SourceCase:
    return replace(case, pool="unlabeled", has_label=False) if case.pool == "test" else case


def _write(
    source: SourceDataset,
    request: ConvertRequest,
    workspace: Workspace,
    name: str,
    splits: tuple[list[Split], list[SplitCase]],
    progress: Progress | None,
) -> Converted:
    """Writes beside the target, reads the names back as training will, and renames."""
    target = workspace.raw / name
    with _staging(target) as staged:
        for case in source.cases:
            for folder in filter(None, FOLDERS[case.pool]):
                (staged / folder).mkdir(exist_ok=True)
        write = partial(_write_case, staged, len(source.channel_names))
        written = parallel_map(write, source.cases, request.n_workers, name_of=lambda case: case.id)
        for done, _ in enumerate(written, start=1):
            if progress:
                progress("cases", done, len(source.cases))
        write_json(staged / "dataset.json", _description(source, request))
        _write_table(staged / "cases.csv", source)
        read_raw_dataset(staged)
        # before the rename: a dataset that is there without its splits would be given other ones
        paths = write_splits(workspace.preprocessed_folder(name), *splits) if splits[0] else []
        replace_folder(staged, target, staged.parent / "replaced")
    return Converted(target, read_raw_dataset(target), tuple(paths))


def _write_case(folder: Path, n_channels: int, case: SourceCase) -> None:
    images, labels = FOLDERS[case.pool]
    files = tuple(folder / images / f"{case.id}_{channel:04d}{FILE_ENDING}" for channel in range(n_channels))
    case.write(CaseFiles(files, folder / labels / f"{case.id}{FILE_ENDING}" if case.has_label else None))


def _description(source: SourceDataset, request: ConvertRequest) -> dict[str, object]:
    """The content of dataset.json, under nnU-Net v2's keys."""
    n_labeled = sum(case.pool == "labeled" for case in source.cases)
    return {
        **source.notes,
        "channel_names": {str(number): name for number, name in enumerate(source.channel_names)},
        "labels": dict(source.labels),
        "numTraining": n_labeled,
        "file_ending": FILE_ENDING,
        "converted_from": {"layout": request.layout, "folder": Path(request.source).absolute().name},
    }


def _check_description(source: SourceDataset, request: ConvertRequest) -> None:
    """Raises InvalidInput where dataset.json would be no valid one: two names of one value, say."""
    try:
        DatasetDescription.model_validate(_description(source, request))
    except ValidationError as error:
        messages = "; ".join(schema_faults(error))
        fix = "correct --label and --channels, or the source's description"
        raise InvalidInput(Problem(messages, "labels and channels that dataset.json can hold", fix)) from error


def _write_table(path: Path, source: SourceDataset) -> None:
    """cases.csv, where there is more to say than the case ids."""
    columns = sorted({name for case in source.cases for name in case.attributes} - {"case", "patient"})
    if not columns and all(case.patient in ("", case.id) for case in source.cases):
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["case", "patient", *columns])
        for case in source.cases:
            values = (" ".join(case.attributes.get(name, "").split()) for name in columns)
            table.writerow([case.id, case.patient or case.id, *values])


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder beside the target that does not outlive the block."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(f"{STAGING_PREFIX}*"):
        if time.time() - old.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    holder = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=target.parent))
    staged = holder / target.name
    staged.mkdir()
    try:
        yield staged
    finally:
        shutil.rmtree(holder, ignore_errors=True)
