"""One command from the raw folder to the report: the function behind `autossl_run`."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from autossl.data.files import content_hash, read_json, write_json
from autossl.data.provenance import Written
from autossl.pipeline.arrange import arrange
from autossl.pipeline.costs import training_devices
from autossl.pipeline.engine import Event, OnEvent, engine_named
from autossl.pipeline.final_steps import EXPERIMENT, HIDDEN_TEST, PLAN, REPORT, VERDICT, final_steps
from autossl.pipeline.hidden_test import hidden_lines
from autossl.pipeline.lock import experiment_lock
from autossl.pipeline.measure import FILE as SPEEDS
from autossl.pipeline.measure import OnMeasured, measure_all
from autossl.pipeline.request import ExperimentRequest, check_request
from autossl.pipeline.steps import Estimate, Ledger, Step, find_step, input_hash
from autossl.pipeline.training_steps import planning_steps, train_words, training_steps
from autossl.pipeline.trainings import Experiment

__all__ = ["Event", "ExperimentRequest", "Outlook", "dry_run", "run_experiment", "run_step"]

LOCK_FILE = ".experiment.lock"
STEPS_FOLDER, LOGS_FOLDER = "steps", "logs"


@dataclass(frozen=True)
class ExperimentResult:
    """What came out."""

    experiment: Experiment
    steps: tuple[Step, ...]

    @property
    def folder(self) -> Path:
        """results/DATASET/SPLIT, with verdict.json, inference_plan.json, report.html and the runs."""
        return self.experiment.folder

    def lines(self) -> list[str]:
        """What a user wants to read first: verdict, final model, hidden test, report."""
        lines, verdict = [], ""
        if (path := self.folder / VERDICT).is_file():
            verdict = str(read_json(path)["sentence"])
            lines.append(verdict)
        if (path := self.folder / PLAN).is_file():
            why = str(read_json(path)["why"])
            lines.append("final model: " + (why.replace(f" {verdict}", "") if verdict else why))  # said above
        if (path := self.folder / HIDDEN_TEST).is_file():
            lines += hidden_lines(read_json(path))
        report = self.folder / REPORT
        return [*lines, f"report: {report}" if report.is_file() else f"results: {self.folder}"]


def run_experiment(
    request: ExperimentRequest, on_event: OnEvent | None = None, on_measure: OnMeasured | None = None
) -> ExperimentResult:
    """Runs what is missing of all steps, in order. Another call with the same request goes on where this one ended.

    Args:
        request: What is asked for.
        on_event: Told of every step: there already, started, going on, done.
        on_measure: Told of the measuring of speeds, where hours ask for it.

    Raises:
        InvalidInput: the request cannot be met.
        StepFailed: trainings that ended with an error; what did not need them was run.
        KeyboardInterrupt: asked to stop; trainings have saved their state.
    """
    workspace, dataset = check_request(request)
    report = on_event or (lambda event: None)
    planning = planning_steps(request, workspace, dataset)
    nowhere = Ledger(workspace.preprocessed_folder(dataset), workspace.root)
    engine_named(request.engine, ("cpu",), workspace.root).run(planning, nowhere, _shifted(report, 0, 0))
    experiment = arrange(request, on_measure)
    with experiment_lock(experiment.folder / LOCK_FILE) as lock:
        experiment = arrange(request, on_measure)  # another call may have ended just now
        write_experiment(experiment)
        steps = [*training_steps(experiment), *final_steps(experiment)]
        devices = training_devices(experiment.device)
        inherited = () if lock is None else (lock,)
        engine = engine_named(request.engine, devices, experiment.folder / LOGS_FOLDER, inherited)
        engine.run(steps, ledger_of(experiment), _shifted(report, len(planning), len(planning) + len(steps)))
    return ExperimentResult(experiment, (*planning, *steps))


def run_step(request: ExperimentRequest, name: str, on_event: OnEvent | None = None) -> ExperimentResult:
    """Runs one step alone: for other engines, which see to the order. The dataset must be planned.

    Raises:
        InvalidInput: as `run_experiment`, and where there is no such step.
    """
    experiment = arrange(request)
    steps = [*training_steps(experiment), *final_steps(experiment)]
    step = find_step(steps, name)
    engine = engine_named("local", training_devices(experiment.device), experiment.folder / LOGS_FOLDER)
    engine.run([step], ledger_of(experiment), on_event)
    return ExperimentResult(experiment, (step,))


def ledger_of(experiment: Experiment) -> Ledger:
    """What the steps of an experiment were made from."""
    return Ledger(experiment.folder / STEPS_FOLDER, experiment.workspace.root)


def write_experiment(experiment: Experiment) -> None:
    """What was asked for and decided, and each run's command, for the report; left as it is where nothing changed."""
    path = experiment.folder / EXPERIMENT
    content = {
        "dataset": experiment.dataset,
        "split": experiment.split,
        "command": shlex.join(command_words(experiment.request)),
        "configurations": experiment.configurations,
        "methods": experiment.methods,
        "preset": experiment.preset,
        "seed": experiment.request.seed,
        "why": dict(experiment.why),
        "runs": [
            {
                "run": training.folder.relative_to(experiment.workspace.results).as_posix(),
                "role": training.role,
                "steps": training.spec.total_steps,
                "command": shlex.join(_placeless(train_words(experiment, training, "all_folds", experiment.device))),
            }
            for training in experiment.trainings
        ],
    }
    if input_hash(path) != content_hash(content, 16):
        write_json(path, {**content, "written": Written.now().model_dump(mode="json")})


def command_words(request: ExperimentRequest) -> list[str]:
    """The command of a request, without where its workspace lies."""
    words = ["autossl_run", request.dataset]
    for option, values in (("-c", request.configurations), ("-m", request.methods)):
        words += [option, *values] if values else []
    pairs: list[tuple[str, str | int | float | None]] = [
        ("--preset", request.preset),
        ("--labeled", request.labeled),
        ("--draw", request.draw or None),
        ("--steps", request.steps),
        ("--hours", request.hours),
        ("--seed", request.seed or None),
        ("--tag", request.tag),
        ("--final", request.final),
    ]
    for option, value in pairs:
        words += [option, str(value)] if value is not None else []
    words += ["--equal_time"] if request.equal_time else []
    settings = [f"{method}.{key}={value}" for method, of in request.settings.items() for key, value in of.items()]
    return words + (["--set", *settings] if settings else [])


def _placeless(words: list[str]) -> list[str]:
    """Without --workspace: files of results say nothing of the machine."""
    index = words.index("--workspace")
    return words[:index] + words[index + 2 :]


def _shifted(report: OnEvent, before: int, total: int) -> OnEvent:
    """Numbers the steps of a part as those of the whole; a total of 0 stands for one that is not known yet."""
    return lambda event: report(replace(event, number=event.number + before, n_steps=total))


# --------------------------------------------------------------------------------------------------------- dry running


@dataclass(frozen=True)
class Outlook:
    """What a call would do, from measured step speeds."""

    experiment: Experiment
    steps: tuple[tuple[Step, bool, Estimate], ...]
    """Each with whether it is done, and what is left of it."""
    n_devices: int

    def total(self, figure: Callable[[Estimate], float | None]) -> float:
        """Sum over the steps that are not done; what is not known counts nothing."""
        return sum(figure(estimate) or 0.0 for _, done, estimate in self.steps if not done)

    @property
    def seconds(self) -> float:
        """Of all that is left; trainings share the devices."""
        return self.total(lambda estimate: estimate.seconds) / self.n_devices

    @property
    def disk_bytes(self) -> float:
        """That will be written."""
        return self.total(lambda estimate: estimate.disk_bytes)

    @property
    def memory_bytes(self) -> float:
        """The most that a step takes."""
        return max((estimate.memory_bytes or 0.0 for _, done, estimate in self.steps if not done), default=0.0)


def dry_run(
    request: ExperimentRequest, on_event: OnEvent | None = None, on_measure: OnMeasured | None = None
) -> Outlook:
    """Plans the dataset, measures a few steps of each method on made-up images, and says what the whole would take.

    Writes fingerprint, plans, the split, and the measured speeds; trains and preprocesses nothing.

    Raises:
        InvalidInput: as `run_experiment`.
    """
    workspace, dataset = check_request(request)
    report = on_event or (lambda event: None)
    planning = planning_steps(request, workspace, dataset)
    nowhere = Ledger(workspace.preprocessed_folder(dataset), workspace.root)
    engine_named(request.engine, ("cpu",), workspace.root).run(planning, nowhere, _shifted(report, 0, 0))
    experiment = arrange(request, on_measure)
    missing = [training.setup for training in experiment.trainings]
    measure_all(missing, experiment.folder / SPEEDS, on_measure)
    steps = [*training_steps(experiment), *final_steps(experiment)]
    ledger = ledger_of(experiment)
    listed = [(step, ledger.is_done(step), step.estimate()) for step in steps]
    return Outlook(experiment, tuple(listed), len(training_devices(experiment.device)))
