"""Interval of a mean paired difference from cross-validation, with training variance and with the choosing in it.

**Patients.** The mean is written as a sum of what each patient adds to it, and whole patients are resampled. With n
patients a bootstrap is too narrow by sqrt((n - 1) / n) and by the normal quantile that its percentiles stand for, so
errors are stretched by sqrt(n / (n - 1)) t(n - 1) / z: with one score per patient the interval is the paired t-test's,
up to skewness (Hesterberg, The American Statistician 69, 2015, shows how large the loss is).

**Trainings.** An interval over patients is about *these* trainings: with another seed the whole fold would move. Two
supervised runs that differ in their seed alone would then be told apart too often: with patients per fold m and a
share r of the variance that belongs to the training, the true variance is 1 + (m - 1) r times that of independent
patients. Five folds are five independent trainings per arm, so training variance can be seen even with one seed: folds
differ by more than their patients explain (one-way analysis of variance, MS_between against MS_within). It enters as

    v = (MS_between - c MS_within)+ / n0 * sum of (n_f / n)^2,     half-width^2 = t(n - 1)^2 s^2 / n + t(folds - 1)^2 v

where c is the value that MS_between / MS_within stays below in 9 of 10 samples without any training variance
(`CHANCE`): differences between folds that patients alone would show must not cost power. What this c does was
simulated (normal patients and folds, two-sided 95 %, 40 000 samples each), as share of samples without an effect in
which the interval lies above zero, by F = E MS_between / E MS_within, and as the largest loss of power against the
paired t-test on independent patients, over all gains:

    5 folds of        F = 1     2     3     4     6    10    30  1000   loss of power
    4 patients          2.3   4.7   5.5   5.6   5.3   4.4   2.9   2.1   2.9 points
    10 patients         2.3   5.2   6.1   6.1   5.5   4.6   3.2   2.4   3.0 points
    the paired t-test:
    4 patients          2.5   6.1   8.5  10.2  12.4  14.6  17.6  19.5   none
    10 patients         2.5   7.3  10.9  13.5  17.0  20.7  26.0  29.7   none

With c = 0 no share would exceed 2.5 %, at a cost of 20 points of power; with the 0.8 quantile none would exceed 5 %, at
a cost of 6. A linear program over all rules that use the two mean squares and are never narrower than the t-test's
interval gives 5.5 % as the smallest possible maximum for 5 folds of 4 at a loss of 3 points: five trainings know no
more. The remedy is more seeds. With several, v is taken from the spread between the seeds of a fold directly,
without c, with t(folds * (seeds - 1)).

**Choosing.** Where the best of several candidates is reported, it owes part of its figure to luck. Each resample moves
patients and trainings of all candidates together, chooses again, and notes by how much the figure of what it chose
exceeds that candidate's own: the mean of this is subtracted, its spread is the interval's. Candidates that do not
differ by more than their errors would look too different in the resamples, which would understate the luck; their
distances are first shrunk (James and Stein's positive part), down to none.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from autossl.evaluation.statistics import LEVEL, RESAMPLES, FloatArray

CHANCE = 0.9
"""Quantile of F (MS_between / MS_within without training variance) that folds must exceed to widen the interval."""
IntArray = npt.NDArray[np.int64]
Case = tuple[Hashable, Hashable]
"""The fold that a case validates in, and its patient."""


@dataclass(frozen=True)
class Resamples:
    """Random weights that all candidates share, so that what they have in common moves together."""

    patients: FloatArray
    """[n, patients]: how often each is drawn, minus one, over their number."""
    trainings: FloatArray
    """[n, folds, seeds]: standard normal multipliers."""


@dataclass(frozen=True)
class Spread:
    """An estimate and where its error comes from."""

    estimate: float
    patients: FloatArray
    """[patients]: what each would add to the mean, as deviation; stretched for their number."""
    trainings: FloatArray
    """[folds, seeds]: standard errors that trainings bring in, with sign; stretched for their number."""

    def errors(self, resamples: Resamples) -> FloatArray:
        """[n] errors of the estimate."""
        from_trainings: FloatArray = np.tensordot(resamples.trainings, self.trainings, 2)
        errors: FloatArray = resamples.patients @ self.patients + from_trainings
        return errors

    @property
    def training_error(self) -> float:
        """Standard error that the trainings bring in, stretched; 0 where none is seen."""
        return float(np.sqrt((self.trainings**2).sum()))


@dataclass(frozen=True)
class Interval:
    """A mean difference with its interval; NaN where there is none."""

    observed: float
    """Mean difference as it is."""
    estimate: float
    """Without the luck of the choosing; the observed one where nothing was chosen."""
    low: float
    high: float


def draw_resamples(cases: Sequence[Case], n_seeds: int = 1, n_resamples: int = RESAMPLES, seed: int = 0) -> Resamples:
    """Weights for `Spread.errors`; the same seed gives the same ones."""
    generator = np.random.default_rng(seed)
    n_patients, n_folds = len(set(cases)), len({fold for fold, _ in cases})
    counts = generator.multinomial(n_patients, np.full(n_patients, 1 / n_patients), n_resamples)
    return Resamples((counts - 1.0) / n_patients, generator.standard_normal((n_resamples, n_folds, n_seeds)))


def spread_of(values: FloatArray, cases: Sequence[Case], level: float = LEVEL) -> Spread:
    """Mean over the classes of the mean over seeds and cases, with its errors.

    Args:
        values: [seeds, cases, classes], NaN where undefined. Patients without any value count with deviation 0.
        cases: Fold and patient of each case.
        level: Of the interval that the errors are stretched for.
    """
    defined = np.isfinite(values)
    counts = defined.sum((0, 1))
    known = counts > 0
    if not known.any():
        return Spread(math.nan, np.zeros(len(set(cases))), np.zeros((len({f for f, _ in cases}), len(values))))
    filled = np.where(defined, values, 0.0)
    means = filled.sum((0, 1))[known] / counts[known]
    deviations = np.where(defined[:, :, known], filled[:, :, known] - means, 0.0)
    parts = (deviations / counts[known]).mean(2)
    per_patient, folds = _by_patient(parts, cases)
    return Spread(
        estimate=float(means.mean()),
        patients=per_patient.sum(0) * len(folds) * _stretch(len(folds), level),
        trainings=_training_errors(per_patient, folds, level),
    )


def interval_of(spread: Spread, resamples: Resamples, level: float = LEVEL) -> Interval:
    """Of one difference that nobody chose."""
    return _interval(spread.estimate, spread.errors(resamples), level, luck=0.0)


def interval_of_chosen(
    chosen: tuple[int, int],
    picks: tuple[IntArray, IntArray],
    pairs: Sequence[Sequence[Spread]],
    resamples: Resamples,
    level: float = LEVEL,
) -> Interval:
    """Of the difference between what was chosen among several with unlabeled cases and among several without.

    Args:
        chosen: Index on each side, as observed.
        picks: Index on each side in each resample, from `choose_again`.
        pairs: Difference of each one with to each one without.
        resamples: Those of `choose_again`.
        level: Of the interval.
    """
    errors = np.zeros(len(resamples.patients))
    for i, row in enumerate(pairs):
        for j, spread in enumerate(row):
            mask = (picks[0] == i) & (picks[1] == j)
            if mask.any():
                of_pair = spread.errors(resamples)
                errors[mask] = (of_pair - of_pair.mean())[mask]
    observed = pairs[chosen[0]][chosen[1]].estimate
    return _interval(observed, errors, level, luck=float(errors.mean()))


def choose_again(scores: Sequence[FloatArray], cases: Sequence[Case], resamples: Resamples) -> tuple[int, IntArray]:
    """Which candidate has the highest mean: as observed, and in each resample.

    Args:
        scores: Per candidate [seeds, cases, classes], all of the same shape.
        cases: Fold and patient of each case.
        resamples: Shared by all that is compared.
    """
    levels = np.array([spread_of(values, cases).estimate for values in scores])
    first = int(np.nanargmax(levels))
    if len(scores) == 1:
        return first, np.zeros(len(resamples.patients), dtype=np.int64)
    common = _mean_of_defined(np.stack(scores))
    errors = np.stack([spread_of(values - common, cases).errors(resamples) for values in scores])
    distances = levels - levels.mean()
    noise = float(errors.var(1).sum())
    kept = max(0.0, 1 - noise / total) if (total := float((distances**2).sum())) > 0 else 0.0
    return first, np.argmax(kept * distances[:, None] + errors, axis=0)


def _mean_of_defined(values: FloatArray) -> FloatArray:
    """Over the first axis; NaN where nothing is defined."""
    defined = np.isfinite(values)
    counts = defined.sum(0)
    sums = np.where(defined, values, 0.0).sum(0)
    means: FloatArray = np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)
    return means


def _interval(observed: float, errors: FloatArray, level: float, luck: float) -> Interval:
    low, high = np.percentile(errors - luck, [50 * (1 - level), 50 * (1 + level)])
    estimate = observed - luck
    return Interval(observed, estimate, estimate + float(low), estimate + float(high))


def _by_patient(parts: FloatArray, cases: Sequence[Case]) -> tuple[FloatArray, list[Hashable]]:
    """[seeds, cases] → [seeds, patients], and the fold of each patient."""
    patients = {unit: number for number, unit in enumerate(dict.fromkeys(cases))}
    membership = np.zeros((len(cases), len(patients)))
    membership[np.arange(len(cases)), [patients[unit] for unit in cases]] = 1.0
    return parts @ membership, [fold for fold, _ in patients]


def _training_errors(per_patient: FloatArray, folds: Sequence[Hashable], level: float) -> FloatArray:
    """[folds, seeds] from [seeds, patients]: see the module's text."""
    n_seeds, n_patients = per_patient.shape
    names = list(dict.fromkeys(folds))
    member = np.array([[fold == name for fold in folds] for name in names], dtype=np.float64)
    sums = member @ per_patient.T
    if n_seeds > 1:
        df = len(names) * (n_seeds - 1)
        deviations = (sums - sums.mean(1, keepdims=True)) * math.sqrt(n_seeds / (n_seeds - 1))
        return np.asarray(deviations * _quantile_ratio(df, level))
    sizes = member.sum(1)
    if len(names) < 2 or n_patients <= len(names):
        return np.zeros((len(names), 1))
    df = len(names) - 1
    deviations = per_patient[0] * n_patients
    fold_means = member @ deviations / sizes
    between = float((sizes * fold_means**2).sum()) / df
    within = float(((deviations - member.T @ fold_means) ** 2).sum()) / (n_patients - len(names))
    surplus = between - float(stats.f.ppf(CHANCE, df, n_patients - len(names))) * within
    typical_size = (n_patients - (sizes**2).sum() / n_patients) / df
    variance = max(0.0, surplus) / typical_size * float(((sizes / n_patients) ** 2).sum())
    size = float((sums**2).sum())
    return np.asarray(sums * math.sqrt(variance / size) * _quantile_ratio(df, level)) if size > 0 else 0.0 * sums


def _stretch(n_patients: int, level: float) -> float:
    if n_patients < 2:
        return 1.0
    return math.sqrt(n_patients / (n_patients - 1)) * _quantile_ratio(n_patients - 1, level)


def _quantile_ratio(df: int, level: float) -> float:
    """Student's quantile over the normal one."""
    upper = 0.5 * (1 + level)
    return float(stats.t.ppf(upper, df) / stats.norm.ppf(upper))
