"""Tidies a folder of label maps by postprocessing rules: the function behind `autossl_apply_postprocessing`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from autossl.data.description import read_description
from autossl.data.image_io import read_label, write_label_map
from autossl.data.labels import LabelSchema
from autossl.data.parallel import parallel_map
from autossl.data.problems import InvalidInput, Problem
from autossl.data.workspace import Workspace
from autossl.evaluation.evaluate import label_files
from autossl.evaluation.label_schemas import labels_of_dataset
from autossl.evaluation.metrics import undeclared_values
from autossl.inference.postprocess import LabelMap, apply_rules, check_rules
from autossl.inference.postprocessing_plan import (
    POSTPROCESSING_FILE,
    PostprocessingPlan,
    read_postprocessing,
    write_postprocessing,
)

DESCRIPTION_FILE = "dataset.json"


@dataclass(frozen=True)
class ApplyRequest:
    """A folder of label maps to be tidied into another."""

    input: Path
    output: Path
    plan: PostprocessingPlan
    schema: LabelSchema
    overwrite: bool = False
    """Replaces results that are there."""
    n_workers: int | None = 1
    """Processes; None takes one per CPU."""


@dataclass(frozen=True)
class ApplyResult:
    """What was done."""

    cases: tuple[str, ...]
    changed: Mapping[str, int]
    """Case → voxels that have another value now; cases without any are left out."""


def apply_to_folder(request: ApplyRequest, progress: Callable[[int, int], None] | None = None) -> ApplyResult:
    """Tidies every label map of a folder; name, type and geometry of each file stay exactly as they are.

    Uncertainty maps and probabilities are passed over. The output gets dataset.json where the input has it, and
    postprocessing.json with the rules that were applied.

    Raises:
        InvalidInput: the request makes no sense (nothing is written then), or single files cannot be read or hold
            undeclared values (the others are done, and all that failed are named).
    """
    files = _check_apply(request)
    tidy = partial(_tidy_file, request=request)
    problems: list[Problem] = []
    changed: dict[str, int] = {}
    for number, (case, result) in enumerate(
        zip(files, parallel_map(tidy, list(files.values()), request.n_workers), strict=True), start=1
    ):
        if isinstance(result, int):
            changed[case] = result
        else:
            problems += [replace(problem, case=case) for problem in result]
        if progress is not None:
            progress(number, len(files))
    if changed:
        if (description := Path(request.input) / DESCRIPTION_FILE).is_file():
            shutil.copyfile(description, Path(request.output) / DESCRIPTION_FILE)
        applied = request.plan.model_copy(update={"applied_to": str(Path(request.input).resolve())})
        write_postprocessing(Path(request.output) / POSTPROCESSING_FILE, applied)
    if problems:
        title = f"{len(files) - len(changed)} of {len(files)} label maps were not tidied; the others are done:"
        raise InvalidInput(problems, title=title)
    return ApplyResult(tuple(files), {case: voxels for case, voxels in changed.items() if voxels})


def choose_postprocessing(workspace: Workspace, dataset: str) -> Path:
    """The only postprocessing.json of a dataset's splits.

    Raises:
        InvalidInput: none or several, with the list.
    """
    results = workspace.results_folder(dataset)
    found = sorted(results.glob(f"*/{POSTPROCESSING_FILE}"))
    if len(found) == 1:
        return found[0]
    listed = "".join(f"\n    {path}" for path in found)
    raise InvalidInput(
        Problem(
            f"{len(found) or 'no'} {POSTPROCESSING_FILE} of {dataset}{':' if found else ''}{listed}",
            f"exactly one {results}/SPLIT/{POSTPROCESSING_FILE}",
            "name the file with --postprocessing" if found else "find rules with autossl_find_postprocessing",
        )
    )


def find_plan_and_labels(
    folder: Path, file: Path | None = None, dataset: str | None = None, workspace: Path | None = None
) -> tuple[PostprocessingPlan, LabelSchema]:
    """The rules for a folder of label maps, and what its values mean.

    Args:
        folder: of label maps.
        file: of rules; None: the only postprocessing.json of the dataset.
        dataset: whose labels they are (4 or its name); None: see `schema_of_folder`.
        workspace: see `Workspace.locate`.

    Raises:
        InvalidInput: neither file nor dataset, no such rules, or nothing says what the values mean.
    """
    place = Workspace.locate(workspace)
    name = None if dataset is None else place.find_dataset(dataset)
    if file is None and name is None:
        fix = "name a file with --postprocessing, or a dataset with -d"
        raise InvalidInput(Problem("nothing says which rules", "a postprocessing.json, or a dataset", fix))
    plan = read_postprocessing(file or choose_postprocessing(place, str(name)))
    return plan, schema_of_folder(folder, plan) if name is None else labels_of_dataset(name, place.root)[0]


def schema_of_folder(folder: Path, plan: PostprocessingPlan) -> LabelSchema:
    """What label values mean: by dataset.json in the folder, else as the rules were found.

    Raises:
        InvalidInput: neither says it.
    """
    if (Path(folder) / DESCRIPTION_FILE).is_file():
        return read_description(folder).label_schema()
    if plan.label_schema is not None:
        return plan.label_schema
    wanted = f"{DESCRIPTION_FILE} in {folder}, or labels in the file of rules"
    raise InvalidInput(Problem("nothing says what the label values mean", wanted, "name the dataset with -d"))


def undeclared_labels(label_map: LabelMap, schema: LabelSchema, file: Path) -> list[Problem]:
    """A problem where the label map holds values that the schema does not declare."""
    unknown = undeclared_values(label_map, schema)
    expected = f"the declared values {', '.join(str(value) for value in schema.values)}"
    fix = "use the dataset that the label map belongs to"
    return [Problem(f"label values {unknown[:10]}", expected, fix, file=file)] if unknown else []


def _check_apply(request: ApplyRequest) -> dict[str, Path]:
    """The label maps of the input; raises for all that can be known before they are read."""
    files = label_files(Path(request.input))
    problems = []
    if Path(request.input).resolve() == Path(request.output).resolve():
        fix = "choose another output folder"
        problems.append(
            Problem("label maps would be replaced by their results", "two folders", fix, file=request.input)
        )
    elif Path(request.output).is_file():
        problems.append(Problem("a file", "an output folder", "choose another", file=request.output))
    elif not request.overwrite:
        there = [path.name for path in files.values() if (Path(request.output) / path.name).exists()]
        if there:
            found = f"results of {len(there)} cases are there: {', '.join(there[:5])}{' …' if there[5:] else ''}"
            fix = "replace them with --overwrite, or choose another folder"
            problems.append(Problem(found, "an output folder without them", fix, file=request.output))
    try:
        check_rules(request.plan.rules, request.schema)
    except InvalidInput as error:
        problems += error.problems
    if problems:
        raise InvalidInput(problems)
    return files


def _tidy_file(path: Path, request: ApplyRequest) -> int | list[Problem]:
    """Voxels that changed; or what is wrong with the file."""
    try:
        label_map, spacing, geometry = read_label(path, "native")
    except InvalidInput as error:
        return list(error.problems)
    problems = undeclared_labels(label_map, request.schema, path)
    if problems:
        return problems
    tidied = apply_rules(label_map, request.plan.rules, request.schema, spacing)
    write_label_map(Path(request.output) / path.name, tidied, geometry)
    return int(np.count_nonzero(tidied != label_map))
