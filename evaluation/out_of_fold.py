"""Out-of-fold predictions: each labeled case as the fold predicted it that trained without it.

A run's folds leave them in `fold_k/validation/` (label maps; with `autossl_train --save_probabilities` probabilities
too). Pooled they are what models, ensembles and postprocessing are chosen on. The scores of two folds are correlated,
because most of their training cases are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autossl.data.geometry import Geometry
from autossl.data.image_io import read_label
from autossl.data.locks import hold
from autossl.data.probabilities import probabilities_file, write_probabilities_quantized
from autossl.data.problems import InvalidInput, Problem
from autossl.data.raw_dataset import read_raw_dataset
from autossl.data.runs import FoundRun, fold_lock
from autossl.data.splits import read_split
from autossl.data.store import CaseStore
from autossl.data.workspace import Workspace
from autossl.inference.model_folder import TrainedModel, read_model
from autossl.inference.outputs import OutputFolder
from autossl.inference.predictor import Window
from autossl.inference.preprocessed import restore_preprocessed
from autossl.inference.restore import Restored, Wanted
from autossl.networks.device import resolve_device

logger = logging.getLogger(__name__)

VALIDATION_FOLDER = "validation"
FOLD_WAIT_S = 5.0
"""For a training of the fold that was told to stop, or that only writes its last scores."""
OnCase = Callable[[int, int, str], None]
"""(cases done, cases in all, case)."""


@dataclass(frozen=True)
class OutOfFoldCase:
    """A validation case of one fold."""

    case: str
    patient: str
    fold: str
    label_map: Path
    """As predicted, on the grid of the reference; never postprocessed."""
    probabilities: Path | None
    """For `read_probabilities`; None where they were not saved (`predict_out_of_fold` makes them)."""
    reference: Path
    """Raw label map, its values as delivered (`remap_labels` of the fingerprint)."""


def collect(workspace: Workspace, dataset: str, run: FoundRun) -> list[OutOfFoldCase]:
    """The validation cases of all folds of the run's split, pooled, by case id.

    Cases that got their label after a fold was trained are not among them.

    Raises:
        InvalidInput: folds that are not finished, predictions or references that are missing, a case that validates
            in several folds; all together.
    """
    raw = read_raw_dataset(workspace.raw_folder(dataset))
    known = {case.id: case for case in raw.cases}
    n_folds = read_split(workspace.preprocessed_folder(dataset) / "splits" / f"{run.spec.split}.json").n_folds
    states, problems = run.states, _unfinished(run, n_folds)
    pooled: dict[str, OutOfFoldCase] = {}
    for fold in (str(number) for number in range(n_folds) if states.get(str(number)) == "finished"):
        folder = run.folder / f"fold_{fold}" / VALIDATION_FOLDER
        for case in run.spec.folds[fold].validation:
            label_map, probabilities = folder / f"{case}{raw.description.file_ending}", probabilities_file(folder, case)
            reference = known[case].label if case in known else None
            if case in pooled:
                found, expected = f"validates in folds {pooled[case].fold} and {fold}", "one fold per case"
                fix = "train the folds of one split again with --overwrite"
            elif reference is None:
                found, expected, fix = "has no label any more", f"one in {raw.folder / 'labelsTr'}", "restore it"
            elif not label_map.is_file():
                found, expected = "was not predicted when its fold ended", f"{label_map}"
                fix = "run the autossl_train of this run again: it predicts what is missing"
            else:
                saved = probabilities if probabilities.is_file() else None
                pooled[case] = OutOfFoldCase(case, known[case].patient, fold, label_map, saved, reference)
                continue
            problems.append(Problem(found, expected, fix, case=case, file=run.folder))
    if problems:
        raise InvalidInput(problems, title=f"{run.folder} has no complete out-of-fold predictions:")
    return [pooled[case] for case in sorted(pooled)]


def predict_out_of_fold(
    run: FoundRun, workspace: Workspace, device: str = "auto", on_case: OnCase | None = None
) -> list[str]:
    """Predicts, without training, what is missing of the finished folds' label maps and probabilities.

    Label maps that are there stay: they were scored. A fold that never came to its scores gets label maps and no
    summary.json; `autossl_train` adds it.

    Args:
        run: its finished folds are completed.
        workspace: with the preprocessed cases.
        device: where to predict.
        on_case: told of each case that was predicted.

    Returns:
        The cases that were predicted.

    Raises:
        InvalidInput: a case is not preprocessed (nothing is predicted then), a checkpoint cannot be read, or another
            process works on the fold.
    """
    device, wanted = resolve_device(device), Wanted(probabilities=True)
    todo = {}
    for fold, state in run.states.items():
        if state == "finished" and fold.isdecimal():
            model = read_model(run.folder, [fold])
            folder = run.folder / f"fold_{fold}" / VALIDATION_FOLDER
            outputs = OutputFolder(folder, model.description.file_ending, wanted, n_folds=1)
            cases = [case for case in run.spec.folds[fold].validation if not outputs.is_complete(case)]
            if cases:
                todo[fold] = (model, outputs, cases)
    _check_preprocessed(workspace, [(model, case) for model, _, cases in todo.values() for case in cases])
    names = [case for _, _, cases in todo.values() for case in cases]
    done = 0
    for fold, (model, outputs, cases) in todo.items():
        with hold(fold_lock(run.folder, fold), f"fold {fold} of {run.folder.name}", FOLD_WAIT_S):
            predictor, store = model.load_predictor(Window.of(model.plan), device), _store(workspace, model)
            for case in cases:
                restored, geometry = restore_preprocessed(predictor, store, case, model.plans, model.schema, wanted)
                write_missing(outputs, case, restored, geometry)
                done += 1
                if on_case is not None:
                    on_case(done, len(names), case)
    return names


def write_missing(outputs: OutputFolder, case: str, restored: Restored, geometry: Geometry) -> None:
    """Writes a case; where its label map is there already only the probabilities.

    A label map that would be another one today (other threads, another device) is reported.
    """
    path = outputs.label_map(case)
    if not path.is_file():
        outputs.write(case, restored, geometry)
        return
    differing = np.count_nonzero(read_label(path, "native")[0] != geometry.restore(restored.label_map))
    if differing:
        logger.warning(
            "%s: %d voxels of %s are predicted otherwise today; it stays, and its probabilities are today's",
            case,
            differing,
            path,
        )
    if restored.probabilities is not None:
        write_probabilities_quantized(probabilities_file(path.parent, case), geometry.restore(restored.probabilities))


def _unfinished(run: FoundRun, n_folds: int) -> list[Problem]:
    """At most one problem, which names all folds."""
    there = run.states
    states = {str(number): there.get(str(number), "absent") for number in range(n_folds)}
    found = ", ".join(f"fold {fold} is {state}" for fold, state in states.items() if state != "finished")
    if n_folds and not found:
        return []
    expected = f"all {n_folds} folds of split {run.spec.split} finished" if n_folds else "a split with folds"
    fix = f"train them with autossl_train -m {run.spec.method} --resume and the other options of this run"
    return [Problem(found or "the split has no folds", expected, fix, file=run.folder)]


def _store(workspace: Workspace, model: TrainedModel) -> CaseStore:
    folder = workspace.preprocessed_folder(model.run.dataset)
    return CaseStore(folder / "data" / model.plans.data_hash(model.run.configuration))


def _check_preprocessed(workspace: Workspace, cases: Sequence[tuple[TrainedModel, str]]) -> None:
    problems = [
        Problem(
            "is not preprocessed any more",
            f"its image in {_store(workspace, model).folder}",
            f"run autossl_plan_and_preprocess -d {model.run.dataset} --preset {model.run.preset}",
            case=case,
        )
        for model, case in cases
        if not _store(workspace, model).has(case, labeled=False)
    ]
    if problems:
        raise InvalidInput(problems)
