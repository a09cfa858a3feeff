"""Intervals with training variance and choosing in them: closed forms and shares over made-up samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from autossl.evaluation.resampling import (
    Spread,
    choose_again,
    draw_resamples,
    interval_of,
    interval_of_chosen,
    spread_of,
)
from autossl.evaluation.statistics import PairedSample, mean_difference

FOLDS, EACH = 5, 4
CASES = [(fold, fold * EACH + n) for fold in range(FOLDS) for n in range(EACH)]
FOLD_OF = np.repeat(np.arange(FOLDS), EACH)
RESAMPLES = draw_resamples(CASES, 1, 1000)


def spread(values: np.ndarray, cases: list = CASES) -> Spread:
    return spread_of(np.asarray(values, dtype=float)[None, :, None], cases)


def patients_only(seed: int = 0) -> np.ndarray:
    """Normal scores whose folds have equal means."""
    values = np.random.default_rng(seed).standard_normal(len(CASES))
    return values - (np.bincount(FOLD_OF, values) / EACH)[FOLD_OF]


def share_above_zero(lows: list[float]) -> float:
    return float(np.mean(np.array(lows) > 0))


def test_without_fold_differences_the_interval_is_the_paired_t_tests() -> None:
    values = patients_only() + 0.3
    found = interval_of(spread(values), draw_resamples(CASES, 1, 40_000))
    exact = stats.ttest_1samp(values, 0).confidence_interval()
    assert found.estimate == found.observed == pytest.approx(values.mean())
    assert found.low == pytest.approx(exact.low, abs=0.015)
    assert found.high == pytest.approx(exact.high, abs=0.015)


def test_what_trainings_differ_by_enters_with_the_quantile_of_their_number() -> None:
    """Patients without noise: all variance is that of five folds, and the interval the t-test's over fold means."""
    means = np.array([0.2, -0.1, 0.5, 0.9, 0.4])
    values = means[FOLD_OF] + 1e-6 * patients_only()
    found = spread(values)
    exact = means.std(ddof=1) / math.sqrt(FOLDS) * stats.t.ppf(0.975, FOLDS - 1) / stats.norm.ppf(0.975)
    assert found.training_error == pytest.approx(exact, rel=1e-6)


def test_fold_differences_that_patients_explain_do_not_count() -> None:
    """One-way analysis of variance with F at 9 in 10 of chance: below it nothing, above it the surplus."""
    base, limit = patients_only(), stats.f.ppf(0.9, FOLDS - 1, len(CASES) - FOLDS)
    within = (base**2).sum() / (len(CASES) - FOLDS)
    direction = np.array([1.0, -1.0, 2.0, -2.0, 0.0])

    def with_f(f: float) -> np.ndarray:
        unit = EACH * (direction**2).sum() / (FOLDS - 1)
        return base + (direction * math.sqrt(f * within / unit))[FOLD_OF]

    assert spread(with_f(0.99 * limit)).training_error == 0.0
    stretch = stats.t.ppf(0.975, FOLDS - 1) / stats.norm.ppf(0.975)
    surplus = (5 * limit - limit) * within / len(CASES)
    assert spread(with_f(5 * limit)).training_error == pytest.approx(math.sqrt(surplus) * stretch)


def test_several_seeds_show_training_variance_directly() -> None:
    """Two seeds whose folds differ by 2 a each: the mean of two has the variance a^2 per fold."""
    a = 0.3
    values = np.zeros((2, len(CASES), 1))
    values[0], values[1] = a, -a
    found = spread_of(values, CASES)
    exact = math.sqrt(a**2 / FOLDS) * stats.t.ppf(0.975, FOLDS) / stats.norm.ppf(0.975)
    assert found.estimate == pytest.approx(0)
    assert found.training_error == pytest.approx(exact)
    errors = found.errors(draw_resamples(CASES, 2, 40_000))
    assert errors.std() == pytest.approx(exact, rel=0.02)


def test_the_estimate_is_the_mean_over_classes_of_the_means_where_defined() -> None:
    values = np.random.default_rng(1).standard_normal((1, len(CASES), 3))
    values[0, :7, 1], values[0, 3:, 2] = np.nan, np.nan
    sample = PairedSample(values, (("d", 0),), tuple((0, patient) for _, patient in CASES))
    assert spread_of(values, CASES).estimate == pytest.approx(mean_difference(sample))
    assert spread_of(values[..., 2:], CASES).estimate == pytest.approx(values[0, :3, 2].mean())


def test_nothing_defined_gives_no_figure() -> None:
    found = interval_of(spread(np.full(len(CASES), np.nan)), RESAMPLES)
    assert math.isnan(found.estimate)
    assert math.isnan(found.low)


def test_scans_of_a_patient_are_one_unit() -> None:
    doubled = [case for case in CASES for _ in range(2)]
    values = patients_only()
    once, twice = spread(values), spread(np.repeat(values, 2), doubled)
    assert twice.patients == pytest.approx(once.patients)


def test_trainings_that_differ_do_not_make_effects() -> None:
    """No effect, half of the variance belongs to the trainings: the t-test over patients sees one in a tenth."""
    generator = np.random.default_rng(3)
    ours, t_test = [], []
    for _ in range(600):
        values = math.sqrt(0.7) * generator.standard_normal(FOLDS)[FOLD_OF]
        values = values + math.sqrt(0.3) * generator.standard_normal(len(CASES))
        ours.append(interval_of(spread(values), RESAMPLES).low)
        t_test.append(stats.ttest_1samp(values, 0).confidence_interval().low)
    assert share_above_zero(t_test) > 0.10
    assert share_above_zero(ours) < 0.075


def test_power_is_that_of_the_paired_t_test_within_3_points() -> None:
    generator = np.random.default_rng(4)
    values = generator.standard_normal((1000, len(CASES)))
    lows = np.array([interval_of(spread(row), RESAMPLES).low for row in values])
    t_lows = values.mean(1) - stats.t.ppf(0.975, len(CASES) - 1) * values.std(1, ddof=1) / math.sqrt(len(CASES))
    assert share_above_zero(list(lows)) < 0.035
    for gain in (0.4, 0.6, 0.8):
        assert share_above_zero(list(t_lows + gain)) - share_above_zero(list(lows + gain)) < 0.035


def test_the_luck_of_choosing_is_taken_off() -> None:
    """Six candidates without any effect: the highest mean of six has 1.27 standard errors of luck."""
    generator = np.random.default_rng(5)
    naive, ours, observed, corrected = [], [], [], []
    for _ in range(100):
        base = 3 * generator.standard_normal(len(CASES))
        scores = [(base + generator.standard_normal(len(CASES)))[None, :, None] for _ in range(7)]
        twin, methods = scores[0], scores[1:]
        first, picks = choose_again(methods, CASES, RESAMPLES)
        none = np.zeros_like(picks)
        pairs = [[spread_of(one - twin, CASES)] for one in methods]
        naive.append(interval_of(pairs[first][0], RESAMPLES).low)
        found = interval_of_chosen((first, 0), (picks, none), pairs, RESAMPLES)
        assert found.estimate < found.observed == pairs[first][0].estimate
        ours.append(found.low)
        observed.append(found.observed)
        corrected.append(found.estimate)
    assert np.mean(observed) == pytest.approx(1.27 / math.sqrt(len(CASES)), abs=0.06)
    assert np.mean(corrected) == pytest.approx(0, abs=0.06)
    assert share_above_zero(ours) < 0.04 < share_above_zero(naive)


def test_a_candidate_far_ahead_owes_nothing_to_luck() -> None:
    generator = np.random.default_rng(6)
    base = generator.standard_normal(len(CASES))
    scores = [(base + shift + 0.1 * generator.standard_normal(len(CASES)))[None, :, None] for shift in (0, 0, 2.0)]
    first, picks = choose_again(scores, CASES, RESAMPLES)
    assert first == 2
    assert (picks == 2).all()
    pairs = [[spread_of(one - base[None, :, None], CASES)] for one in scores]
    alone = interval_of(pairs[2][0], RESAMPLES)
    found = interval_of_chosen((2, 0), (picks, np.zeros_like(picks)), pairs, RESAMPLES)
    assert found.low == pytest.approx(alone.low, abs=0.005)
    assert found.estimate == pytest.approx(alone.estimate, abs=0.005)


def test_a_distance_within_the_noise_does_not_count_in_the_resamples() -> None:
    """Two candidates 0.6 standard errors apart: as they are, the second would be chosen in three of four resamples."""
    generator = np.random.default_rng(7)
    first, second = (values - values.mean() for values in generator.standard_normal((2, len(CASES))))
    scores = [first[None, :, None], second[None, :, None] + 0.2]
    chosen, picks = choose_again(scores, CASES, RESAMPLES)
    assert chosen == 1
    assert np.bincount(picks, minlength=2).min() > 0.4 * len(picks)
