"""Notes appear where pools differ, with their figures, and not where they are alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from autossl.planners.domain_shift import domain_shift_notes, probability_larger


@dataclass(frozen=True)
class _Case:
    spacing_zyx_mm: tuple[float, float, float] = (2.0, 1.0, 1.0)
    shape_after_crop_zyx: tuple[int, int, int] = (50, 100, 100)
    intensity_quantiles: tuple[tuple[float, ...], ...] = ((0.0, 10.0, 30.0, 50.0, 70.0, 90.0, 100.0),)


def _scaled(center: float, spread: float = 1.0) -> _Case:
    return _Case(intensity_quantiles=(tuple(center + spread * q for q in (-50, -40, -20, 0, 20, 40, 50)),))


def _notes(labeled: list[_Case], unlabeled: list[_Case]) -> list[str]:
    return domain_shift_notes(labeled, unlabeled, {0: "CT"})


def test_equal_pools_and_empty_pools_give_no_note() -> None:
    assert _notes([_Case()] * 4, [_Case()] * 9) == []
    assert _notes([_Case()], []) == []
    assert _notes([], [_Case()]) == []


def test_other_spacing_gives_both_medians_the_factor_and_the_number_outside() -> None:
    other = _Case(spacing_zyx_mm=(5.0, 1.0, 1.0), shape_after_crop_zyx=(20, 100, 100))
    (note,) = _notes([_Case()] * 4, [_Case()] + [other] * 3)
    assert note == (
        "spacing along z: median 2 mm labeled, 5 mm unlabeled (factor 2.50); 3 of 4 unlabeled cases lie more than 1.25 "
        "times beyond the labeled range 2 to 2 mm"
    )


def test_a_minority_outside_the_labeled_range_is_noted() -> None:
    short = _Case(shape_after_crop_zyx=(10, 100, 100))
    assert _notes([_Case()] * 4, [_Case()] * 19 + [short]) == []
    (note,) = _notes([_Case()] * 4, [_Case()] * 8 + [short] * 2)
    assert note.startswith("size along z: median 100 mm labeled, 100 mm unlabeled (factor 1.00); 2 of 10 unlabeled")


def test_slice_axis_of_pictures_is_not_compared() -> None:
    flat = [_Case(spacing_zyx_mm=(999.0, 1, 1), shape_after_crop_zyx=(1, 9, 9))]
    other = [_Case(spacing_zyx_mm=(1.0, 1, 1), shape_after_crop_zyx=(1, 9, 9))]
    assert _notes(flat, other) == []


def test_shifted_intensities_need_clear_separation() -> None:
    ours = [_scaled(c) for c in (98, 100, 102, 104)]
    (note,) = _notes(ours, [_scaled(c) for c in range(120, 130)])
    assert "channel 0 (CT), median intensity: 101 labeled, 124.5 unlabeled" in note
    assert "probability 1.00" in note
    assert _notes(ours, [_scaled(c) for c in range(95, 108)]) == []
    assert _notes(ours[:1], [_scaled(c) for c in range(120, 130)]) == []  # one labeled case proves nothing


def test_scaled_intensities_change_the_spread_only_and_skewed_ones_the_position_of_the_median() -> None:
    (note,) = _notes([_scaled(0, 1)] * 5, [_scaled(0, 2)] * 9)
    assert "spread of intensities (quantile 0.95 - 0.05): 80 labeled, 160 unlabeled" in note
    skewed = _Case(intensity_quantiles=((0.0, 20.0, 30.0, 50.0, 80.0, 100.0, 100.0),))
    (note,) = _notes([_Case()] * 5, [skewed] * 9)
    assert "position of the median" in note
    assert "0.5 labeled, 0.375 unlabeled" in note


def test_probability_larger_counts_ties_half() -> None:
    assert probability_larger(np.array([1.0, 2.0]), np.array([2.0, 3.0])) == pytest.approx(3.5 / 4)
