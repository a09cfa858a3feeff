"""Checks a page: every number looked up again by the file and key it carries, and the files made again from theirs.

1. Each value of the page against its file; figures drawn again; values that the files have now and the page has not.
2. Scores of the runs (summary.json) against the label maps and references; verdict.json and selection.json against
   these scores and the saved probabilities.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from autossl.data.problems import InvalidInput, Problem
from autossl.data.provenance import Written
from autossl.data.raw_dataset import read_raw_dataset
from autossl.data.workspace import Workspace
from autossl.evaluation.evaluate import EvaluationOptions, evaluate_folder
from autossl.evaluation.label_schemas import labels_of_dataset
from autossl.evaluation.report.page import figure_markup
from autossl.evaluation.report.place import SELECTION, SUMMARIES, VERDICT, Place, choose_split
from autossl.evaluation.report.report import make_page, report_path
from autossl.evaluation.report.scores import dice_of_run, folders_of
from autossl.evaluation.report.sources import COMPUTED, Value, shown
from autossl.evaluation.selection.selection import select_again
from autossl.evaluation.verdict import Candidate, Cohort, judge

TOLERANCE = 1e-9
FIX = "write the report again with autossl_report"
FIX_FILE = "find out which of them was changed; the command that wrote the file makes it again"
Progress = Callable[[str, int, int], None]
_Place = tuple[str, str]
"""Source and key."""


@dataclass(frozen=True)
class Checked:
    """How much was compared, and what differs."""

    page: Path
    n_values: int
    n_figures: int
    n_scores: int
    """Metrics of cases that were scored again."""
    verdict: bool
    """Whether it was judged again."""
    n_candidates: int
    """Of the final model, whose scores and intervals were made again; ensembles from the saved probabilities."""
    differences: tuple[Problem, ...]


@dataclass
class _Shown:
    """A traced element of a page."""

    source: str
    key: str
    form: str
    value: str | None
    text: str = ""


@dataclass
class _Reader(HTMLParser):
    """Collects traced elements."""

    found: list[_Shown] = field(default_factory=list)
    _inside: bool = False

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "span" and "data-source" in given:
            self.found.append(
                _Shown(given["data-source"], given["data-key"], given["data-form"], given.get("data-value"))
            )
            self._inside = True

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.found[-1].text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "span"


def check_report(
    workspace: Workspace,
    dataset: str,
    split: str | None = None,
    page: Path | None = None,
    progress: Progress | None = None,
) -> Checked:
    """Compares a report with the files that it was made from, and these with theirs.

    Args:
        workspace: Where everything lies.
        dataset: Full name.
        split: None: the only one with results.
        page: The report; None: report.html of the split.
        progress: Told how many folds were scored again.

    Raises:
        InvalidInput: there is no such page, or a file is damaged.
    """
    place = Place(workspace, dataset, choose_split(workspace, dataset, split))
    path = page or report_path(workspace, dataset, place.split)
    if not path.is_file():
        raise InvalidInput(Problem("there is no report", "the page that autossl_report writes", FIX, file=path))
    content = path.read_text(encoding="utf-8")
    fresh = make_page(place, Written.now())
    ours, theirs = traced_values(content), traced_values(fresh)
    differences = [*_value_differences(place, ours, theirs), *_figure_differences(content, fresh)]
    differences = [Problem(p.found, p.expected, p.fix, file=path) for p in differences]
    n_scores, wrong = rescore(place, progress)
    judged, misjudged = rejudge(place)
    n_candidates, misplaced = reselect(place)
    n_figures = len(figure_markup(content))
    found = (*differences, *wrong, *misjudged, *misplaced)
    return Checked(path, len(ours), n_figures, n_scores, judged, n_candidates, found)


def traced_values(page: str) -> list[_Shown]:
    """All values of a page that say where they come from."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    return reader.found


# --------------------------------------------------------------------------------------------------------- the page


def _value_differences(place: Place, ours: list[_Shown], theirs: list[_Shown]) -> Iterable[Problem]:
    """Each value once, however often the page shows it, unless it shows it differently."""
    computed = {(one.source, one.key): one.text for one in theirs if one.key.startswith(COMPUTED)}
    seen = {(one.source, one.key, one.form, one.text, one.value): one for one in ours}
    for one in seen.values():
        where = f"{one.source}, {one.key}"
        if one.key.startswith(COMPUTED):
            now = computed.get((one.source, one.key))
            text = "nothing" if now is None else now
        else:
            value = place.files.value(one.source, one.key)
            text = shown(value, one.form)  # type: ignore[arg-type]
            if one.value is not None and not _equal(json.loads(one.value), value):
                yield Problem(f"{one.value} stands behind {one.text!r} ({where})", f"{value!r}", FIX)
                continue
        if one.text != text:
            yield Problem(f"the page says {one.text!r} ({where})", repr(text), FIX)
    there = {(one.source, one.key) for one in ours}
    missing = sorted({(one.source, one.key) for one in theirs} - there)
    for source, key in missing:
        yield Problem(f"the page does not show {source}, {key}", "what the files hold now", FIX)


def _figure_differences(content: str, fresh: str) -> Iterable[Problem]:
    before, now = figure_markup(content), figure_markup(fresh)
    for name in dict.fromkeys((*before, *now)):
        if before.get(name) != now.get(name):
            yield Problem(f"the figure '{name}' is not what the files give", "the same drawing", FIX)


def _equal(one: Value, other: Value) -> bool:
    numbers = [value for value in (one, other) if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) == 2:
        return math.isclose(numbers[0], numbers[1], rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return one == other


# -------------------------------------------------------------------------------------------------------- its files


def rescore(place: Place, progress: Progress | None = None) -> tuple[int, list[Problem]]:
    """Scores all out-of-fold label maps of the split again; the number of metrics compared, and those that differ."""
    summaries = [(run, source) for run in place.runs for source in place.files.find(place.of_run(run, SUMMARIES))]
    if not summaries:
        return 0, []
    try:
        raw = read_raw_dataset(place.workspace.raw_folder(place.dataset))
        schema, remap = labels_of_dataset(place.dataset, place.workspace.root)
    except InvalidInput as error:
        return 0, list(error.problems)
    compared, problems = 0, []
    for number, (_, source) in enumerate(summaries, start=1):
        summary, folder = place.files.content(source), (place.files.root / source).parent
        options = options_of(summary, remap)
        try:
            again = evaluate_folder(folder, raw.folder / "labelsTr", schema, options).to_json()["cases"]
        except InvalidInput as error:
            problems += list(error.problems)
            again = {}
        for case, classes in again.items():
            found = list(_score_differences(summary["cases"].get(case, {}), classes, source, case))
            compared += sum(len(scores) for scores in summary["cases"].get(case, {}).values())
            problems += [Problem(p.found, p.expected, p.fix, case=case, file=place.files.root / source) for p in found]
        if progress is not None:
            progress("score again", number, len(summaries))
    return compared, problems


def options_of(summary: Mapping[str, Any], remap: Mapping[int, int]) -> EvaluationOptions:
    """What a summary.json was scored with."""
    surfaces = summary.get("surfaces") or {}
    metrics: Mapping[str, Any] = next(iter(next(iter(summary["cases"].values()), {"": {}}).values()), {})
    settings: dict[str, Any] = {}
    if surfaces:
        settings = {"tolerance_mm": surfaces["nsd_tolerance"], "surface_convention": surfaces["convention"]}
    return EvaluationOptions(
        cases=list(summary["cases"]),
        remap_references=remap,
        surfaces=bool(surfaces),
        lesions="lesion_f1" in metrics,
        **settings,
    )


def _score_differences(
    before: Mapping[str, Mapping[str, Value]], now: Mapping[str, Mapping[str, Value]], source: str, case: str
) -> Iterable[Problem]:
    for name in dict.fromkeys((*before, *now)):
        stored, again = before.get(name, {}), now.get(name, {})
        for metric, value in stored.items():
            if not _equal(value, again.get(metric)):
                found = f"{name} {metric} is {value} in the file, the label maps give {again.get(metric)}"
                yield Problem(found, "the same", FIX_FILE)


def rejudge(place: Place) -> tuple[bool, list[Problem]]:
    """Judges the split's verdict again from the scores; whether that could be done, and what differs."""
    source = place.result(VERDICT)
    if not place.files.has(source):
        return False, []
    stored = place.files.content(source)
    sides = _candidates(place, stored)
    if sides is None:
        return False, []
    with_unlabeled, without, equal_time, cohort = sides
    again = judge(with_unlabeled, without, cohort, equal_time, stored["n_resamples"]).model_dump(mode="json")
    return True, _content_differences(stored, again, place.files.root / source)


def reselect(place: Place) -> tuple[int, list[Problem]]:
    """Ranks the candidates for the final model again; how many, and what differs from selection.json."""
    source = place.result(SELECTION)
    if not place.files.has(source):
        return 0, []
    stored = place.files.content(source)
    try:
        again = select_again(place.workspace, place.dataset, place.split, stored)
    except InvalidInput as error:
        return 0, list(error.problems)
    stored = {**stored, "candidates": {entry["name"]: entry for entry in stored["candidates"]}}
    return len(again["candidates"]), _content_differences(stored, again, place.files.root / source)


def _content_differences(stored: Any, again: Any, file: Path) -> list[Problem]:
    return [
        Problem(f"{key} is {before!r} in the file, the scores give {now!r}", "the same", FIX_FILE, file=file)
        for key, before, now in _leaves(stored, again)
        if not _equal(before, now)
    ]


def _candidates(
    place: Place, stored: Mapping[str, Any]
) -> tuple[list[Candidate], list[Candidate], Candidate | None, Cohort] | None:
    """Both sides of a verdict, with their scores; None where it does not say which runs they are."""
    runs, by_name = stored.get("runs") or {}, {run.folder.name: run for run in place.runs}
    names = [entry["name"] for entry in stored["comparisons"]]
    twins = {entry["name"]: entry["against"] for entry in stored["comparisons"]}
    against = list(dict.fromkeys(twins.values()))
    beside = stored.get("equal_time")
    everyone = [*names, *against, *([beside["name"], beside["against"]] if beside else [])]
    folders = {name: folders_of(runs, name) for name in everyone}
    listed = [folder for own in folders.values() for folder in own]
    if any(not own for own in folders.values()) or any(folder not in by_name for folder in listed):
        return None
    if len({tuple(own) for own in folders.values()}) < len(folders):
        return None  # one run with and without its rules: its scores with them are in no file
    scores = {folder: dice_of_run(place, by_name[folder]) for folder in listed}
    cases = sorted(set.intersection(*(set(own) for own in scores.values())))
    if not cases:
        return None
    classes = tuple(stored["per_class"])
    first = by_name[folders[names[0]][0]]
    fold_of = {case: fold for fold, own in first.spec.folds.items() for case in own.validation}
    raw = read_raw_dataset(place.workspace.raw_folder(place.dataset))
    patients = {case.id: case.patient for case in raw.cases}
    cohort = Cohort(tuple((fold_of[case], patients.get(case, case)) for case in cases), classes)

    def candidate(name: str, twin: str = "") -> Candidate:
        rows = [[[scores[folder][case].get(k) for k in classes] for case in cases] for folder in folders[name]]
        return Candidate(name, np.array(rows, dtype=np.float64), twin)

    return (
        [candidate(name, twins[name]) for name in names],
        [candidate(name) for name in against],
        candidate(beside["against"]) if beside else None,
        cohort,
    )


def _leaves(stored: Any, again: Any, key: str = "") -> Iterable[tuple[str, Value, Value]]:
    """Pairs of values of the entries that both have."""
    if isinstance(stored, dict) and isinstance(again, dict):
        for name in stored:
            if name in again:
                yield from _leaves(stored[name], again[name], f"{key}/{name}")
    elif isinstance(stored, list) and isinstance(again, list) and len(stored) == len(again):
        for number, (one, other) in enumerate(zip(stored, again, strict=True)):
            yield from _leaves(one, other, f"{key}/{number}")
    else:
        yield key, stored, again
