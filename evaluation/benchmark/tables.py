"""The table: one row per way of training, each beside its supervised twin."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autossl.evaluation.benchmark.request import RowKey
from autossl.evaluation.benchmark.results import Training, mean_per_class
from autossl.evaluation.metrics import mean_of_defined
from autossl.evaluation.statistics import Comparison, PairedSample, compare_paired, holm


@dataclass(frozen=True)
class Difference:
    """A row against its twin, in units of Dice."""

    comparison: Comparison
    p_holm: float
    """NaN for full labels, which are a yardstick and no method."""
    n_pairs_of_runs: int
    n_cases: int
    n_patients: int
    resampled: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One row; NaN where there is nothing to say."""

    key: RowKey
    trainings: tuple[Training, ...]
    """Those that are finished."""
    n_wanted: int
    dice: Mapping[str, float]
    """Class → mean over trainings and cases where it is defined."""
    mean_dice: float
    """Mean over the classes."""
    to_twin: Difference | None = None
    """None for the twin itself, for full labels beside several budgets, and where no pair of runs is finished."""
    gap: Difference | None = None
    """Of a twin: full labels minus the twin."""
    gap_closed: float = math.nan
    """Of a method: its difference as a share of the twin's gap; NaN where the gap's interval is not above zero."""

    @property
    def peak_memory_mb(self) -> float:
        """Largest of its trainings."""
        return max((training.peak_memory_mb for training in self.trainings), default=math.nan)

    @property
    def wall_seconds(self) -> float:
        """Sum over its trainings."""
        return math.fsum(training.wall_seconds for training in self.trainings)

    @property
    def plans_hashes(self) -> list[str]:
        """Of its runs; several only where a budget changes the normalization (CT)."""
        return list(dict.fromkeys(training.spec.plans_hash for training in self.trainings))

    @property
    def commits(self) -> list[str]:
        """That its runs were trained with, "unknown" where nobody noted it."""
        return list(dict.fromkeys(training.commit or "unknown" for training in self.trainings))


def build_rows(
    wanted: Mapping[RowKey, int], trainings: Sequence[Training], classes: Sequence[str], patients: Mapping[str, str]
) -> list[Row]:
    """The rows, in the order of `wanted`.

    Args:
        wanted: Row → number of runs it should have.
        trainings: The finished ones.
        classes: Foreground classes or regions, in output order.
        patients: Case → patient; a case that is not in here is a patient of its own.
    """
    of_row = {key: [training for training in trainings if training.run.row == key] for key in wanted}
    twins = {key.labeled: of_row[key] for key in wanted if key.role == "twin"}
    full = next((of_row[key] for key in wanted if key.role == "full labels"), [])
    gaps = {budget: _difference(full, twin, classes, patients) for budget, twin in twins.items()}
    rows = []
    for key, n_wanted in wanted.items():
        row = _plain_row(key, n_wanted, of_row[key], classes)
        if key.role == "method":
            row = replace(row, to_twin=_difference(of_row[key], twins[key.labeled], classes, patients))
            row = replace(row, gap_closed=_share(row.to_twin, gaps[key.labeled]))
        elif key.role == "twin":
            row = replace(row, gap=gaps[key.labeled])
        elif len(gaps) == 1:
            row = replace(row, to_twin=next(iter(gaps.values())))
        rows.append(row)
    return _with_holm(rows)


def _plain_row(key: RowKey, n_wanted: int, trainings: Sequence[Training], classes: Sequence[str]) -> Row:
    dice = mean_per_class([training.dice for training in trainings], classes)
    return Row(key, tuple(trainings), n_wanted, dice, mean_of_defined(dice.values())[0])


def _difference(
    trainings: Sequence[Training], twins: Sequence[Training], classes: Sequence[str], patients: Mapping[str, str]
) -> Difference | None:
    """The trainings minus the twins of the same draw, fold and seed; full labels have no draw and pair with each."""
    by_place = {(training.run.draw, training.run.fold, training.run.seed): training for training in trainings}
    pairs = []
    for twin in twins:
        draw, fold, seed = twin.run.draw, twin.run.fold, twin.run.seed
        partner = by_place.get((draw, fold, seed)) or by_place.get((None, fold, seed))
        if partner is not None:
            pairs.append((partner, twin))
    if not pairs:
        return None
    sample = _paired_sample(pairs, classes, patients)
    return Difference(
        comparison=compare_paired(sample),
        p_holm=math.nan,
        n_pairs_of_runs=len(pairs),
        n_cases=sample.n_cases,
        n_patients=sample.n_patients,
        resampled=sample.resampled,
    )


def _paired_sample(
    pairs: Sequence[tuple[Training, Training]], classes: Sequence[str], patients: Mapping[str, str]
) -> PairedSample:
    fold_of = {case: twin.run.fold for _, twin in pairs for case in twin.dice}
    cases = sorted(fold_of)
    differences = np.full((len(pairs), len(cases), len(classes)), math.nan)
    for t, (training, twin) in enumerate(pairs):
        for c, case in enumerate(cases):
            if case in training.dice and case in twin.dice:
                one, other = training.dice[case], twin.dice[case]
                differences[t, c] = [one.get(name, math.nan) - other.get(name, math.nan) for name in classes]
    return PairedSample(
        differences,
        trainings=tuple((twin.run.draw, twin.run.fold) for _, twin in pairs),
        cases=tuple((fold_of[case], patients.get(case, case)) for case in cases),
    )


def _share(difference: Difference | None, gap: Difference | None) -> float:
    """NaN where the gap is not surely above zero: a share of nothing says nothing."""
    if difference is None or gap is None or not gap.comparison.low > 0:
        return math.nan
    return difference.comparison.estimate / gap.comparison.estimate


def _with_holm(rows: Sequence[Row]) -> list[Row]:
    """p-values of the methods corrected for each other, within each budget."""
    corrected = list(rows)
    for budget in dict.fromkeys(row.key.labeled for row in rows):
        compared = [n for n, row in enumerate(rows) if row.key.role == "method" and row.key.labeled == budget]
        p_values = [math.nan if (found := rows[n].to_twin) is None else found.comparison.p for n in compared]
        for n, p in zip(compared, holm(p_values), strict=True):
            found = rows[n].to_twin
            if found is not None:
                corrected[n] = replace(rows[n], to_twin=replace(found, p_holm=p))
    return corrected
