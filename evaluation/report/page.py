"""From the page's data to HTML: figures are drawn, the template of this package is filled, everything is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2
from markupsafe import Markup

from autossl.data.provenance import Written
from autossl.evaluation.report.figures import (
    IntervalRow,
    box_figure,
    curves_figure,
    differences_figure,
    interval_figure,
)
from autossl.evaluation.report.model import CaseRow, Difference, Report
from autossl.evaluation.report.overlay import Overlay
from autossl.evaluation.report.place import HIDDEN_TEST, SELECTION, VERDICT, Place
from autossl.evaluation.report.sources import Traced

TEMPLATES = "templates"
PAGE, STYLE, SCRIPT = "page.html.jinja", "style.css", "page.js"
POINTS = 100
"""Dice points in a Dice of 1."""
WORDS = {
    "helped": ("good", "▲"),
    "no evidence": ("neutral", "●"),
    "hurt": ("bad", "▼"),
    "too few to tell": ("unsure", "?"),
}
"""Of the verdict → its tone and sign: never color alone."""
METRIC_NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "hd95_mm": "HD95, mm",
    "hd95_px": "HD95, px",
    "assd_mm": "ASSD, mm",
    "assd_px": "ASSD, px",
    "nsd": "NSD",
    "volume_error_relative": "volume error",
    "lesion_f1": "lesion F1",
    "ece": "ECE",
}
AXIS_POINTS = "difference in Dice points"


@dataclass(frozen=True)
class Chart:
    """A figure of the page."""

    name: str
    """Unique in the page."""
    drawing: Markup
    caption: str
    sources: str
    """Files it was drawn from."""


@dataclass(frozen=True)
class Pictured:
    """The pictures of one case."""

    role: str
    """worst, median or best."""
    row: CaseRow
    overlays: tuple[Overlay, ...]


def render(report: Report, place: Place, pictured: Sequence[Pictured], written: Written) -> str:
    """The page.

    Args:
        report: Its data.
        place: For the names of files.
        pictured: Cases with pictures.
        written: When, and by what; what was made from files that changed later is found by `check`.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["n"] = traced_span
    template = environment.from_string(_package_file(PAGE))
    return template.render(
        report=report,
        place=place,
        charts={chart.name: chart for chart in charts(report, place)},
        pictured=pictured,
        written=written,
        words=WORDS,
        metric_names=METRIC_NAMES,
        style=Markup(_package_file(STYLE)),
        script=Markup(_package_file(SCRIPT)),
    )


def traced_span(value: Traced | None) -> Markup:
    """A value with its place, for those who read the page's source, and for `check`."""
    if value is None:
        return Markup("–")
    place = Markup('data-source="{}" data-key="{}" data-form="{}"').format(value.source, value.key, value.form)
    if value.form == "text":
        return Markup('<span class="text" {}>{}</span>').format(place, value.text)
    return Markup('<span class="n" {} data-value="{}">{}</span>').format(place, json.dumps(value.value), value.text)


def charts(report: Report, place: Place) -> Iterable[Chart]:
    """All figures, in the order of the page."""
    yield from _verdict_charts(report, place)
    if report.hidden is not None and report.hidden.to_twin:
        rows = [_interval(entry, f"{entry.name} against {entry.against}") for entry in report.hidden.to_twin]
        drawing = interval_figure(rows, AXIS_POINTS, "differences on the hidden test set with their intervals")
        yield Chart("hidden", drawing, "On the hidden test set", place.result(HIDDEN_TEST))
    if report.scores is not None:
        sources = f"{report.scores.runs[0].folder.rsplit('/', 1)[0]}/*/fold_*/validation/summary.json"
        for name in report.scores.classes:
            groups = {run.name: run.dice[name] for run in report.scores.runs if run.dice[name]}
            if groups:
                what = f"box plots of the out-of-fold Dice of {name}, one per run"
                yield Chart(f"dice {name}", box_figure(groups, "Dice", what), name, sources)
    if report.selection is not None:
        candidates = [
            IntervalRow(one.name, one.observed.number, one.low.number, one.high.number, one.chosen)
            for one in report.selection.candidates
        ]
        drawing = interval_figure(candidates, "pooled Dice", "candidates with their intervals", zero=False)
        yield Chart("candidates", drawing, "Every candidate, the chosen one in bold", place.result(SELECTION))
    if report.data is not None:
        for channel, pools in report.data.intensities.items():
            what = f"box plots of the median intensity of channel {channel}, labeled and unlabeled"
            drawing = box_figure(pools, "median intensity of a case", what)
            yield Chart(f"intensity {channel}", drawing, f"Channel {channel}", report.data.source)
    for row in report.curves:
        curves = {f"fold {fold}": points for fold, points in row.curves.items() if points}
        if curves:
            drawing = curves_figure(curves, ("step", "supervised loss"), f"training loss of {row.name}, by fold")
            yield Chart(f"curves {row.name}", drawing, row.name, row.loss.source)


def _verdict_charts(report: Report, place: Place) -> Iterable[Chart]:
    verdict = report.verdict
    if verdict is None:
        return
    source = place.result(VERDICT)
    rows = [
        _interval(verdict.overall, "all classes", strong=True),
        *(_interval(row, row.name) for row in verdict.classes),
    ]
    drawing = interval_figure(rows, AXIS_POINTS, "difference in Dice with its interval, overall and per class")
    yield Chart("verdict", drawing, f"{verdict.chosen} minus {verdict.against}", source)
    if verdict.per_case:
        values = {case: POINTS * own[0] for case, own in verdict.per_case.items()}
        what = f"difference in Dice of each case, {verdict.chosen} minus {verdict.against}"
        drawing = differences_figure(values, f"cases, sorted; {verdict.chosen} minus {verdict.against}, points", what)
        yield Chart("per case", drawing, "Difference per case", verdict.per_case_source)
    several = [*verdict.comparisons, *([verdict.equal_time] if verdict.equal_time is not None else [])]
    if len(several) > 1:
        rows = [_interval(entry, f"{entry.name} against {entry.against}") for entry in several]
        drawing = interval_figure(rows, AXIS_POINTS, "differences of every candidate to its twin")
        yield Chart("comparisons", drawing, "Every candidate against its twin", source)


def _interval(row: Difference, name: str, strong: bool = False) -> IntervalRow:
    estimate, low, high = (POINTS * value.number for value in (row.estimate, row.low, row.high))
    return IntervalRow(name, estimate, low, high, strong)


def figure_markup(page: str) -> Mapping[str, str]:
    """Name → drawing of the charts in a page."""
    found = {}
    for part in page.split('data-figure="')[1:]:
        name, _, rest = part.partition('"')
        start = rest.find("<svg")
        found[str(Markup(name).unescape())] = rest[start : rest.find("</svg>") + len("</svg>")]
    return found


def _package_file(name: str) -> str:
    return resources.files(__package__).joinpath(TEMPLATES, name).read_text(encoding="utf-8")
