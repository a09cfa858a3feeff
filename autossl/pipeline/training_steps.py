"""The steps up to the last trained fold: plan, split, preprocess, train."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from autossl.data.probabilities import probabilities_file
from autossl.data.problems import InvalidInput
from autossl.data.raw_dataset import read_raw_dataset
from autossl.data.runs import fold_state
from autossl.data.splits import load_or_make_split, split_cases
from autossl.data.workspace import Workspace
from autossl.evaluation.benchmark.results import last_step
from autossl.pipeline import costs
from autossl.pipeline.request import ExperimentRequest, chosen_preset
from autossl.pipeline.steps import Estimate, Report, Step
from autossl.pipeline.trainings import Experiment, Training
from autossl.planners.case_scan import file_stamps
from autossl.planners.fingerprint import read_fingerprint
from autossl.planners.plan_and_preprocess import (
    FINGERPRINT,
    PlanRequest,
    plan_and_preprocess,
    plans_file,
    preprocess_planned,
)
from autossl.planners.plan_experiment import PlanOptions
from autossl.planners.plans import read_plans

# ---------------------------------------------------------------------------------------------------------- planning


def planning_steps(request: ExperimentRequest, workspace: Workspace, dataset: str) -> list[Step]:
    """Plan and split: what the other steps follow from. They write nothing but fingerprint, plans and splits."""
    folder = workspace.preprocessed_folder(dataset)
    preset = chosen_preset(request, folder)
    plans, fingerprint = plans_file(folder, preset), folder / FINGERPRINT
    split = folder / "splits" / f"{request.split}.json"
    raw = workspace.raw_folder(dataset)
    return [
        Step(
            name="plan",
            inputs=(raw / "dataset.json",),
            outputs=(fingerprint, plans),
            run=partial(_plan, request, workspace, dataset, preset),
            is_done=lambda: plans_are_current(raw, fingerprint, plans),
        ),
        Step(
            name="split",
            inputs=(raw / "dataset.json", fingerprint),
            outputs=(split,),
            run=partial(_split, request, raw, folder),
            is_done=lambda: False,  # it costs nothing, and new cases are appended
        ),
    ]


def plans_are_current(raw_folder: Path, fingerprint: Path, plans: Path) -> bool:
    """Whether the plans are readable and every file of the dataset is the one that was measured.

    Plans that were edited by hand stay: only changed files of the dataset plan it again.
    """
    try:
        read_plans(plans)
        measured = read_fingerprint(fingerprint)
        raw = read_raw_dataset(raw_folder)
    except InvalidInput:
        return False
    found = {case.id: (case.pool, file_stamps(case, raw.folder)) for case in raw.cases}
    known = {name: (case.pool, case.files) for name, case in measured.cases.items()}
    return dict(raw.description.label_schema().names) == measured.labels and found == known


def _plan(request: ExperimentRequest, workspace: Workspace, dataset: str, preset: str, report: Report) -> None:
    """Plans all configurations; preprocessing is a step of its own."""
    asked = PlanRequest(
        dataset=dataset,
        workspace=workspace.root,
        options=PlanOptions(preset=preset, configurations=request.configurations or None),
        preprocess=False,
        n_workers=request.num_processes,
        wait_s=math.inf,
    )
    plan_and_preprocess(asked, lambda stage, case, done, total: report(done, total, {}))


def _split(request: ExperimentRequest, raw_folder: Path, folder: Path, report: Report) -> None:
    """Draws the split, or brings the one that is there up to date with the cases."""
    fingerprint = read_fingerprint(folder / FINGERPRINT)
    load_or_make_split(
        folder,
        split_cases(read_raw_dataset(raw_folder)),
        request.labeled,
        request.draw,
        "deployment",
        duplicates=fingerprint.duplicates,
    )
    report(1, 1, {})


# ---------------------------------------------------------------------------------------------------------- training


def training_steps(experiment: Experiment) -> list[Step]:
    """Preprocessing per configuration, then each fold of each run: per configuration the twin first."""
    twins = [experiment.twin(name) for name in experiment.configurations]
    steps = [_preprocessing_step(experiment, training) for training in twins]
    return steps + [
        _fold_step(experiment, training, fold) for training in experiment.trainings for fold in training.folds
    ]


def _preprocessing_step(experiment: Experiment, training: Training) -> Step:
    setup, n_processes = training.setup, experiment.request.num_processes
    folder = experiment.workspace.preprocessed_folder(experiment.dataset)

    def run(report: Report) -> None:
        wanted = (training.configuration,)
        preprocess_planned(
            setup.raw,
            setup.fingerprint,
            setup.plans,
            wanted,
            folder,
            n_processes,
            lambda stage, case, done, total: report(done, total, {}),
        )

    def is_done() -> bool:
        return all(setup.store.has(case, labeled) for case, labeled in wanted_cases(training).items())

    return Step(
        name=f"preprocess {training.configuration}",
        inputs=(plans_file(folder, experiment.preset),),
        outputs=(),
        run=run,
        is_done=is_done,
        estimate=lambda: costs.preprocessing(setup, n_processes),
    )


def wanted_cases(training: Training) -> dict[str, bool]:
    """Cases that the folds of a run read, and whether with their label."""
    folds = training.setup.folds.values()
    cases = {case: False for fold in folds for case in fold.unlabeled}
    return cases | {case: True for fold in folds for case in (*fold.labeled, *fold.validation)}


def _fold_step(experiment: Experiment, training: Training, fold: str) -> Step:
    folder = experiment.workspace.preprocessed_folder(experiment.dataset)
    total = training.spec.total_steps
    return Step(
        name=f"train {training.name} fold {fold}",
        inputs=(plans_file(folder, experiment.preset), folder / "splits" / f"{experiment.split}.json"),
        outputs=(training.fold_folder(fold) / "checkpoint_final.pth", training.summary(fold)),
        command=partial(train_words, experiment, training, fold),
        is_done=partial(fold_is_done, training, fold),
        progress=lambda: (last_step(training.fold_folder(fold)), total),
        alone_in=training.folder,
        record_in=training.fold_folder(fold),
        estimate=partial(_fold_estimate, experiment, training, fold),
    )


def fold_is_done(training: Training, fold: str) -> bool:
    """Whether nothing is left: trained, validation cases predicted with their probabilities, and scored."""
    folder = training.fold_folder(fold)
    if fold_state(folder) != "finished" or not training.summary(fold).is_file():
        return False
    validation = training.summary(fold).parent
    return all(probabilities_file(validation, case).is_file() for case in training.setup.folds[fold].validation)


def train_words(experiment: Experiment, training: Training, fold: str, device: str) -> list[str]:
    """The command that trains a fold, or goes on with it; a user may run it as it is."""
    request, asked = training.setup.request, experiment.request
    words = ["autossl_train", experiment.dataset, training.configuration, fold, "-m", training.method, "--resume"]
    words += ["--preset", experiment.preset, "--steps", str(training.asked_steps), "--seed", str(request.seed)]
    words += ["--device", device, "--workspace", str(experiment.workspace.root), "--save_probabilities"]
    if request.labeled is not None:
        words += ["--labeled", request.labeled, "--draw", str(request.draw), "--deployment"]
    if asked.num_workers is not None:
        words += ["--num_workers", str(asked.num_workers)]
    if request.tag is not None:
        words += ["--tag", request.tag]
    settings: Mapping[str, str] = request.settings
    if settings:
        words += ["--set", *(f"{key}={value}" for key, value in settings.items())]
    return words


def _fold_estimate(experiment: Experiment, training: Training, fold: str) -> Estimate:
    """Of what is left of a fold; nothing of one that is done."""
    if fold_is_done(training, fold):
        return Estimate(0.0, 0.0, 0.0)
    seconds: Callable[[Training, str | None], float | None] = experiment.seconds_per_step
    left = max(0, training.spec.total_steps - last_step(training.fold_folder(fold)))
    twin = experiment.twin(training.configuration)
    return costs.training(
        training.setup, fold, left, experiment.speed(training), (seconds(training, fold), seconds(twin, None))
    )
