"""From a split's files to the page's data: a pure function of what lies on disk, parts that are not there are None."""

from __future__ import annotations

from autossl.evaluation.report.gather_data import gather_data, gather_plan, gather_repeat
from autossl.evaluation.report.gather_results import (
    gather_final,
    gather_hidden,
    gather_label_next,
    gather_postprocessing,
    gather_selection,
    gather_verdict,
)
from autossl.evaluation.report.model import Report
from autossl.evaluation.report.place import Place
from autossl.evaluation.report.scores import gather_cases, gather_curves, gather_scores


def gather(place: Place) -> Report:
    """Everything that the page shows, without its pictures.

    Raises:
        InvalidInput: a file is damaged; one that is missing is no fault.
    """
    return Report(
        dataset=place.dataset,
        split=place.split,
        verdict=gather_verdict(place),
        final=gather_final(place),
        hidden=gather_hidden(place),
        scores=gather_scores(place),
        cases=gather_cases(place),
        selection=gather_selection(place),
        postprocessing=gather_postprocessing(place),
        data=gather_data(place),
        plan=gather_plan(place),
        curves=gather_curves(place),
        label_next=gather_label_next(place),
        repeat=gather_repeat(place),
    )
