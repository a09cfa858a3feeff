"""The steps after the last trained fold: out-of-fold scores, verdict, selection, postprocessing, hidden test, report.

Each is one call of the function that a command of its own stands for; those are imported when a step runs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from autossl.data.files import read_json, write_json
from autossl.data.provenance import Written
from autossl.data.runs import FoundRun, RunFilter, RunSpec, find_runs, read_run
from autossl.pipeline import costs, hidden_test
from autossl.pipeline.request import ExperimentRequest
from autossl.pipeline.steps import Estimate, Report, Step
from autossl.pipeline.trainings import Experiment, Training

EXPERIMENT, OUT_OF_FOLD = "experiment.json", "out_of_fold.json"
VERDICT, SELECTION, PLAN = "verdict.json", "selection.json", "inference_plan.json"
POSTPROCESSING, HIDDEN_TEST, LABEL_NEXT = "postprocessing.json", "hidden_test.json", "label_next.json"
REPORT = "report.html"


def final_steps(experiment: Experiment) -> list[Step]:
    """In their order; those that the data has no use for are left out."""
    steps = [_out_of_fold_step(experiment)]
    if experiment.methods:
        steps.append(_verdict_step(experiment))
    steps += [_selection_step(experiment), _postprocessing_step(experiment)]
    steps += _hidden_test_steps(experiment)
    if any(fold.unlabeled for fold in experiment.trainings[0].setup.folds.values()):
        steps.append(_label_next_step(experiment))
    made = tuple(path for step in steps for path in step.outputs if path.parent == experiment.folder)
    return [*steps, _report_step(experiment, made)]


def summaries(experiment: Experiment) -> tuple[Path, ...]:
    """The scores of all folds of all runs: what everything after the training is made from."""
    return tuple(training.summary(fold) for training in experiment.trainings for fold in training.folds)


def _names(experiment: Experiment) -> list[str]:
    """Of the run folders."""
    return [training.folder.name for training in experiment.trainings]


# -------------------------------------------------------------------------------------------------------- out of fold


def _out_of_fold_step(experiment: Experiment) -> Step:
    path = experiment.folder / OUT_OF_FOLD
    return Step(
        name="collect out-of-fold",
        inputs=summaries(experiment),
        outputs=(path,),
        run=partial(_collect, experiment, path),
        parameters={"runs": _names(experiment)},
    )


def _collect(experiment: Experiment, path: Path, report: Report) -> None:
    """Which case each run predicted in which fold; predictions that are missing are made, nothing is trained."""
    from autossl.evaluation.out_of_fold import collect, predict_out_of_fold

    content: dict[str, Any] = {"dataset": experiment.dataset, "split": experiment.split, "runs": {}}
    for number, training in enumerate(experiment.trainings):
        report(number, len(experiment.trainings), {})
        run = FoundRun(training.folder, read_run(training.folder))
        predict_out_of_fold(run, experiment.workspace, experiment.device)
        cases = collect(experiment.workspace, experiment.dataset, run)
        content["runs"][training.folder.name] = {
            "n_cases": len(cases),
            "n_patients": len({case.patient for case in cases}),
            "cases": {case.case: {"patient": case.patient, "fold": case.fold} for case in cases},
        }
    write_json(path, {**content, "written": Written.now().model_dump(mode="json")})


# ----------------------------------------------------------------------------------------------- verdict and selection


def _verdict_step(experiment: Experiment) -> Step:
    runs = competing_runs(experiment)
    scores = [path for run in runs for path in _scores_of(experiment, run)]
    return Step(
        name="verdict",
        inputs=(experiment.folder / OUT_OF_FOLD, *scores),
        outputs=(experiment.folder / VERDICT,),
        run=partial(_judge, experiment),
        parameters={"runs": [run.folder.name for run in runs]},
    )


def _judge(experiment: Experiment, report: Report) -> None:
    """Methods against their twins, on the out-of-fold scores."""
    from autossl.evaluation.judge_runs import Competitors, judge_runs

    names = [run.folder.name for run in competing_runs(experiment)]
    judge_runs(experiment.workspace, experiment.dataset, experiment.split, Competitors(runs=names))
    report(1, 1, {})


def competing_runs(experiment: Experiment) -> list[FoundRun]:
    """The runs of the experiment, and finished ones that differ from them in their seed alone.

    Several seeds show the training variance, which then enters the interval of the verdict.
    """
    ways = {_way(training.spec) for training in experiment.trainings}
    own = set(_names(experiment))
    runs = [FoundRun(training.folder, training.spec) for training in experiment.trainings]
    for run in find_runs(experiment.workspace, experiment.dataset, RunFilter(split=experiment.split)):
        scored = all(path.is_file() for path in _scores_of(experiment, run))
        if run.folder.name not in own and _way(run.spec) in ways and scored:
            runs.append(run)
    return runs


def _way(spec: RunSpec) -> tuple[str, str, str, str | None]:
    return spec.configuration, spec.preset, spec.method, spec.tag


def _scores_of(experiment: Experiment, run: FoundRun) -> list[Path]:
    folds = experiment.trainings[0].folds
    return [run.folder / f"fold_{fold}" / "validation" / "summary.json" for fold in folds]


def _selection_step(experiment: Experiment) -> Step:
    verdict = (experiment.folder / VERDICT,) if experiment.methods else ()
    return Step(
        name="select",
        inputs=(experiment.folder / OUT_OF_FOLD, *verdict, *summaries(experiment)),
        outputs=(experiment.folder / SELECTION, experiment.folder / PLAN),
        run=partial(_select, experiment),
        parameters={"runs": _names(experiment), "final": experiment.request.final},
    )


def _select(experiment: Experiment, report: Report) -> None:
    """The final model, by the scores and the verdict, or of the method that the user named."""
    from autossl.evaluation.judge_runs import read_verdict
    from autossl.evaluation.selection.choose import Wish
    from autossl.evaluation.selection.selection import SelectionOptions, find_best_configuration

    final = experiment.request.final
    options = SelectionOptions(
        split=experiment.split,
        runs=tuple(_names(experiment)),
        wish=Wish(methods=() if final is None else (final,)),
        verdict=read_verdict(experiment.folder / VERDICT) if experiment.methods else None,
        device=experiment.device,
    )
    find_best_configuration(
        experiment.workspace, experiment.dataset, options, lambda part, done, total: report(done, total, {})
    )


# ----------------------------------------------------------------------------------------------------- postprocessing


def _postprocessing_step(experiment: Experiment) -> Step:
    path = experiment.folder / POSTPROCESSING
    return Step(
        name="postprocessing",
        inputs=(experiment.folder / SELECTION, *summaries(experiment)),
        outputs=(path,),
        run=partial(_find_rules, experiment),
        holds=partial(_plan_has_rules, experiment.folder / PLAN, path),
    )


def _plan_has_rules(plan: Path, postprocessing: Path) -> bool:
    """The selection writes the plan anew; then its rules have to be put in again."""
    return plan.is_file() and bool(read_json(plan)["postprocessing"] == read_json(postprocessing)["rules"])


def _find_rules(experiment: Experiment, report: Report) -> None:
    """Rules for the label maps of the final model, kept where they gain; written down and put into its plan."""
    from autossl.evaluation.postprocessing_runs import find_postprocessing_of_plan

    plan = experiment.folder / PLAN
    find_postprocessing_of_plan(experiment.workspace, plan, None, lambda part, done, total: report(done, total, {}))


# -------------------------------------------------------------------------------------------------------- hidden test


def _hidden_test_steps(experiment: Experiment) -> list[Step]:
    """The truth beside the verdict: per run, for the final model, and all of it in one file."""
    if not hidden_test.hidden_cases(experiment):
        return []
    models: list[Training | None] = [*experiment.trainings, None]
    steps = [_hidden_step(experiment, training) for training in models]
    path = experiment.folder / HIDDEN_TEST
    gather = Step(
        name="hidden test",
        inputs=tuple(step.outputs[0] for step in steps),
        outputs=(path,),
        run=partial(_gather_hidden, experiment, path),
        parameters={"runs": _names(experiment)},
    )
    return [*steps, gather]


def _hidden_step(experiment: Experiment, training: Training | None) -> Step:
    folder = experiment.folder
    if training is None:
        inputs: tuple[Path, ...] = (folder / PLAN, folder / POSTPROCESSING)
    else:
        inputs = tuple(training.summary(fold) for fold in training.folds)
    return Step(
        name=f"predict hidden test {training.name if training is not None else 'final model'}",
        inputs=inputs,
        outputs=(hidden_test.model_folder(experiment, training) / hidden_test.SUMMARY,),
        run=partial(hidden_test.predict_hidden, experiment, training),
        parameters={"cases": [case.id for case in hidden_test.hidden_cases(experiment)]},
        estimate=partial(_hidden_estimate, experiment, training or experiment.trainings[0]),
    )


def _hidden_estimate(experiment: Experiment, training: Training) -> Estimate:
    n_cases = len(training.setup.split.hidden_test)
    seconds = experiment.seconds_per_step(experiment.twin(training.configuration))
    return Estimate(costs.prediction(training.setup, n_cases, seconds, len(training.folds)))


def _gather_hidden(experiment: Experiment, path: Path, report: Report) -> None:
    hidden_test.write_hidden_test(experiment, path)
    report(1, 1, {})


# ------------------------------------------------------------------------------------------- label next, and the report


def _label_next_step(experiment: Experiment) -> Step:
    return Step(
        name="label next",
        inputs=summaries(experiment),
        outputs=(experiment.folder / LABEL_NEXT,),
        run=partial(_label_next, experiment),
        parameters={"n": experiment.request.n_label_next, "runs": _names(experiment)},
        estimate=partial(_label_next_estimate, experiment),
    )


def _label_next(experiment: Experiment, report: Report) -> None:
    """The unlabeled cases worth labeling next."""
    from autossl.evaluation.label_evidence import LabelNextRequest, label_next

    request: ExperimentRequest = experiment.request
    asked = LabelNextRequest(
        dataset=experiment.dataset,
        n=request.n_label_next,
        workspace=experiment.workspace.root,
        runs=RunFilter(split=experiment.split, preset=experiment.preset, seed=request.seed, tag=request.tag or ""),
        methods=tuple(dict.fromkeys(training.method for training in experiment.trainings)),
        device=experiment.device,
    )
    label_next(asked, lambda what, done, total: report(done, total, {}))


def _label_next_estimate(experiment: Experiment) -> Estimate:
    total = 0.0
    for training in experiment.trainings:
        setup, seconds = training.setup, experiment.seconds_per_step(experiment.twin(training.configuration))
        n_unlabeled = max(len(fold.unlabeled) for fold in setup.folds.values())
        part = costs.prediction(setup, n_unlabeled, seconds, len(training.folds))
        if part is None:
            return Estimate()
        total += part
    return Estimate(total)


def _report_step(experiment: Experiment, made: tuple[Path, ...]) -> Step:
    return Step(
        name="report",
        inputs=(experiment.folder / EXPERIMENT, *made, *summaries(experiment)),
        outputs=(experiment.folder / REPORT,),
        run=partial(_write_report, experiment),
    )


def _write_report(experiment: Experiment, report: Report) -> None:
    """One page with all of it."""
    from autossl.evaluation.report.report import write_report

    place = (experiment.workspace, experiment.dataset, experiment.split)
    write_report(*place, progress=lambda part, done, total: report(done, total, {}))
