"""Paired bootstrap, sign flips and Holm's correction against closed forms and scipy."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from autossl.evaluation.statistics import (
    PairedSample,
    bootstrap_replicates,
    compare_paired,
    holm,
    mean_difference,
    sign_flip_p,
)


def sample_of(
    differences: np.ndarray, folds: list[str] | None = None, patients: list[str] | None = None
) -> PairedSample:
    """[trainings, cases(, classes)], trainings of one draw in fold 0 unless said otherwise."""
    values = differences if differences.ndim == 3 else differences[:, :, None]
    n_cases = values.shape[1]
    names = patients or [f"p{n}" for n in range(n_cases)]
    return PairedSample(values, (("d0", "0"),) * len(values), tuple(zip(folds or ["0"] * n_cases, names, strict=True)))


def normal(*shape: int, mean: float = 0.0, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.0, shape)


# ---------------------------------------------------------------------------------------------------------- estimate


def test_the_estimate_is_the_mean_of_the_class_means() -> None:
    values = np.array([[[1.0, 10.0], [3.0, np.nan], [np.nan, np.nan]]])
    assert mean_difference(sample_of(values)) == pytest.approx((2 + 10) / 2)


def test_a_class_without_any_pair_does_not_count() -> None:
    values = np.array([[[1.0, np.nan], [3.0, np.nan]]])
    assert mean_difference(sample_of(values)) == pytest.approx(2.0)
    assert math.isnan(mean_difference(sample_of(np.full((1, 2, 2), np.nan))))


def test_numbers_that_are_compared_are_counted() -> None:
    values = np.array([[1.0, 2.0, np.nan, 4.0], [1.0, np.nan, np.nan, 4.0]])
    sample = sample_of(values, patients=["a", "a", "b", "c"])
    assert (sample.n_pairs, sample.n_cases, sample.n_patients) == (5, 3, 2)
    assert sample.resampled == ("patients", "seeds")
    assert sample_of(values[:1]).resampled == ("patients",)
    draws = PairedSample(values[:, :, None], (("d0", "0"), ("d1", "0")), sample.cases)
    assert draws.resampled == ("patients", "draws")


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 3, 1\), expected \[1 trainings, 2 cases"):
        PairedSample(np.zeros((1, 3, 1)), (("d0", "0"),), (("0", "a"), ("0", "b")))


# ---------------------------------------------------------------------------------------------------------- interval


@pytest.mark.parametrize("constant", [0.1, 0.03, -1 / 3])
def test_a_constant_difference_has_an_interval_of_zero_width(constant: float) -> None:
    found = compare_paired(sample_of(np.full((3, 17, 2), constant)))
    assert found.low == found.high == pytest.approx(found.estimate) == pytest.approx(constant)
    assert found.p_bootstrap == pytest.approx(2 / 10_001)


def test_no_difference_at_all_is_no_evidence() -> None:
    found = compare_paired(sample_of(np.zeros((2, 6))))
    assert (found.estimate, found.low, found.high) == (0.0, 0.0, 0.0)
    assert (found.p_bootstrap, found.p_sign_flip, found.p) == (1.0, 1.0, 1.0)


def test_symmetric_data_has_a_symmetric_interval_around_zero() -> None:
    half = np.abs(normal(20))
    found = compare_paired(sample_of(np.concatenate([half, -half])[None]))
    assert found.estimate == pytest.approx(0, abs=1e-12)
    assert found.low == pytest.approx(-found.high, rel=0.05)
    assert found.p > 0.9


def test_the_spread_over_cases_is_the_bootstrap_s_own() -> None:
    """The bootstrap variance of a mean is the variance (divisor n) over n."""
    values = normal(30)
    replicates = bootstrap_replicates(sample_of(values[None]))
    assert replicates.std() == pytest.approx(values.std() / math.sqrt(30), rel=0.03)
    assert replicates.mean() == pytest.approx(values.mean(), abs=0.01)


def test_cases_and_seeds_both_add_their_variance() -> None:
    """Additive effects a + b: the variances of both bootstraps add up."""
    a, b = normal(4, seed=2), normal(25, seed=3)
    replicates = bootstrap_replicates(sample_of(a[:, None] + b[None]))
    assert replicates.var() == pytest.approx(a.var() / 4 + b.var() / 25, rel=0.05)
    only_cases = bootstrap_replicates(sample_of(np.repeat(b[None], 4, axis=0)))
    assert only_cases.var() == pytest.approx(b.var() / 25, rel=0.05)


def test_pure_noise_has_the_pigeonhole_s_three_parts() -> None:
    """Exact variance of the crossed bootstrap: resampled rows, columns, and what they do not explain.

    With v rows and columns weighted by independent multinomial counts, E over the counts gives
    Var = (1/R)·var(row means) + (1/C)·var(column means) + (1/RC)·mean squared interaction, divisors R, C and RC.
    """
    values = normal(5, 12, seed=4)
    rows, columns, mean = values.mean(1), values.mean(0), values.mean()
    interaction = values - rows[:, None] - columns[None] + mean
    exact = rows.var() / 5 + columns.var() / 12 + (interaction**2).mean() / 60
    assert bootstrap_replicates(sample_of(values)).var() == pytest.approx(exact, rel=0.05)


def test_draws_are_resampled_with_their_seeds() -> None:
    """Two draws with two seeds each, an effect per draw and one per seed: both variances, nested."""
    draw_effect, seed_effect = np.array([0.0, 2.0]), np.array([[0.5, -0.5], [1.0, -1.0]])
    values = (draw_effect[:, None] + seed_effect).reshape(4, 1, 1) + np.zeros((4, 6, 1))
    trainings = (("d0", "0"), ("d0", "0"), ("d1", "0"), ("d1", "0"))
    sample = PairedSample(values, trainings, tuple(("0", f"p{n}") for n in range(6)))
    # 2 draws are taken; each brings the mean of its 2 resampled seeds: variance of the draws plus, on average, of seeds
    exact = (draw_effect.var() + seed_effect.var(axis=1).mean() / 2) / 2
    assert bootstrap_replicates(sample).var() == pytest.approx(exact, rel=0.05)


def test_folds_are_resampled_within_themselves() -> None:
    """Two folds whose cases differ only between the folds: nothing varies."""
    values = np.full((2, 6, 1), np.nan)
    values[0, :3], values[1, 3:] = 1.0, 3.0
    cases = tuple(("0" if n < 3 else "1", f"p{n}") for n in range(6))
    found = compare_paired(PairedSample(values, (("d0", "0"), ("d0", "1")), cases))
    assert found.estimate == found.low == found.high == pytest.approx(2.0)


def test_scans_of_a_patient_go_together() -> None:
    """Each patient with two equal scans: the interval is that of the patients, not of twice as many cases."""
    values = normal(15)
    doubled = sample_of(np.repeat(values, 2)[None], patients=[f"p{n // 2}" for n in range(30)])
    single = sample_of(values[None])
    assert bootstrap_replicates(doubled).std() == pytest.approx(bootstrap_replicates(single).std(), rel=0.03)
    assert sign_flip_p(doubled) == pytest.approx(sign_flip_p(single), abs=0.02)
    assert doubled.n_patients == 15


def test_a_single_patient_has_no_interval() -> None:
    found = compare_paired(sample_of(np.ones((3, 2)), patients=["a", "a"]))
    assert found.estimate == 1.0
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert found.p == 1.0
    nothing = compare_paired(sample_of(np.full((1, 3), np.nan)))
    assert math.isnan(nothing.estimate)
    assert math.isnan(nothing.p)


def test_the_interval_agrees_with_scipy() -> None:
    values = normal(40, mean=0.3, seed=5)
    ours = compare_paired(sample_of(values[None]))
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", random_state=0)
    assert ours.estimate == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.015)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.015)


def test_the_same_seed_gives_the_same_figures_and_another_seed_others() -> None:
    sample = sample_of(normal(3, 20))
    assert compare_paired(sample, seed=7) == compare_paired(sample, seed=7)
    assert compare_paired(sample, seed=7).low != compare_paired(sample, seed=8).low
    assert len(bootstrap_replicates(sample, n_resamples=777)) == 777


def test_a_narrower_level_gives_a_narrower_interval() -> None:
    sample = sample_of(normal(1, 20))
    wide, narrow = compare_paired(sample, level=0.95), compare_paired(sample, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_p_value_and_the_interval_say_the_same() -> None:
    for mean in (0.2, 0.35, 0.5):
        found = compare_paired(sample_of(normal(30, mean=mean, seed=6)[None]))
        if abs(found.p_bootstrap - 0.05) > 0.01:
            assert (found.low > 0) == (found.p_bootstrap < 0.05)


# -------------------------------------------------------------------------------------------------------- sign flips


def test_all_sign_flips_of_few_cases_are_counted() -> None:
    """Five equal differences: only the two flips with one sign reach the observed mean."""
    assert sign_flip_p(sample_of(np.ones((1, 5)))) == 2 / 2**5
    values = np.array([3.0, 1.0, -0.5])
    totals = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in product((1, -1), repeat=3)]
    assert sign_flip_p(sample_of(values[None])) == sum(total >= 3.5 for total in totals) / 8


@pytest.mark.parametrize("n", [8, 40])
def test_sign_flips_agree_with_scipy(n: int) -> None:
    values = normal(n, mean=0.3, seed=9)
    theirs = stats.permutation_test(
        (values, np.zeros(n)), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", vectorized=True
    )
    assert sign_flip_p(sample_of(values[None])) == pytest.approx(theirs.pvalue, abs=1e-12 if n == 8 else 0.015)


def test_sign_flips_use_the_mean_over_the_trainings() -> None:
    """Trainings that contradict each other on every case leave nothing."""
    values = normal(1, 10)
    assert sign_flip_p(sample_of(np.concatenate([values, -values]))) == 1.0
    assert sign_flip_p(sample_of(np.concatenate([values, values]))) == sign_flip_p(sample_of(values))


def test_few_patients_never_give_a_small_p() -> None:
    """The bootstrap alone would say 0.0002."""
    found = compare_paired(sample_of(np.array([[1.0, 1.1, 0.9, 1.2]])))
    assert found.p_bootstrap < 0.001
    assert found.p == found.p_sign_flip == 2 / 2**4


# -------------------------------------------------------------------------------------------------------------- Holm


def test_holm_multiplies_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])


def test_holm_of_one_is_itself_and_of_large_ones_is_one() -> None:
    assert holm([0.2]) == [0.2]
    assert holm([0.7, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_passes_over_what_is_undefined() -> None:
    found = holm([math.nan, 0.01, 0.02])
    assert math.isnan(found[0])
    assert found[1:] == pytest.approx([0.02, 0.02])


def test_holm_rejects_as_its_definition_does() -> None:
    """Step down: the k-th smallest is compared with alpha / (m - k + 1), until the first that fails."""
    p_values = np.random.default_rng(3).uniform(0, 0.1, 8).tolist()
    rejected, still = [False] * 8, True
    for rank, index in enumerate(np.argsort(p_values)):
        still = still and p_values[index] <= 0.05 / (8 - rank)
        rejected[index] = still
    assert [p <= 0.05 for p in holm(p_values)] == rejected
