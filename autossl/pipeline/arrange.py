"""From a request and the plans to the runs of an experiment: which, with which length, and why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from autossl.data.problems import InvalidInput, Problem, Problems
from autossl.data.runs import fold_state, read_run, spec_differences
from autossl.pipeline.length import decide_length
from autossl.pipeline.measure import OnMeasured
from autossl.pipeline.recommend import TWIN, recommended_configurations, recommended_methods
from autossl.pipeline.request import ExperimentRequest, check_request, chosen_preset, train_request
from autossl.pipeline.trainings import Experiment, Role, Training
from autossl.planners.plan_and_preprocess import find_plans
from autossl.trainers.setup import RunSetup, resolve

logger = logging.getLogger(__name__)


def arrange(request: ExperimentRequest, on_measure: OnMeasured | None = None) -> Experiment:
    """Which runs a planned dataset gets, with their length; measures speeds where hours or equal time ask for it.

    Raises:
        InvalidInput: with all problems together: needs of a method that the data does not meet, runs on disk that were
            made with another specification, too few hours.
    """
    workspace, dataset = check_request(request)
    folder = workspace.preprocessed_folder(dataset)
    preset = chosen_preset(request, folder)
    plans = find_plans(folder, preset)
    configurations, configurations_why = recommended_configurations(plans)
    if request.configurations:
        configurations, configurations_why = tuple(dict.fromkeys(request.configurations)), "named by the user"

    def resolved(configuration: str, method: str) -> RunSetup:
        return resolve(train_request(request, workspace, dataset, preset, configuration, method))

    problems = Problems()
    twins = {name: problems.catch(resolved, name, TWIN) for name in configurations}
    problems.stop()
    twin = next(setup for setup in twins.values() if setup is not None)
    _check_folds(twin)
    methods, methods_why = recommended_methods(max(len(fold.unlabeled) for fold in twin.folds.values()))
    if request.methods:
        named = tuple(name for name in dict.fromkeys(request.methods) if name != TWIN)
        methods, methods_why = named, "named by the user"
    setups: list[tuple[Role, RunSetup]] = []
    for configuration, setup in twins.items():
        setups += [("twin", setup)] if setup is not None else []
        for method in methods:
            found = _method_setup(resolved, configuration, method, bool(request.methods), problems)
            setups += [("method", found)] if found is not None else []
    problems.stop()
    length = decide_length(request, setups, workspace.results_folder(dataset) / request.split, on_measure)
    trainings = [_training(role, setup, length.steps) for role, setup in setups]
    trainings += [_training("equal time", setup, more) for setup, more in length.equal_time]
    _refuse_other_runs(trainings, problems)
    problems.stop()
    why = {"configurations": configurations_why, "methods": methods_why, "steps": length.why}
    order = {name: number for number, name in enumerate(configurations)}
    trainings.sort(key=lambda training: order[training.configuration])
    return Experiment(request, workspace, tuple(trainings), why)


def _check_folds(twin: RunSetup) -> None:
    if len(twin.folds) < 2:
        found = f"split {twin.split.name} has {len(twin.folds)} folds"
        raise InvalidInput(Problem(found, "labeled cases of at least 2 patients", "label more cases"))


def _method_setup(
    resolved: Callable[[str, str], RunSetup], configuration: str, method: str, named: bool, problems: Problems
) -> RunSetup | None:
    """A recommended method whose needs are not met is left out; a named one is a problem."""
    if named:
        return problems.catch(resolved, configuration, method)
    try:
        return resolved(configuration, method)
    except InvalidInput as error:
        logger.warning("%s is left out for %s: %s", method, configuration, error)
        return None


def _training(role: Role, setup: RunSetup, steps: int) -> Training:
    total = setup.method.total_steps(steps, setup.settings)
    setup = replace(setup, request=replace(setup.request, steps=steps))
    return Training(role, setup, setup.spec(total), steps)


def _refuse_other_runs(trainings: Iterable[Training], problems: Problems) -> None:
    """A run with another specification under the same name cannot stand in for one of these."""
    for training in trainings:
        if not training.folder.is_dir() or not any(training.folder.iterdir()):
            continue
        stored = problems.catch(read_run, training.folder)
        if stored is None:
            continue
        started = [fold for fold in training.folds if fold_state(training.fold_folder(fold)) != "absent"]
        # how many unlabeled patches fit into memory is decided by the training itself, not asked for
        asked = training.spec.model_copy(update={"unlabeled_batch_size": stored.unlabeled_batch_size})
        for problem in spec_differences(stored, asked, started):
            fix = "ask for what it was made with, give the new runs a name of their own with --tag, or move it away"
            problems.add(problem.found, problem.expected, fix, training.folder)
