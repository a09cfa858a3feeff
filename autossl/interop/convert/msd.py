"""The layout of the Medical Segmentation Decathlon: dataset.json with lists of files, channels as a fourth dimension.

A task holds imagesTr, labelsTr and imagesTs (without labels). Its dataset.json names channels under "modality", labels
as number → name, and lists the files under "training" and "test". Hidden files (the macOS twins "._NAME") are passed
over.
"""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autossl.data.files import read_json
from autossl.data.problems import InvalidInput, Problem, schema_faults
from autossl.interop.convert.nifti_files import copy_nifti, split_channels, stem, volume_fault
from autossl.interop.convert.source import (
    CaseFiles,
    ConvertRequest,
    SourceCase,
    SourceDataset,
    case_faults,
    renamed_channels,
    with_background,
)

logger = logging.getLogger(__name__)

TASK_NAME = re.compile(r"^Task(?P<number>\d+)_(?P<name>.+)$")
NOTES = ("name", "description", "reference", "licence", "license", "release")
LISTS = 'modality {"0": "MRI"}, labels {"0": "background", "1": "…"}, training [{"image": …, "label": …}], test […]'


class _Pair(BaseModel):
    image: str
    label: str


class _Description(BaseModel):
    """dataset.json of a task."""

    model_config = ConfigDict(extra="allow")

    modality: dict[int, str] = Field(min_length=1)
    labels: dict[int, str]
    training: list[_Pair]
    test: list[str] = []


def dataset_name(folder: Path) -> str | None:
    """Task04_Hippocampus → Dataset004_Hippocampus; None for other names."""
    match = TASK_NAME.match(folder.name)
    return f"Dataset{int(match['number']):03d}_{match['name']}" if match else None


def read_msd(request: ConvertRequest) -> SourceDataset:
    """Reads the lists and the headers of all files.

    Raises:
        InvalidInput: with all problems: no such layout, files that are missing, unreadable or lie elsewhere, other
            numbers of channels than the description says, ids that occur twice.
    """
    folder = Path(request.source)
    description = _read_description(folder)
    n_channels = len(description.modality)
    cases: list[SourceCase] = []
    problems = [] if request.labels else _label_problems(folder, description)
    for pair in description.training:
        found, faults = _case(folder, pair.image, pair.label, n_channels)
        cases, problems = cases + found, problems + faults
    for image in description.test:
        found, faults = _case(folder, image, None, n_channels)
        cases, problems = cases + found, problems + faults
    problems = problems or case_faults(cases, folder)
    if problems:
        raise InvalidInput(problems)
    _say_what_is_not_listed(folder, description)
    labels = request.labels or {name: value for value, name in description.labels.items() if value != 0}
    names = [description.modality[number] for number in sorted(description.modality)]
    notes = {key: value for key in NOTES if (value := (description.model_extra or {}).get(key))}
    return SourceDataset(
        renamed_channels(names, request.channels, folder), with_background(labels), tuple(cases), notes
    )


def _read_description(folder: Path) -> _Description:
    path = folder / "dataset.json"
    if not path.is_file():
        expected = "a task of the Decathlon: dataset.json, imagesTr/, labelsTr/ and mostly imagesTs/"
        raise InvalidInput(Problem("there is no dataset.json", expected, "name the task's own folder", file=folder))
    content = read_json(path)
    if isinstance(content, dict) and "channel_names" in content:
        fix = "move or link the folder into raw/ of the workspace as DatasetXXX_Name"
        found = "this is nnU-Net v2's raw layout, which needs no converting"
        raise InvalidInput(Problem(found, 'a Decathlon task ("modality" instead of "channel_names")', fix, file=path))
    try:
        return _Description.model_validate(content)
    except ValidationError as error:
        faults = schema_faults(error)
        raise InvalidInput([Problem(fault, LISTS, "correct dataset.json", file=path) for fault in faults]) from error


def _label_problems(folder: Path, description: _Description) -> list[Problem]:
    names = [name for value, name in description.labels.items() if value != 0]
    if not names or len(set(names)) < len(names):
        found = f"labels: {description.labels}"
        fix = "correct dataset.json, or name them with --label NAME=VALUE"
        return [Problem(found, "a name of its own for each value", fix, file=folder / "dataset.json")]
    return []


def _case(folder: Path, image: str, label: str | None, n_channels: int) -> tuple[list[SourceCase], list[Problem]]:
    """The case, or what is wrong with it."""
    paths: list[Path] = []
    problems: list[Problem] = []
    for text, n_volumes in ((image, n_channels), (label, 1)):
        if text is None:
            continue
        inside, path = _inside(folder, text)
        fault: Problem | None = None
        if not inside:
            fix = "correct dataset.json"
            fault = Problem(f"'{text}' lies outside of the dataset", "a path below it", fix, file=folder)
        else:
            fault = volume_fault(path, n_volumes)
        if fault:
            problems.append(fault)
        paths.append(path)
    if problems:
        return [], problems
    write = partial(_write, paths[0], paths[1] if label else None)
    return [SourceCase(stem(paths[0]), "labeled" if label else "test", label is not None, write)], []


def _inside(folder: Path, text: str) -> tuple[bool, Path]:
    """Whether a path of the description lies below the folder, and the path."""
    parts = PurePosixPath(text.replace("\\", "/"))
    path = folder / parts
    return not parts.is_absolute() and path.resolve().is_relative_to(folder.resolve()), path


def _write(image: Path, label: Path | None, files: CaseFiles) -> None:
    split_channels(image, files.images)
    if label is not None and files.label is not None:
        copy_nifti(label, files.label)


def _say_what_is_not_listed(folder: Path, description: _Description) -> None:
    listed = {Path(text).name for text in [*(pair.image for pair in description.training), *description.test]}
    there: list[Any] = [path for name in ("imagesTr", "imagesTs") for path in (folder / name).glob("*.nii*")]
    others = sorted(path.name for path in there if path.name not in listed and not path.name.startswith("."))
    if others:
        names = ", ".join(others[:10]) + (", …" if len(others) > 10 else "")
        logger.warning("%d images are not listed in dataset.json and are passed over: %s", len(others), names)
