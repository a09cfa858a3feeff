"""Scores, cases and training curves of a split's runs, from their summary.json and log.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from autossl.data.runs import FoundRun
from autossl.evaluation.report.model import CaseRow, CasesPart, CurveRow, RunScores, ScoresPart
from autossl.evaluation.report.place import LOGS, PLAN, SELECTION, SUMMARIES, Place
from autossl.evaluation.report.sources import mean, pointer

METRICS = (
    "dice",
    "iou",
    "hd95_mm",
    "hd95_px",
    "assd_mm",
    "assd_px",
    "nsd",
    "volume_error_relative",
    "lesion_f1",
    "ece",
)
"""Those of the table, in its order."""
SUPERVISED = "supervised"


def gather_scores(place: Place) -> ScoresPart | None:
    """Pooled over the folds that are scored, per run."""
    scored = [run for run in place.runs if place.files.has(place.of_run(run, SUMMARIES))]
    if not scored:
        return None
    first = _summary(place, scored[0])
    classes = tuple(_class_names(first))
    there = {name for run in scored for name in _metric_names(_summary(place, run))}
    metrics = tuple(name for name in METRICS if name in there)
    source = place.files.find(place.of_run(scored[0], SUMMARIES))[0]
    surfaces = first.get("surfaces") or {}
    return ScoresPart(
        classes=classes,
        metrics=metrics,
        runs=tuple(_run_scores(place, run, classes, metrics) for run in scored),
        tolerances=tuple(
            place.files.traced(source, pointer("surfaces", "nsd_tolerance", name)) for name in classes if surfaces
        ),
        surface_unit=str(surfaces.get("unit", "")),
        convention=str(surfaces.get("convention", "")).replace("_", " "),
    )


def gather_cases(place: Place) -> CasesPart | None:
    """Every case as the final model predicted it out of fold, before postprocessing; else as one run did."""
    chosen = _candidate_of_plan(place)
    rows = _rows_of_candidate(place, chosen) if chosen is not None else []
    run = pictured_runs(place)
    if not rows and run:
        rows = _rows_of_run(place, run[0])
    if not rows:
        return None
    rows.sort(key=lambda row: (row.mean.number if row.mean.known else math.inf, row.case))
    known = [row for row in rows if row.mean.known]
    shown = {"worst": known[0], "median": known[(len(known) - 1) // 2], "best": known[-1]} if known else {}
    name = " + ".join(place.named(one.folder.name) for one in run)
    return CasesPart(model=name, classes=tuple(_classes_of(place)), rows=tuple(rows), shown=shown)


def pictured_runs(place: Place) -> list[FoundRun]:
    """The runs of the inference plan; without one the supervised run with scores, else the first one with scores."""
    members = place.files.get(place.result(PLAN), "members") or ()
    by_name = {run.folder.name: run for run in place.runs}
    runs = [by_name.get(str(member["run"]).rsplit("/", 1)[-1]) for member in members]
    if runs and all(run is not None for run in runs):
        return [run for run in runs if run is not None]
    scored = [run for run in place.runs if place.files.has(place.of_run(run, SUMMARIES))]
    return sorted(scored, key=lambda run: (run.spec.method != SUPERVISED, run.folder.name))[:1]


def gather_curves(place: Place) -> tuple[CurveRow, ...]:
    """How each run was trained, as far as its logs go."""
    rows = []
    for run in place.runs:
        source = place.of_run(run, LOGS)
        logs = place.files.find(source)
        if not logs:
            continue
        curves = {}
        for log in logs:
            points = [(line["step"], (line.get("losses") or {}).get(SUPERVISED)) for line in place.files.content(log)]
            fold = log.split("/fold_")[1].split("/")[0]
            curves[fold] = tuple((float(step), float(loss)) for step, loss in points if loss is not None)
        rows.append(
            CurveRow(
                name=place.named(run.folder.name),
                steps=place.files.traced(place.of_run(run, "run.json"), "/total_steps", "count"),
                hours=place.files.traced(source, "hours /*", "figure"),
                speed=place.files.traced(source, "median /*/steps_per_second", "figure"),
                memory=place.files.traced(source, "max /*/memory_mb", "count"),
                loss=place.files.traced(source, f"last /*/losses/{SUPERVISED}", "dice"),
                curves=curves,
            )
        )
    return tuple(rows)


def differences_per_case(
    place: Place, runs: Mapping[str, Any], one: str, other: str
) -> tuple[dict[str, tuple[float, ...]], str]:
    """Case → mean over seeds and classes of the Dice of one candidate minus that of another, and the files.

    Args:
        place: Of the runs.
        runs: As verdict.json holds them: candidate → "folders" of its runs below results/, one per seed.
        one: A candidate.
        other: Another one.
    """
    sides = [folders_of(runs, name) for name in (one, other)]
    by_name = {run.folder.name: run for run in place.runs}
    if len(sides[0]) != len(sides[1]) or not all(name in by_name for side in sides for name in side):
        return {}, ""
    found: dict[str, list[float]] = {}
    for first, second in zip(*sides, strict=True):
        ours, theirs = dice_of_run(place, by_name[first]), dice_of_run(place, by_name[second])
        for case in sorted(set(ours) & set(theirs)):
            pairs = [(ours[case].get(name), theirs[case].get(name)) for name in ours[case]]
            found.setdefault(case, []).extend(a - b for a, b in pairs if a is not None and b is not None)
    sources = [place.of_run(by_name[name], SUMMARIES) for side in sides for name in side]
    return {case: (mean(values),) for case, values in found.items() if values}, ", ".join(sources)


def dice_of_run(place: Place, run: FoundRun) -> dict[str, dict[str, float | None]]:
    """Case → class → Dice of all scored folds; None where it is undefined."""
    return {
        case: {name: scores["dice"] for name, scores in classes.items()}
        for path in place.files.find(place.of_run(run, SUMMARIES))
        for case, classes in place.files.content(path)["cases"].items()
    }


def folders_of(runs: Mapping[str, Any], name: str) -> list[str]:
    """Names of a candidate's run folders, as the entry "runs" of a verdict has them."""
    folders = (runs.get(name) or {}).get("folders") or ()
    return [str(folder).rsplit("/", 1)[-1] for folder in folders]


def _run_scores(place: Place, run: FoundRun, classes: Sequence[str], metrics: Sequence[str]) -> RunScores:
    files, source = place.files, place.of_run(run, SUMMARIES)
    dice = dice_of_run(place, run)
    return RunScores(
        name=place.named(run.folder.name),
        folder=files.relative(run.folder),
        method=run.spec.method,
        is_final=run in pictured_runs(place) and files.has(place.result(PLAN)),
        n_folds=files.traced(source, "count /cases", "count"),
        n_cases=files.traced(source, "count /cases/*", "count"),
        mean=files.traced(source, "mean-of-means /cases/*/*/dice", "dice"),
        classes={
            name: {
                metric: files.traced(source, f"mean /cases/*{pointer(name, metric)}", _form(metric))
                for metric in metrics
            }
            for name in classes
        },
        dice={
            name: tuple(value for scores in dice.values() if (value := scores.get(name)) is not None)
            for name in classes
        },
    )


def _form(metric: str) -> Any:
    if metric == "volume_error_relative":
        return "percent"
    return "figure" if metric.startswith(("hd95", "assd")) else "dice"


def _candidate_of_plan(place: Place) -> int | None:
    """The number of the chosen candidate in selection.json."""
    chosen = place.files.get(place.result(SELECTION), "chosen")
    for number, candidate in enumerate(place.files.get(place.result(SELECTION), "candidates") or ()):
        if candidate["name"] == chosen:
            return number
    return None


def _rows_of_candidate(place: Place, number: int) -> list[CaseRow]:
    files, source = place.files, place.result(SELECTION)
    known = files.get(source, "cases") or {}
    return [
        CaseRow(
            case=case,
            patient=str(known.get(case, {}).get("patient", case)),
            fold=str(known.get(case, {}).get("fold", "")),
            mean=files.traced(source, f"mean {pointer('candidates', number, 'cases', case)}/*", "dice"),
            classes=tuple(
                files.traced(source, pointer("candidates", number, "cases", case, name), "dice") for name in scores
            ),
        )
        for case, scores in (files.get(source, "candidates", number, "cases") or {}).items()
    ]


def _rows_of_run(place: Place, run: FoundRun) -> list[CaseRow]:
    files, rows = place.files, []
    for source in files.find(place.of_run(run, SUMMARIES)):
        fold = source.split("/fold_")[1].split("/")[0]
        for case, scores in files.content(source)["cases"].items():
            own = pointer("cases", case)
            dice = tuple(files.traced(source, f"{own}{pointer(name, 'dice')}", "dice") for name in scores)
            rows.append(CaseRow(case, case, fold, files.traced(source, f"mean {own}/*/dice", "dice"), dice))
    return rows


def _classes_of(place: Place) -> list[str]:
    candidates = place.files.get(place.result(SELECTION), "candidates")
    if candidates:
        return list(next(iter(candidates[0]["cases"].values()), {}))
    run = pictured_runs(place)
    return _class_names(_summary(place, run[0])) if run else []


def _summary(place: Place, run: FoundRun) -> dict[str, Any]:
    """Of its first scored fold."""
    content: dict[str, Any] = place.files.content(place.files.find(place.of_run(run, SUMMARIES))[0])
    return content


def _class_names(summary: Mapping[str, Any]) -> list[str]:
    return list(next(iter(summary["cases"].values()), {}))


def _metric_names(summary: Mapping[str, Any]) -> list[str]:
    return list(next(iter(next(iter(summary["cases"].values()), {"": {}}).values()), {}))
