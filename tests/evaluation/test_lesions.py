"""Components are paired one to one, whatever their size."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autossl.evaluation.class_masks import ClassMasks, box_around
from autossl.evaluation.lesions import LesionCounts, count_lesions, lesion_metrics


def line(*runs: tuple[int, int], length: int = 40) -> np.ndarray:
    """[1,1,length] with voxels first..last-1 of each run."""
    mask = np.zeros((1, 1, length), dtype=bool)
    for first, last in runs:
        mask[..., first:last] = True
    return mask


def f1_of(prediction: np.ndarray, reference: np.ndarray, ignored: np.ndarray | None = None) -> float:
    return lesion_metrics(ClassMasks(prediction, reference, ignored, box_around(prediction)))["lesion_f1"]


def test_found_missed_and_invented_lesions_are_counted() -> None:
    reference = line((0, 10), (12, 14), (20, 25))
    prediction = line((1, 9), (12, 14), (30, 39))
    assert count_lesions(prediction, reference) == LesionCounts(2, 1, 1)
    assert f1_of(prediction, reference) == pytest.approx(4 / 6)


def test_one_prediction_over_two_lesions_finds_one_of_them() -> None:
    assert count_lesions(line((0, 20)), line((0, 9), (11, 20))) == LesionCounts(1, 0, 1)


def test_two_predictions_in_one_lesion_find_it_once() -> None:
    assert count_lesions(line((0, 9), (11, 20)), line((0, 20))) == LesionCounts(1, 1, 0)


def test_the_largest_overlap_is_paired_first() -> None:
    # the first prediction overlaps both lesions; the second lesion is left for the second prediction
    prediction, reference = line((0, 12), (14, 20)), line((0, 10), (11, 20))
    assert count_lesions(prediction, reference) == LesionCounts(2, 0, 0)


@pytest.mark.parametrize(("stop", "found"), [(10, 1), (9, 0)])
def test_an_iou_of_a_tenth_is_enough(stop: int, found: int) -> None:
    reference = np.zeros((1, 10, 10), dtype=bool)
    reference[:] = True
    prediction = np.zeros_like(reference)
    prediction.ravel()[:stop] = True
    assert count_lesions(prediction, reference).true_positive == found


def test_voxels_that_touch_at_a_corner_are_one_lesion() -> None:
    mask = np.zeros((2, 2, 2), dtype=bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    assert count_lesions(mask, mask) == LesionCounts(1, 0, 0)
    assert count_lesions(mask[:, :, 0] | mask[:, :, 1], mask[:, :, 0] | mask[:, :, 1]) == LesionCounts(1, 0, 0)


def test_no_lesion_on_either_side_is_undefined_and_on_one_side_zero() -> None:
    assert math.isnan(f1_of(line(), line()))
    assert f1_of(line((1, 3)), line()) == f1_of(line(), line((1, 3))) == 0.0


def test_ignored_voxels_are_in_no_lesion() -> None:
    prediction, reference = line((0, 5), (10, 15)), line((0, 5))
    assert f1_of(prediction, reference) == pytest.approx(2 / 3)
    assert f1_of(prediction, reference, ignored=line((9, 16))) == 1.0
