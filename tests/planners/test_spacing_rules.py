"""Target spacing, axis order and sizes after resampling: hand-computed examples of nnU-Net v2's rules."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autossl.data.problems import InvalidInput
from autossl.planners.spacing import (
    axis_order,
    check_overwritten_spacing,
    coarser,
    median_resampled_shape,
    resampled_shape,
    target_spacing,
)


def _target(spacings: list[tuple[float, ...]], shapes: list[tuple[int, ...]]) -> tuple[tuple[float, ...], str]:
    decided = target_spacing(np.array(spacings, dtype=float), np.array(shapes, dtype=float))
    return decided.spacing_zyx_mm, decided.why


def test_the_median_per_axis_where_no_axis_is_coarse() -> None:
    spacing, why = _target([(1, 1, 1), (3, 1, 0.5), (2, 4, 0.6)], [(50, 60, 70)] * 3)
    assert spacing == (2, 1, 0.6)
    assert "median of 3 labeled cases" in why


def test_a_coarse_axis_with_few_voxels_gets_the_tenth_percentile() -> None:
    slices = [5, 6, 7, 8, 9, 10, 10, 10, 10, 10, 10]  # 10th percentile of 11 values: the second smallest
    spacing, why = _target([(s, 1.5, 1.5) for s in slices], [(10, 200, 200)] * 11)
    assert spacing == (6, 1.5, 1.5)
    assert "10th percentile, 6 mm" in why


def test_a_percentile_finer_than_the_other_axes_is_raised_just_above_them() -> None:
    spacing, _ = _target([(s, 1.5, 1.5) for s in [1, 1, 1, 10, 10, 10, 10]], [(10, 200, 200)] * 7)
    assert spacing == pytest.approx((1.5 + 1e-5, 1.5, 1.5), abs=1e-12)


@pytest.mark.parametrize(
    ("slice_mm", "n_slices"),
    [(3.0, 10), (10.0, 70)],  # exactly 3 times coarser is not more than 3 times; 70 × 3 is not below 200
)
def test_both_conditions_of_the_coarse_axis_are_strict(slice_mm: float, n_slices: int) -> None:
    slices = [slice_mm / 2] * 2 + [slice_mm] * 9
    assert _target([(s, 1, 1) for s in slices], [(n_slices, 200, 200)] * 11)[0] == (slice_mm, 1, 1)


@pytest.mark.parametrize(
    ("target", "forward", "backward"),
    [
        ((1, 1, 1), (0, 1, 2), (0, 1, 2)),
        ((1, 1, 3), (2, 0, 1), (1, 2, 0)),
        ((1, 3, 1), (1, 0, 2), (1, 0, 2)),
        ((1, 3, 3), (1, 0, 2), (1, 0, 2)),
    ],
)
def test_the_first_of_the_coarsest_axes_comes_first(
    target: tuple[float, ...], forward: tuple[int, ...], backward: tuple[int, ...]
) -> None:
    assert axis_order(target) == (forward, backward)


def test_sizes_after_resampling_are_rounded_half_to_even() -> None:
    assert resampled_shape((5, 7, 10), (1, 1, 3), (2, 2, 2)) == (2, 4, 15)  # 2.5 → 2, 3.5 → 4
    shapes, spacings = np.array([[10, 10, 10], [20, 10, 11]]), np.array([[1.0, 1, 1], [1, 1, 1]])
    assert median_resampled_shape(shapes, spacings, (1, 2, 1)).tolist() == [15, 5, 10.5]


def test_coarser_moves_only_the_fine_axes_until_they_are_within_a_factor_of_two() -> None:
    assert coarser(np.array([5.0, 1, 2.6])).tolist() == [5, 1.03, 2.6]
    assert coarser(np.array([5.0, 1, 2])).tolist() == [5, 1.03, 2.06]
    assert coarser(np.array([2.0, 1, 1])).tolist() == [2.06, 1.03, 1.03]


@pytest.mark.parametrize("spacing", [(1.0, 2.0), (1.0, 0.0, 1.0), (1.0, math.nan, 1.0), (1.0, -2.0, 1.0)])
def test_an_impossible_target_spacing_is_refused(spacing: tuple[float, ...]) -> None:
    with pytest.raises(InvalidInput, match="three positive numbers z y x in mm.*--overwrite_target_spacing"):
        check_overwritten_spacing(spacing)
