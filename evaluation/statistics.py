"""Paired comparison of two ways of training that were scored on the same cases: pure functions of arrays.

The estimand is the mean over the classes of the mean paired difference over trainings and cases. Its interval is the
percentile interval of a bootstrap that resamples whole patients within each fold and, where there are several, the
draws of the labels and, within each draw and fold, the seeds. Cases and trainings are crossed (every training of a fold
is scored on all its cases), so a resample draws both, independently, and keeps their cross product: the "pigeonhole"
bootstrap, mildly conservative with many of both (Owen, Annals of Applied Statistics 1, 2007).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
LEVEL = 0.95
EXACT_UNITS = 13
"""Up to so many patients all sign flips are tried (2^13 = 8192), above it `RESAMPLES` random ones."""
AT_ONCE = 500
TIE = 1e-12
"""Relative difference up to which two sums count as equal; rounding may not decide a tie."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PairedSample:
    """Differences between two ways of training, paired by draw, fold, seed, case and class."""

    differences: FloatArray
    """[trainings, cases, classes]; NaN where there is no pair (another fold, or undefined in either)."""
    trainings: tuple[tuple[Hashable, Hashable], ...]
    """Per training: draw of the labels, fold. Those that share both differ by their seed."""
    cases: tuple[tuple[Hashable, Hashable], ...]
    """Per case: the fold that it validates in, patient."""

    def __post_init__(self) -> None:
        shape = np.shape(self.differences)
        if len(shape) != 3 or shape[:2] != (len(self.trainings), len(self.cases)):
            wanted = f"[{len(self.trainings)} trainings, {len(self.cases)} cases, classes]"
            raise ValueError(f"differences have shape {shape}, expected {wanted}")

    @property
    def n_pairs(self) -> int:
        """Pairs of values that are defined on both sides."""
        return int(np.isfinite(self.differences).sum())

    @property
    def n_cases(self) -> int:
        """Cases with at least one pair."""
        return int(self._counted.sum())

    @property
    def n_patients(self) -> int:
        """Patients with at least one pair: what is resampled."""
        return len({self.cases[index] for index in np.flatnonzero(self._counted)})

    @property
    def resampled(self) -> tuple[str, ...]:
        """The levels that the bootstrap resamples: patients, and what else there is several of."""
        draws = {draw for draw, _ in self.trainings}
        several_seeds = len(set(self.trainings)) < len(self.trainings)
        return ("patients", *(["draws"] if len(draws) > 1 else []), *(["seeds"] if several_seeds else []))

    @property
    def _counted(self) -> npt.NDArray[np.bool_]:
        return np.asarray(np.isfinite(self.differences).any(axis=(0, 2)))


@dataclass(frozen=True)
class Comparison:
    """A mean paired difference with what is known of its uncertainty; NaN where nothing is."""

    estimate: float
    low: float
    high: float
    """`low` and `high` bound the bootstrap interval; NaN with fewer than two patients."""
    p_bootstrap: float
    """Smallest level whose two-sided interval leaves out zero (percentile interval inverted)."""
    p_sign_flip: float
    """Sign-flip permutation test over patients, of these very trainings."""

    @property
    def p(self) -> float:
        """The larger of both: a difference counts only where cases and trainings both speak for it."""
        return float(np.fmax(self.p_bootstrap, self.p_sign_flip))


def compare_paired(
    sample: PairedSample, n_resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Comparison:
    """Mean difference, its bootstrap interval and its p-values; the same seed gives the same result.

    Args:
        sample: The differences.
        n_resamples: Of the bootstrap, and of the sign flips where not all can be tried.
        level: Of the two-sided percentile interval.
        seed: Of the resampling.
    """
    estimate = mean_difference(sample)
    if sample.n_patients < 2:
        return Comparison(estimate, math.nan, math.nan, math.nan, 1.0 if sample.n_patients else math.nan)
    replicates = bootstrap_replicates(sample, n_resamples, seed)
    low, high = np.percentile(replicates, [50 * (1 - level), 50 * (1 + level)])
    return Comparison(
        estimate=estimate,
        low=float(low),
        high=float(high),
        p_bootstrap=_inverted_percentile(replicates),
        p_sign_flip=sign_flip_p(sample, n_resamples, seed),
    )


def mean_difference(sample: PairedSample) -> float:
    """Mean over the classes of the mean over trainings and cases where both are defined; NaN where nothing is."""
    n_trainings, n_cases, _ = sample.differences.shape
    return float(_Weighted(sample.differences)(np.ones((1, n_trainings)), np.ones((1, n_cases)))[0])


def bootstrap_replicates(sample: PairedSample, n_resamples: int = RESAMPLES, seed: int = 0) -> FloatArray:
    """Means of resampled trainings and cases, [n]; resamples in which nothing is defined are left out."""
    generator = np.random.default_rng(seed)
    mean = _Weighted(sample.differences)
    parts = [
        mean(_training_weights(sample.trainings, size, generator), _case_weights(sample.cases, size, generator))
        for size in _chunks(n_resamples)
    ]
    replicates = np.concatenate(parts)
    return replicates[np.isfinite(replicates)]


def sign_flip_p(sample: PairedSample, n_resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p of the permutation test that flips the sign of all differences of a patient together.

    Under its hypothesis each patient's difference, averaged over the trainings, is as likely with the other sign. All
    flips are tried where there are at most 2^13, else random ones, the observed one counted among them. The statistic
    is `mean_difference`; trainings are taken as they are, so the p-value says nothing about other seeds.
    """
    shares = _shares_of_patients(sample)
    if not len(shares):
        return math.nan
    observed = abs(math.fsum(shares)) * (1 - TIE)
    if len(shares) <= EXACT_UNITS:
        flips = 1 - 2 * ((np.arange(2 ** len(shares))[:, None] >> np.arange(len(shares))) & 1)
        return float(np.mean(np.abs(flips @ shares) >= observed))
    generator = np.random.default_rng(seed)
    reached = 0
    for size in _chunks(n_resamples):
        flips = 1 - 2 * generator.integers(0, 2, (size, len(shares)))
        reached += int((np.abs(flips @ shares) >= observed).sum())
    return (reached + 1) / (n_resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm, Scandinavian Journal of Statistics 6, 1979).

    The smallest of m is multiplied by m, the next by m - 1, and so on; none may be below the one before it, none above
    1. NaN stays NaN and does not count.
    """
    adjusted = [math.nan] * len(p_values)
    order = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda index: p_values[index])
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


class _Weighted:
    """Mean over classes of the weighted mean over trainings and cases.

    Values are taken relative to the first one of their class, so that equal differences give exactly equal means.
    """

    def __init__(self, differences: FloatArray) -> None:
        defined = np.isfinite(differences)
        columns = np.moveaxis(differences, 2, 0).reshape(differences.shape[2], -1)
        known = [column[np.isfinite(column)] for column in columns]
        self._first = np.array([values[0] if len(values) else 0.0 for values in known])
        self._shape = differences.shape
        self._relative = np.where(defined, differences - self._first, 0.0).reshape(self._shape[0], -1)
        self._defined = defined.astype(np.float64).reshape(self._shape[0], -1)

    def __call__(self, training_weights: FloatArray, case_weights: FloatArray) -> FloatArray:
        """[n, trainings] and [n, cases] → [n]; NaN where no weighted value is defined."""
        totals = self._sums(training_weights, case_weights, self._relative)
        counts = self._sums(training_weights, case_weights, self._defined)
        known = counts > 0
        means = np.where(known, self._first + totals / np.where(known, counts, 1.0), 0.0)
        n_classes = known.sum(1)
        result: FloatArray = np.where(n_classes > 0, means.sum(1) / np.maximum(n_classes, 1), math.nan)
        return result

    def _sums(self, training_weights: FloatArray, case_weights: FloatArray, values: FloatArray) -> FloatArray:
        over_trainings = (training_weights @ values).reshape(-1, *self._shape[1:])
        sums: FloatArray = (over_trainings * case_weights[:, :, None]).sum(1)
        return sums


def _shares_of_patients(sample: PairedSample) -> FloatArray:
    """What each patient adds to the mean difference, so that their sum is the mean difference."""
    defined = np.isfinite(sample.differences)
    counts = defined.sum((0, 1))
    known = counts > 0
    if not known.any():
        return np.zeros(0)
    per_case = np.where(defined, sample.differences, 0.0).sum(0)[:, known] / counts[known]
    patients = {unit: number for number, unit in enumerate(dict.fromkeys(sample.cases))}
    shares, seen = np.zeros(len(patients)), np.zeros(len(patients), dtype=bool)
    for unit, share, has_pair in zip(sample.cases, per_case.mean(1), np.asarray(defined.any((0, 2))), strict=True):
        shares[patients[unit]] += share
        seen[patients[unit]] |= bool(has_pair)
    return shares[seen]


def _inverted_percentile(replicates: FloatArray) -> float:
    """Twice the smaller tail beyond zero, the observed sample counted in both tails."""
    if not len(replicates):
        return math.nan
    tails = (np.sum(replicates <= 0), np.sum(replicates >= 0))
    return min(1.0, 2 * (int(min(tails)) + 1) / (len(replicates) + 1))


def _training_weights(
    trainings: Sequence[tuple[Hashable, Hashable]], size: int, generator: np.random.Generator
) -> FloatArray:
    """[size, trainings]: how often each is in a resample of draws, and of seeds within each draw and fold."""
    draws = list(dict.fromkeys(draw for draw, _ in trainings))
    taken = dict(zip(draws, generator.multinomial(len(draws), _equal(len(draws)), size).T, strict=True))
    weights = np.zeros((size, len(trainings)))
    for group in dict.fromkeys(trainings):
        seeds = [index for index, other in enumerate(trainings) if other == group]
        weights[:, seeds] = generator.multinomial(taken[group[0]] * len(seeds), _equal(len(seeds)))
    return weights


def _case_weights(cases: Sequence[tuple[Hashable, Hashable]], size: int, generator: np.random.Generator) -> FloatArray:
    """[size, cases]: how often each case is in a resample of patients within each fold."""
    weights = np.zeros((size, len(cases)))
    for fold in dict.fromkeys(fold for fold, _ in cases):
        columns = [index for index, (other, _) in enumerate(cases) if other == fold]
        patients = {patient: n for n, patient in enumerate(dict.fromkeys(cases[index][1] for index in columns))}
        taken = generator.multinomial(len(patients), _equal(len(patients)), size)
        weights[:, columns] = taken[:, [patients[cases[index][1]] for index in columns]]
    return weights


def _equal(number: int) -> FloatArray:
    return np.full(number, 1 / number)


def _chunks(total: int) -> Iterator[int]:
    for start in range(0, total, AT_ONCE):
        yield min(AT_ONCE, total - start)
