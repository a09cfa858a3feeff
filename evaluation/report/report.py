"""Writes the report of a split: the function behind `autossl_report`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from autossl.data.files import atomic_write
from autossl.data.image_io import orientation_for
from autossl.data.problems import InvalidInput
from autossl.data.provenance import Written
from autossl.data.raw_dataset import read_raw_dataset
from autossl.data.workspace import Workspace
from autossl.evaluation.label_schemas import labels_of_dataset
from autossl.evaluation.report.gather import gather
from autossl.evaluation.report.model import Report
from autossl.evaluation.report.overlay import overlays, read_pictured
from autossl.evaluation.report.page import Pictured, render
from autossl.evaluation.report.place import Place, choose_split
from autossl.evaluation.report.scores import pictured_runs

REPORT_FILE = "report.html"
Progress = Callable[[str, int, int], None]
"""(part of the work, done, total)."""


def report_path(workspace: Workspace, dataset: str, split: str) -> Path:
    """results/<dataset>/<split>/report.html."""
    return workspace.results_folder(dataset) / split / REPORT_FILE


def write_report(
    workspace: Workspace,
    dataset: str,
    split: str | None = None,
    output: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes one self-contained HTML page about a split; what is not there yet is said to be so.

    Args:
        workspace: Where everything lies; nothing but the page is written.
        dataset: Full name.
        split: None: the only one with results, see `choose_split`.
        output: The file; None: report.html beside the split's runs.
        progress: Told how far it is.

    Returns:
        The file.

    Raises:
        InvalidInput: several splits to choose from, or a file that is there and damaged.
    """
    place = Place(workspace, dataset, choose_split(workspace, dataset, split))
    page = make_page(place, Written.now(), progress)
    path = output or report_path(workspace, dataset, place.split)
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def make_page(place: Place, written: Written, progress: Progress | None = None) -> str:
    """The page's HTML, from what lies on disk.

    Raises:
        InvalidInput: a file that is there and damaged.
    """
    tell = progress or (lambda part, done, total: None)
    tell("report", 0, 3)
    report = gather(place)
    tell("report", 1, 3)
    pictured = read_pictures(place, report)
    tell("report", 2, 3)
    page = render(report, place, pictured, written)
    tell("report", 3, 3)
    return page


def read_pictures(place: Place, report: Report) -> list[Pictured]:
    """Of the worst, the median and the best case; those whose files are not at hand are left out."""
    if report.cases is None:
        return []
    try:
        raw = read_raw_dataset(place.workspace.raw_folder(place.dataset))
        schema, remap = labels_of_dataset(place.dataset, place.workspace.root)
    except InvalidInput:
        return []  # the page can be made where the raw data is not
    orientation, known = orientation_for(raw.description.file_ending), {case.id: case for case in raw.cases}
    pictured = []
    for role, row in report.cases.shown.items():
        if row.case in known:
            case = read_pictured(known[row.case], pictured_runs(place), schema, remap, orientation)
            if case is not None:
                pictured.append(Pictured(role, row, tuple(overlays(case, schema))))
    return pictured
