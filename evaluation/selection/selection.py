"""Finds the final model of a split and writes it down: the function behind `autossl_find_best_configuration`.

Reads the out-of-fold predictions of all runs of the split, writes `inference_plan.json` (what predicts) and, before it,
`selection.json` (every candidate with its scores per case). Probabilities that are missing for scoring ensembles are
predicted from the finished folds; nothing is trained.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autossl.data.files import write_json
from autossl.data.problems import InvalidInput, Problem
from autossl.data.provenance import Written
from autossl.data.runs import FoundRun, RunFilter, find_runs
from autossl.data.workspace import Workspace
from autossl.evaluation.judge_runs import VERDICT_FILE, read_verdict
from autossl.evaluation.label_schemas import labels_of_dataset
from autossl.evaluation.out_of_fold import OutOfFoldCase, collect, predict_out_of_fold
from autossl.evaluation.resampling import Interval
from autossl.evaluation.selection.candidates import Candidate, ScoredCandidates, pair_candidates, single_candidate
from autossl.evaluation.selection.choose import SUPERVISED, Choice, Judgment, Ranked, Wish, allowed_methods, choose
from autossl.inference.inference_plan import (
    InferencePlan,
    LabelBudget,
    PlanMember,
    inference_plan_path,
    read_inference_plan,
    write_inference_plan,
)
from autossl.inference.model_folder import BENCHMARK_PREFIX

logger = logging.getLogger(__name__)

SELECTION_FILE = "selection.json"
Progress = Callable[[str, int, int], None]
"""(part of the work, cases done, cases in all)."""


@dataclass(frozen=True)
class SelectionOptions:
    """What to choose from, and how."""

    split: str | None = None
    """None: the only split with runs whose folds see the same labels."""
    runs: tuple[str, ...] | None = None
    """Names of run folders to choose from; None: all of the split."""
    wish: Wish = field(default_factory=Wish)
    verdict: Judgment | None = None
    """On the unlabeled cases; None: that of the split's verdict.json, where there is one. See `allowed_methods`."""
    device: str = "auto"
    """Where probabilities are predicted that were not saved."""
    n_workers: int | None = 1
    """Processes that score ensembles; None takes one per CPU."""


@dataclass(frozen=True)
class Selection:
    """What was found."""

    choice: Choice
    scored: ScoredCandidates
    plan: InferencePlan
    path: Path
    """Of the inference plan; selection.json lies beside it."""


def find_best_configuration(
    workspace: Workspace, dataset: str, options: SelectionOptions | None = None, progress: Progress | None = None
) -> Selection:
    """Ranks all runs of a split and all pairs of them by pooled foreground Dice, and writes the inference plan.

    Postprocessing rules of an inference plan with the same members are kept.

    Args:
        workspace: Where the runs are.
        dataset: In full.
        options: None: the defaults.
        progress: Told how far predicting and scoring are.

    Raises:
        InvalidInput: No run has all folds finished, several splits, a benchmark split, or no run of the methods that
            are asked for or that the verdict leaves; nothing is written then.
    """
    options = options or SelectionOptions()
    split = options.split or _only_split(workspace, dataset)
    scored = score_candidates(workspace, dataset, split, options, progress)
    path = inference_plan_path(workspace, dataset, split)
    verdict = options.verdict or _stored_verdict(path.with_name(VERDICT_FILE))
    _check_methods(scored, options.wish, verdict)
    choice = choose(scored, options.wish, verdict)
    plan = _plan_of(choice, scored, workspace, dataset, split)
    if path.is_file():
        plan = _with_rules_of(path, plan)
    write_json(path.with_name(SELECTION_FILE), _selection_json(choice, scored, plan.written))
    write_inference_plan(path, plan)
    return Selection(choice, scored, plan, path)


def select_again(workspace: Workspace, dataset: str, split: str, stored: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a selection.json, from the predictions that are there now; writes nothing.

    Args:
        workspace: Where the runs are.
        dataset: In full.
        split: Its name.
        stored: Content of the file.

    Returns:
        Its candidates by name and `ensemble_minus_single`; without ensembles where a probability is not there any more.

    Raises:
        InvalidInput: a run of it is not there, or not whole.
    """
    names = tuple(entry["runs"][0] for entry in stored["candidates"] if len(entry["runs"]) == 1)
    predictions, _ = _collected(workspace, dataset, split, names)
    whole = all(case.probabilities is not None for _, out in predictions for case in out.values())
    options = SelectionOptions(runs=names, wish=Wish(ensemble=None if whole else False))
    scored = score_candidates(workspace, dataset, split, options)
    again: dict[str, Any] = {
        "candidates": {one.candidate.name: _ranked_json(one, scored) for one in choose(scored).ranked}
    }
    left = set(stored.get("up_for_choice", ()))
    singles, ensembles = (tuple(one for one in side if one.name in left) for side in (scored.singles, scored.ensembles))
    if singles and ensembles:
        choice = choose(replace(scored, singles=singles, ensembles=ensembles))
        again["ensemble_minus_single"] = _advantage_json(choice)
    return again


def score_candidates(
    workspace: Workspace, dataset: str, split: str, options: SelectionOptions, progress: Progress | None = None
) -> ScoredCandidates:
    """Runs of the split with all folds finished, and their pairs unless no ensemble is wanted.

    Raises:
        InvalidInput: None has all folds finished, with what each lacks; or no case is common to all.
    """
    if split.startswith(BENCHMARK_PREFIX):
        found = f"the folds of {split} were trained with different labels"
        fix = "use the default split, or train with a deployment budget (autossl_run --labeled)"
        raise InvalidInput(Problem(found, "folds that make one model together", fix))
    predictions, left_out = _collected(workspace, dataset, split, options.runs)
    schema, remap = labels_of_dataset(dataset, workspace.root)
    names = sorted(set.intersection(*(set(out) for _, out in predictions)))
    for case in sorted({case for _, out in predictions for case in out} - set(names)):
        left_out[case] = "not every run has predicted it"
    if not names:
        raise InvalidInput(Problem("no case that all runs predicted", "runs of one split", "name fewer runs"))
    classes = tuple(schema.foreground)
    singles = [single_candidate(run, [out[name] for name in names], classes) for run, out in predictions]
    ensembles: list[Candidate] = []
    if options.wish.ensemble is not False and len(predictions) > 1:
        predictions = _with_probabilities(workspace, dataset, predictions, options.device, progress)
        told = None if progress is None else lambda done, total: progress("score ensembles", done, total)
        ensembles = pair_candidates(predictions, names, schema, remap, options.n_workers, told)
    cases = tuple(predictions[0][1][name] for name in names)
    return ScoredCandidates(cases, classes, tuple(singles), tuple(ensembles), left_out)


_Predictions = list[tuple[FoundRun, dict[str, OutOfFoldCase]]]


def _only_split(workspace: Workspace, dataset: str) -> str:
    there = {run.spec.split for run in find_runs(workspace, dataset)}
    splits = sorted(split for split in there if not split.startswith(BENCHMARK_PREFIX))
    if len(splits) == 1:
        return splits[0]
    found = f"runs of {len(splits)} splits: {', '.join(splits)}" if splits else "no run to choose from"
    fix = "say which with --labeled and --draw ('--labeled all': no budget)" if splits else "train some: autossl_run"
    raise InvalidInput(Problem(found, "one split", fix, file=workspace.results_folder(dataset)))


def _collected(
    workspace: Workspace, dataset: str, split: str, names: Sequence[str] | None
) -> tuple[_Predictions, dict[str, str]]:
    """Runs with their out-of-fold cases, and why the others take no part."""
    runs = find_runs(workspace, dataset, RunFilter(split=split))
    missing = sorted(set(names or ()) - {run.folder.name for run in runs})
    if missing:
        fix = "correct the names, or train them"
        raise InvalidInput(Problem(f"no run {', '.join(missing)} in split {split}", "runs that are there", fix))
    predictions: _Predictions = []
    left_out: dict[str, str] = {}
    problems: list[Problem] = []
    for run in runs:
        if names is not None and run.folder.name not in names:
            continue
        try:
            predictions.append((run, {case.case: case for case in collect(workspace, dataset, run)}))
        except InvalidInput as error:
            left_out[run.folder.name] = "; ".join(problem.found for problem in error.problems)
            problems += error.problems
    if not predictions or (names is not None and left_out):
        if not problems:
            problems.append(Problem(f"no run of split {split}", "runs with all folds finished", "train some"))
        raise InvalidInput(problems, title=f"{dataset}, split {split}: no run with all folds finished")
    for name, why in left_out.items():
        logger.warning("%s takes no part: %s", name, why)
    return predictions, left_out


def _with_probabilities(
    workspace: Workspace, dataset: str, predictions: _Predictions, device: str, progress: Progress | None
) -> _Predictions:
    """The same, with probabilities of every case."""
    complete = []
    for run, out in predictions:
        if any(case.probabilities is None for case in out.values()):
            part = f"predict {run.folder.name}"
            logger.info("probabilities of %s were not saved; predicting them", run.folder.name)
            told = None if progress is None else (lambda done, total, _, part=part: progress(part, done, total))
            predict_out_of_fold(run, workspace, device, told)
            out = {case.case: case for case in collect(workspace, dataset, run)}
        complete.append((run, out))
    return complete


def _stored_verdict(path: Path) -> Judgment | None:
    return read_verdict(path) if path.is_file() else None


def _check_methods(scored: ScoredCandidates, wish: Wish, verdict: Judgment | None) -> None:
    methods, reason = allowed_methods(wish, verdict)
    there = sorted({method for one in scored.singles for method in one.methods})
    if methods is None or set(methods) & set(there):
        return
    fix = "train it, or name another method with -m"
    if not wish.methods:
        fix = f"train {SUPERVISED} on all folds, or name a method with -m"
    found = f"no run of {' or '.join(methods)} with all folds finished; there are {', '.join(there)}. {reason}"
    raise InvalidInput(Problem(found.rstrip("."), "a run of it", fix))


def _plan_of(choice: Choice, scored: ScoredCandidates, workspace: Workspace, dataset: str, split: str) -> InferencePlan:
    runs = choice.chosen.candidate.runs
    patients = {case.case: case.patient for case in scored.cases}
    folds = sorted({case.fold for case in scored.cases}, key=int)
    labeled = sorted({case for run in runs for fold in folds for case in run.spec.folds[fold].labeled})
    members = [
        PlanMember(
            run=run.folder.relative_to(workspace.results).as_posix(),
            folds=tuple(folds),
            total_steps=run.spec.total_steps,
        )
        for run in runs
    ]
    return InferencePlan(
        dataset=dataset,
        split=split,
        members=tuple(members),
        combine="single" if len(runs) == 1 else "mean_probabilities",
        why=choice.why,
        labels=LabelBudget(n_cases=len(labeled), n_patients=len({patients.get(case, case) for case in labeled})),
        dice=_plain(choice.chosen.interval.observed),
        written=Written.now(),
    )


def _with_rules_of(path: Path, plan: InferencePlan) -> InferencePlan:
    """The plan with the rules of the one on disk, where that has the same members."""
    try:
        before = read_inference_plan(path)
    except InvalidInput as error:
        logger.warning("%s", error)
        return plan
    if before.members != plan.members:
        if before.postprocessing:
            logger.warning("the postprocessing rules of the inference plan were found for other runs and are dropped")
        return plan
    return plan.model_copy(update={"postprocessing": before.postprocessing})


def _selection_json(choice: Choice, scored: ScoredCandidates, written: Written) -> dict[str, Any]:
    return {
        "metric": "pooled foreground Dice: mean over the classes of the mean over all out-of-fold cases",
        "chosen": choice.chosen.candidate.name,
        "why": choice.why,
        "up_for_choice": list(choice.up_for_choice),
        "ensemble_minus_single": _advantage_json(choice),
        "cases": {case.case: {"patient": case.patient, "fold": case.fold} for case in scored.cases},
        "candidates": [_ranked_json(ranked, scored) for ranked in choice.ranked],
        "left_out": dict(scored.left_out),
        "written": written.model_dump(mode="json"),
    }


def _advantage_json(choice: Choice) -> dict[str, Any] | None:
    if choice.advantage is None or choice.compared is None:
        return None
    return {"ensemble": choice.compared[0], "single": choice.compared[1], **_interval_json(choice.advantage)}


def _ranked_json(ranked: Ranked, scored: ScoredCandidates) -> dict[str, Any]:
    candidate = ranked.candidate
    return {
        "name": candidate.name,
        "runs": [run.folder.name for run in candidate.runs],
        "methods": [run.spec.method for run in candidate.runs],
        "configurations": [run.spec.configuration for run in candidate.runs],
        "dice": _interval_json(ranked.interval),
        "cases": {
            case.case: {name: _plain(value) for name, value in zip(scored.classes, values.tolist(), strict=True)}
            for case, values in zip(scored.cases, candidate.dice, strict=True)
        },
    }


def _interval_json(interval: Interval) -> dict[str, float | None]:
    """Units of Dice."""
    names = ("observed", "estimate", "low", "high")
    return {name: _plain(getattr(interval, name)) for name in names}


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
