"""What the final model is chosen from: runs with all folds finished, and pairs of them, scored out of fold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

from autossl.data.files import read_json
from autossl.data.image_io import read_label
from autossl.data.integrity import remap_label_map
from autossl.data.labels import LabelSchema
from autossl.data.parallel import parallel_map
from autossl.data.probabilities import labels_of, mean_of
from autossl.data.problems import InvalidInput, Problem
from autossl.data.runs import FoundRun
from autossl.evaluation.metrics import dice_per_class
from autossl.evaluation.out_of_fold import OutOfFoldCase
from autossl.evaluation.statistics import FloatArray

Dice = dict[str, float]
"""Class → Dice; NaN where it is undefined."""
OutOfFold = Mapping[str, OutOfFoldCase]
"""Case → its prediction by a run."""


@dataclass(frozen=True)
class Candidate:
    """A run, or an ensemble of runs, with its scores."""

    runs: tuple[FoundRun, ...]
    dice: FloatArray
    """[cases, classes] of the out-of-fold label maps before postprocessing; NaN where undefined."""

    @property
    def name(self) -> str:
        """Of the run folders."""
        return " + ".join(run.folder.name for run in self.runs)

    @property
    def methods(self) -> frozenset[str]:
        """Of its runs."""
        return frozenset(run.spec.method for run in self.runs)


@dataclass(frozen=True)
class ScoredCandidates:
    """All candidates on the same cases."""

    cases: tuple[OutOfFoldCase, ...]
    """Those that all candidates predicted, by name; files and fold as of the first one."""
    classes: tuple[str, ...]
    singles: tuple[Candidate, ...]
    ensembles: tuple[Candidate, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Run folder or case → why it takes no part."""

    @property
    def units(self) -> list[tuple[str, str]]:
        """Fold and patient of each case."""
        return [(case.fold, case.patient) for case in self.cases]


def single_candidate(run: FoundRun, cases: Sequence[OutOfFoldCase], classes: Sequence[str]) -> Candidate:
    """With the scores of the folds' summary.json.

    Raises:
        InvalidInput: a fold has no summary.json, or one without a case.
    """
    summaries = {path: read_json(path) for path in sorted({case.label_map.parent / "summary.json" for case in cases})}
    rows = []
    for case in cases:
        path = case.label_map.parent / "summary.json"
        scores = summaries[path]["cases"].get(case.case)
        if scores is None:
            fix = "run the autossl_train of this run again: it scores what is missing"
            raise InvalidInput(Problem("not among the scores of its fold", "its Dice", fix, case=case.case, file=path))
        values = [scores[name]["dice"] for name in classes]
        rows.append([math.nan if value is None else float(value) for value in values])
    return Candidate((run,), np.array(rows, dtype=np.float64).reshape(len(cases), len(classes)))


def pair_candidates(
    predictions: Sequence[tuple[FoundRun, OutOfFold]],
    cases: Sequence[str],
    schema: LabelSchema,
    remap_references: Mapping[int, int],
    n_workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Candidate]:
    """Every pair of runs, as the mean of their probabilities decides.

    Args:
        predictions: Runs with their out-of-fold cases, probabilities saved.
        cases: To score, each predicted by all runs.
        schema: What the label values mean.
        remap_references: OLD → NEW label values of the references.
        n_workers: Processes; None takes one per CPU.
        progress: Called with (cases done, cases in all).

    Raises:
        InvalidInput: Probabilities or references that cannot be read or do not lie on one grid.
    """
    pairs = list(combinations(range(len(predictions)), 2))
    if not pairs:
        return []
    items = [
        _Item(case, predictions[0][1][case].reference, tuple(_saved(out[case]) for _, out in predictions))
        for case in cases
    ]
    score = partial(_score_pairs, pairs=pairs, schema=schema, remap=dict(remap_references))
    found = []
    for done, per_pair in enumerate(parallel_map(score, items, n_workers, name_of=lambda item: item.case), 1):
        found.append([[dice[name] for name in schema.foreground] for dice in per_pair])
        if progress is not None:
            progress(done, len(items))
    values = np.array(found, dtype=np.float64)  # [cases, pairs, classes]
    return [Candidate((predictions[i][0], predictions[j][0]), values[:, n]) for n, (i, j) in enumerate(pairs)]


@dataclass(frozen=True)
class _Item:
    case: str
    reference: Path
    probabilities: tuple[Path, ...]


def _score_pairs(
    item: _Item, pairs: Sequence[tuple[int, int]], schema: LabelSchema, remap: Mapping[int, int]
) -> list[Dice]:
    """Of one case, per pair."""
    reference = remap_label_map(read_label(item.reference, "native")[0], remap)
    scores = []
    for i, j in pairs:
        slabs = mean_of([item.probabilities[i], item.probabilities[j]])
        label_map = np.concatenate([labels_of(slab, schema) for slab in slabs])
        if label_map.shape != reference.shape:
            found = f"probabilities on a grid of {label_map.shape}, the reference has {reference.shape} (z,y,x)"
            fix = "predict the case again with autossl_train --save_probabilities"
            raise InvalidInput(Problem(found, "one grid", fix, case=item.case, file=item.probabilities[i]))
        scores.append(dice_per_class(label_map, reference, schema))
    return scores


def _saved(case: OutOfFoldCase) -> Path:
    if case.probabilities is None:
        fix = "predict them with predict_out_of_fold, or train with autossl_train --save_probabilities"
        raise InvalidInput(Problem("no probabilities", "those of its fold", fix, case=case.case, file=case.label_map))
    return case.probabilities
