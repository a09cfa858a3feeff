"""The hidden test set of a deployment split: what the ensembles and the final model reach on cases that nobody saw.

Nothing is chosen by these figures. They stand beside the out-of-fold verdict, to show what it was worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autossl.data.files import read_json, write_json
from autossl.data.provenance import Written
from autossl.data.raw_dataset import Case
from autossl.data.runs import RunFilter
from autossl.evaluation.benchmark.results import dice_of
from autossl.evaluation.evaluate import EvaluationOptions, evaluate_folder
from autossl.evaluation.verdict import Candidate, Cohort, judge
from autossl.inference.predict import predict
from autossl.inference.request import PredictRequest
from autossl.pipeline.steps import Report
from autossl.pipeline.trainings import Experiment, Training

FOLDER = "hidden_test"
FINAL = "final"
IMAGES = "images"
SUMMARY = "summary.json"
FIGURES = ("word", "estimate", "low", "high", "n_patients", "wins", "ties", "losses")
"""Of a verdict's figures."""
WHAT = (
    "cases of a deployment split that no training, choice or threshold has seen. Each run predicts with the folds of "
    "its ensemble; nothing was chosen by these figures"
)


def hidden_cases(experiment: Experiment) -> list[Case]:
    """Of the split; empty where it has none."""
    setup = experiment.trainings[0].setup
    wanted = set(setup.split.hidden_test)
    return [case for case in setup.raw.cases if case.id in wanted]


def model_folder(experiment: Experiment, training: Training | None) -> Path:
    """Where the hidden test cases as predicted by a run (None: the final model) lie."""
    return experiment.folder / FOLDER / (training.folder.name if training is not None else FINAL)


def predict_hidden(experiment: Experiment, training: Training | None, report: Report) -> None:
    """Predicts the hidden test set as `autossl_predict` would, with a run's folds or the final model, and scores it."""
    output, cases = model_folder(experiment, training), hidden_cases(experiment)
    setup = experiment.trainings[0].setup
    images = link_images(cases, experiment.folder / FOLDER / IMAGES)
    request = PredictRequest(
        input=images,
        output=output,
        dataset=experiment.dataset if training is None else None,
        run=RunFilter(split=experiment.split) if training is None else RunFilter(),
        workspace=experiment.workspace.root,
        model=None if training is None else training.folder,
        folds=None if training is None else tuple(training.folds),
        device=experiment.device,
        resume=training is not None,
        overwrite=training is None,  # another model may have been the final one before
    )
    predict(request, lambda at: report(at.done + int(at.share), at.total, {}))
    options = EvaluationOptions(
        cases=[case.id for case in cases], remap_references=setup.fingerprint.remap_labels, n_workers=1
    )
    evaluation = evaluate_folder(output, setup.label_folder, setup.schema, options)
    write_json(output / SUMMARY, {"what": WHAT, **evaluation.to_json()})


def link_images(cases: Sequence[Case], folder: Path) -> Path:
    """A folder that holds links to the images of these cases and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path.resolve() for case in cases for path in case.images}
    for path in folder.iterdir():
        if path.name not in wanted or not path.exists():
            path.unlink()
    for name, target in wanted.items():
        if not (folder / name).exists():
            (folder / name).symlink_to(target)
    return folder


def write_hidden_test(experiment: Experiment, path: Path) -> None:
    """Gathers the scores into hidden_test.json: every model, and each method against its twin."""
    cases = hidden_cases(experiment)
    patients = {case.id: case.patient for case in cases}
    summaries = {training.folder.name: _scores(experiment, training) for training in experiment.trainings}
    summaries[FINAL] = _scores(experiment, None)
    comparisons = {}
    for training in experiment.trainings:
        if training.role != "twin":
            twin = experiment.twin(training.configuration)
            comparisons[training.folder.name] = {
                "twin": twin.folder.name,
                **_against(training, twin, summaries, patients),
            }
    comparisons[FINAL] = _final_against(experiment, summaries, patients)
    content = {
        "what": WHAT,
        "dataset": experiment.dataset,
        "split": experiment.split,
        "n_cases": len(cases),
        "n_patients": len(set(patients.values())),
        "models": {name: _model_json(summary) for name, summary in summaries.items()},
        "to_twin": comparisons,
        "written": Written.now().model_dump(mode="json"),
    }
    write_json(path, content)


def hidden_lines(content: Mapping[str, Any]) -> list[str]:
    """What a hidden_test.json says, for the terminal."""
    models, against = content["models"], content["to_twin"]
    lines = [f"hidden test set, {content['n_cases']} cases of {content['n_patients']} patients, mean Dice:"]
    for name, model in models.items():
        line = f"  {name}: {_figure(model['mean_dice'])}"
        if name in against:
            found = against[name]
            word = "" if name == FINAL else f" {found['word']}"  # which tells of unlabeled cases, not of rules
            interval = f"({_points(found['low'])} to {_points(found['high'])})"
            wins = f"{found['wins']} wins, {found['ties']} ties, {found['losses']} losses"
            line += f", {_points(found['estimate'])} points to {found['twin']}:{word} {interval}, {wins}"
        lines.append(line)
    return lines


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.2f}"


def _scores(experiment: Experiment, training: Training | None) -> dict[str, Any]:
    content: dict[str, Any] = read_json(model_folder(experiment, training) / SUMMARY)
    return content


def _model_json(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "mean_dice": summary["foreground_mean"]["dice"],
        "dice": {name: entry["mean"]["dice"] for name, entry in summary["classes"].items()},
        "foreground_mean": summary["foreground_mean"],
    }


def _against(
    training: Training, twin: Training, summaries: Mapping[str, Mapping[str, Any]], patients: Mapping[str, str]
) -> dict[str, Any]:
    return compared(dice_of(summaries[training.folder.name]), dice_of(summaries[twin.folder.name]), patients)


def _final_against(
    experiment: Experiment, summaries: Mapping[str, Mapping[str, Any]], patients: Mapping[str, str]
) -> dict[str, Any]:
    """The final model against the twin of the first configuration."""
    twin = experiment.twin(experiment.configurations[0]).folder.name
    return {"twin": twin, **compared(dice_of(summaries[FINAL]), dice_of(summaries[twin]), patients)}


def compared(
    first: Mapping[str, Mapping[str, float]], second: Mapping[str, Mapping[str, float]], patients: Mapping[str, str]
) -> dict[str, Any]:
    """Mean paired difference of Dice, first minus second, with its interval and its word, as in a verdict.

    One model on each side, so nothing was chosen; and one training of each, whose variance is not in the interval.

    Args:
        first: Case → class → Dice; NaN where it is undefined.
        second: The same of what it is compared with.
        patients: Case → patient.
    """
    cases = sorted(set(first) & set(second))
    classes = tuple(first[cases[0]]) if cases else ()

    def candidate(name: str, dice: Mapping[str, Mapping[str, float]]) -> Candidate:
        return Candidate(name, np.array([[[dice[case][of] for of in classes] for case in cases]], dtype=np.float64))

    cohort = Cohort(tuple((FOLDER, patients[case]) for case in cases), classes)
    verdict = judge([candidate("first", first)], [candidate("second", second)], cohort)
    kept = set(FIGURES)
    return {
        **verdict.model_dump(mode="json", include=kept),
        "p_wilcoxon": verdict.comparisons[0].p_wilcoxon,
        "per_class": {name: figure.model_dump(mode="json", include=kept) for name, figure in verdict.per_class.items()},
    }
