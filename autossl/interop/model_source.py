"""Finds the model that is to be shared, and what lies around it that the card tells of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from autossl.data.problems import InvalidInput
from autossl.data.provenance import Written
from autossl.data.raw_dataset import inspect_raw_dataset
from autossl.data.runs import RUN_FILE, RunFilter, choose_run
from autossl.data.workspace import Workspace
from autossl.evaluation.judge_runs import VERDICT_FILE, read_verdict
from autossl.evaluation.verdict import Verdict
from autossl.inference.final_model import planned_model
from autossl.inference.inference_plan import (
    INFERENCE_PLAN_FILE,
    InferencePlan,
    LabelBudget,
    PlanMember,
    choose_inference_plan,
    read_inference_plan,
    workspace_of_plan,
)
from autossl.inference.model_folder import TrainedModel, read_model
from autossl.planners.fingerprint import Fingerprint, read_fingerprint
from autossl.planners.plan_and_preprocess import FINGERPRINT

logger = logging.getLogger(__name__)

Content = TypeVar("Content")


@dataclass(frozen=True)
class ModelSource:
    """A trained model with its inference plan."""

    plan: InferencePlan
    members: tuple[TrainedModel, ...]
    verdict: Verdict | None
    fingerprint: Fingerprint | None
    names: frozenset[str]
    """Of all cases and patients that are known here; none of them may leave."""


def find_model(
    wanted: str | Path, workspace: Path | None = None, run: RunFilter | None = None, folds: Sequence[str] | None = None
) -> ModelSource:
    """The model of a dataset or a folder.

    Args:
        wanted: a dataset, whose inference plan or only run is meant; a folder that holds inference_plan.json; or a run
            folder, which holds fold_k.
        workspace: for datasets; see `Workspace.locate`.
        run: which of the dataset's splits.
        folds: of a run folder; None: all finished integer folds.

    Raises:
        InvalidInput: no model fits or several do, or a file of it is missing or damaged.
    """
    folder = Path(wanted)
    if (folder / INFERENCE_PLAN_FILE).is_file():
        return _planned(folder / INFERENCE_PLAN_FILE)
    if (folder / RUN_FILE).is_file() or len(folder.parts) > 1:
        return _single(folder.absolute(), folds)
    home = Workspace.locate(workspace)
    dataset = home.find_dataset(str(wanted))
    path = choose_inference_plan(home, dataset, run or RunFilter()) if folds is None else None
    return _planned(path) if path is not None else _single(choose_run(home, dataset, run).folder, folds)


def _planned(path: Path) -> ModelSource:
    """results/DATASET/SPLIT/inference_plan.json."""
    plan = read_inference_plan(path)
    home = workspace_of_plan(path)
    return _source(home, plan, planned_model(home, plan, path).members, path.with_name(VERDICT_FILE))


def _single(folder: Path, folds: Sequence[str] | None) -> ModelSource:
    """results/DATASET/SPLIT/RUN, or a run folder that was copied elsewhere."""
    model = read_model(folder, folds)
    home = Workspace(folder.parents[3]) if len(folder.parts) > 4 and folder.parents[2].name == "results" else None
    patients = _patients(home, model.run.dataset)
    labeled = {case for fold in model.folds if fold in model.run.folds for case in model.run.folds[fold].labeled}
    labels = LabelBudget(n_cases=len(labeled), n_patients=len({patients.get(case, case) for case in labeled}))
    beside = folder.parent / INFERENCE_PLAN_FILE
    if not labeled and beside.is_file():  # an installed model, whose cases stayed where it was made
        labels = read_inference_plan(beside).labels
    plan = InferencePlan(
        dataset=model.run.dataset,
        split=model.run.split,
        members=(
            PlanMember(
                run=f"{model.run.dataset}/{model.run.split}/{folder.name}",
                folds=model.folds,
                total_steps=model.run.total_steps,
            ),
        ),
        combine="single",
        why="its owner named this run; it was not chosen by a comparison.",
        labels=labels,
        written=Written.now(),
    )
    return _source(home, plan, (model,))


def _source(
    home: Workspace | None, plan: InferencePlan, members: tuple[TrainedModel, ...], verdict: Path | None = None
) -> ModelSource:
    patients = _patients(home, plan.dataset)
    path = None if home is None else home.preprocessed_folder(plan.dataset) / FINGERPRINT
    fingerprint = _read_or_none(read_fingerprint, path)
    folds = [fold for member in members for fold in member.run.folds.values()]
    cases = {
        case
        for fold in folds
        for group in (fold.labeled, fold.validation, fold.unlabeled, fold.hidden_test, fold.excluded)
        for case in group
    }
    cases |= set(fingerprint.cases) if fingerprint else set()
    return ModelSource(
        plan,
        members,
        _read_or_none(read_verdict, verdict),
        fingerprint,
        frozenset(cases | set(patients) | set(patients.values())),
    )


def _patients(home: Workspace | None, dataset: str) -> dict[str, str]:
    """Case → patient, where the raw dataset is there."""
    folder = None if home is None else home.raw_folder(dataset)
    if folder is None or not folder.is_dir():
        return {}
    try:
        return {case.id: case.patient for case in inspect_raw_dataset(folder)[0].cases}
    except InvalidInput as error:
        logger.warning("patients are not known, each case counts as one: %s", error)
        return {}


def _read_or_none(read: Callable[[Path], Content], path: Path | None) -> Content | None:
    """What only the card tells of: the model can be shared without it."""
    if path is None or not path.is_file():
        return None
    try:
        return read(path)
    except InvalidInput as error:
        logger.warning("the model card goes without this file: %s", error)
        return None
