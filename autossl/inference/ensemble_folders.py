"""Averages the probabilities of several prediction folders: the function behind `autossl_ensemble`.

For models that no inference plan joins, such as those of other machines. Folders are those of `autossl_predict
--save_probabilities`; models may differ in everything but their labels.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from autossl.data.description import read_description
from autossl.data.files import atomic_write, write_json
from autossl.data.image_io import read_geometry, write_label_map
from autossl.data.labels import LabelSchema
from autossl.data.probabilities import (
    PROBABILITIES_FOLDER,
    labels_of,
    mean_of,
    probabilities_file,
    quantize,
    write_probabilities_quantized,
)
from autossl.data.problems import InvalidInput, Problem
from autossl.data.provenance import Written
from autossl.inference.model_folder import DESCRIPTION_FILE
from autossl.inference.outputs import OutputFolder
from autossl.inference.restore import Wanted

ENSEMBLE_FILE = "ensemble.json"


@dataclass(frozen=True)
class EnsembleRequest:
    """Which folders, where to."""

    folders: tuple[Path, ...]
    """Two or more, each with CASE.<ending>, probabilities/CASE.b2nd and dataset.json."""
    output: Path
    save_probabilities: bool = False
    """Writes the means beside the label maps."""
    overwrite: bool = False
    """Replaces label maps that are there; without it they are an error."""


def ensemble_folders(request: EnsembleRequest, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Writes the label map that the folders' mean probabilities decide, of every case. No postprocessing is applied.

    The output folder also gets dataset.json and ensemble.json, which names the folders.

    Args:
        request: What and where.
        progress: Called with (cases done, cases in all).

    Returns:
        The cases, by name.

    Raises:
        InvalidInput: Fewer than two folders, other labels, cases that not all of them have, other grids, or results
            that are there; all together, nothing is written then.
    """
    cases = _check(request)
    first = request.folders[0]
    description = read_description(first / DESCRIPTION_FILE)
    schema, wanted = description.label_schema(), Wanted(probabilities=request.save_probabilities)
    outputs = OutputFolder(request.output, description.file_ending, wanted, n_folds=1)
    request.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(request.output / DESCRIPTION_FILE) as partial:
        shutil.copyfile(first / DESCRIPTION_FILE, partial)
    folders = [str(folder.resolve()) for folder in request.folders]
    write_json(request.output / ENSEMBLE_FILE, {"folders": folders, "written": Written.now().model_dump(mode="json")})
    for done, case in enumerate(cases, 1):
        _average(case, request, outputs, schema)
        if progress is not None:
            progress(done, len(cases))
    return cases


def _average(case: str, request: EnsembleRequest, outputs: OutputFolder, schema: LabelSchema) -> None:
    """One case, few slices at a time; the label map is written last."""
    label_map: list[npt.NDArray[np.integer]] = []
    files = [probabilities_file(folder, case) for folder in request.folders]

    def decided() -> Iterator[npt.NDArray[np.uint8]]:
        for slab in mean_of(files):
            label_map.append(labels_of(slab, schema))
            yield quantize(slab, keep_largest=not schema.has_regions)

    target = outputs.label_map(case)
    target.unlink(missing_ok=True)
    if request.save_probabilities:
        write_probabilities_quantized(probabilities_file(request.output, case), decided())
    else:
        _exhaust(decided())
    geometry = read_geometry(request.folders[0] / target.name, "native")
    write_label_map(target, np.concatenate(label_map), geometry)


def _exhaust(slabs: Iterable[object]) -> None:
    for _ in slabs:
        pass


def _check(request: EnsembleRequest) -> list[str]:
    """The cases; raises with everything that is wrong."""
    problems = []
    if len(set(map(Path.resolve, request.folders))) < 2:
        problems.append(Problem(f"{len(request.folders)} folders", "two or more different ones", "name them with -i"))
    descriptions = [read_description(folder / DESCRIPTION_FILE) for folder in request.folders]
    found = [{path.stem for path in (folder / PROBABILITIES_FOLDER).glob("*.b2nd")} for folder in request.folders]
    everything = sorted(set().union(*found))
    if not everything:
        fix = "predict with --save_probabilities"
        problems.append(Problem("no probabilities in any folder", "probabilities/CASE.b2nd in each", fix))
    for folder, description, there in zip(request.folders, descriptions, found, strict=True):
        if description.label_schema() != descriptions[0].label_schema():
            expected = f"those of {request.folders[0]}"
            problems.append(Problem("other labels", expected, "combine models of one dataset", file=folder))
        if folder.resolve() == request.output.resolve():
            problems.append(Problem("it is also the output folder", "another one", "choose another -o", file=folder))
        for case in everything:
            if case not in there or not (folder / f"{case}{description.file_ending}").is_file():
                expected, fix = "its label map and probabilities", "predict it there with --save_probabilities"
                problems.append(Problem("missing in one of the folders", expected, fix, case=case, file=folder))
    problems = problems or _grid_problems(request.folders, everything, descriptions[0].file_ending)
    ending = descriptions[0].file_ending if descriptions else ""
    there_already = [case for case in everything if (request.output / f"{case}{ending}").exists()]
    if there_already and not request.overwrite:
        fix = "replace them with --overwrite, or choose another folder"
        expected = "an output folder without results of these cases"
        problems.append(Problem(f"results of {', '.join(there_already[:5])}", expected, fix, file=request.output))
    if problems:
        raise InvalidInput(problems)
    return everything


def _grid_problems(folders: Sequence[Path], cases: Sequence[str], ending: str) -> list[Problem]:
    problems = []
    for case in cases:
        grids = [read_geometry(folder / f"{case}{ending}") for folder in folders]
        for folder, grid in zip(folders[1:], grids[1:], strict=True):
            differences = grids[0].differences(grid)
            if differences:
                found = f"another grid than in {folders[0]}: {'; '.join(differences)}"
                fix = "predict the same images with all models"
                problems.append(Problem(found, "one grid per case", fix, case=case, file=folder))
    return problems
