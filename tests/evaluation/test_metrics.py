"""Closed-form values of the metrics, the empty-mask rule, regions and the ignore label."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autossl.data.labels import LabelSchema
from autossl.evaluation import metrics
from autossl.evaluation.metrics import Confusion, confusion_per_class, dice_per_class, mean_of_defined, score_case

TWO_CLASSES = LabelSchema({"background": (0,), "organ": (1,), "core": (2,)})
WITH_IGNORE = LabelSchema({"background": (0,), "organ": (1,), "ignore": (2,)})
REGIONS = LabelSchema({"background": (0,), "whole": (1, 2), "core": (2,)}, regions_class_order=(1, 2))


def label_map(*values: int, dtype: type = np.uint8) -> np.ndarray:
    return np.array(values, dtype=dtype).reshape(1, 1, -1)


def test_counts_dice_iou_and_volumes_have_their_closed_form() -> None:
    prediction = label_map(1, 1, 1, 0, 2, 2)
    reference = label_map(1, 1, 0, 1, 2, 0)
    scores = score_case(prediction, reference, TWO_CLASSES, voxel_volume_mm3=500.0)
    assert scores["organ"].confusion == Confusion(true_positive=2, false_positive=1, false_negative=1)
    assert scores["core"].confusion == Confusion(true_positive=1, false_positive=1, false_negative=0)
    assert scores["organ"].metrics["dice"] == pytest.approx(2 / 3)
    assert scores["organ"].metrics["iou"] == pytest.approx(1 / 2)
    assert scores["core"].metrics["volume_error_relative"] == pytest.approx(1.0)
    assert scores["core"].metrics["volume_difference_ml"] == pytest.approx(0.5)
    assert tuple(scores["core"].metrics) == metrics.METRICS


def test_both_masks_empty_leave_every_metric_undefined() -> None:
    scores = score_case(label_map(0, 1), label_map(0, 1), TWO_CLASSES, 1.0)["core"]
    assert all(math.isnan(value) for value in scores.metrics.values())


def test_a_false_alarm_scores_zero_and_has_no_relative_volume_error() -> None:
    scores = score_case(label_map(0, 2, 2), label_map(0, 0, 0), TWO_CLASSES, 1000.0)["core"].metrics
    assert (scores["dice"], scores["iou"], scores["volume_difference_ml"]) == (0.0, 0.0, 2.0)
    assert math.isnan(scores["volume_error_relative"])


def test_a_miss_scores_zero_and_loses_the_whole_volume() -> None:
    scores = score_case(label_map(0, 0, 0), label_map(0, 2, 2), TWO_CLASSES, 1000.0)["core"].metrics
    assert (scores["dice"], scores["volume_error_relative"], scores["volume_difference_ml"]) == (0.0, -1.0, -2.0)


def test_ignored_reference_voxels_count_nowhere() -> None:
    counts = confusion_per_class(label_map(1, 1, 1, 0), label_map(1, 2, 2, 2), WITH_IGNORE)
    assert counts == {"organ": Confusion(true_positive=1, false_positive=0, false_negative=0)}


def test_a_predicted_ignore_value_counts_as_background() -> None:
    counts = confusion_per_class(label_map(2, 1), label_map(1, 1), WITH_IGNORE)
    assert counts["organ"] == Confusion(true_positive=1, false_positive=0, false_negative=1)


def test_a_region_is_scored_as_the_union_of_its_values() -> None:
    scores = dice_per_class(label_map(1, 2, 0, 0), label_map(2, 2, 1, 0), REGIONS)
    assert scores == {"whole": pytest.approx(2 * 2 / (2 + 3)), "core": pytest.approx(2 / 3)}


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32])
@pytest.mark.parametrize("role", ["prediction", "reference"])
def test_an_undeclared_value_is_refused_by_its_number(role: str, dtype: type) -> None:
    maps = {"prediction": label_map(0, 1, dtype=dtype), "reference": label_map(0, 1, dtype=dtype)}
    maps[role] = label_map(0, 7, dtype=dtype)
    with pytest.raises(ValueError, match=rf"the {role} holds \[7\], declared are \[0, 1, 2\]"):
        dice_per_class(maps["prediction"], maps["reference"], TWO_CLASSES)


def test_a_negative_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"holds \[-1\]"):
        dice_per_class(label_map(0, -1, dtype=np.int16), label_map(0, 1), TWO_CLASSES)


def test_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        dice_per_class(label_map(0, 1), label_map(0, 1, 1), TWO_CLASSES)


def test_slabs_give_the_same_counts_as_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    prediction, reference = generator.integers(0, 3, size=(2, 5, 7, 3))
    whole = confusion_per_class(prediction, reference, TWO_CLASSES)
    monkeypatch.setattr(metrics, "SLAB_VOXELS", 11)
    assert confusion_per_class(prediction, reference, TWO_CLASSES) == whole
    assert whole["core"].n_reference == int((reference == 2).sum())
    assert whole["core"].n_prediction == int((prediction == 2).sum())
    assert whole["core"].true_positive == int(((prediction == 2) & (reference == 2)).sum())


def test_means_leave_out_what_is_undefined_and_count_it() -> None:
    assert mean_of_defined([0.5, math.nan, 1.0]) == (0.75, 2)
    mean, number = mean_of_defined([math.nan])
    assert math.isnan(mean)
    assert number == 0
