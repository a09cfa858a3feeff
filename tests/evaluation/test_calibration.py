"""Closed forms of the calibration error, in one piece and in slabs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from autossl.data.labels import LabelSchema
from autossl.evaluation.calibration import calibration_per_class, nothing_seen, reliability
from autossl.evaluation.class_masks import class_masks

LABELS = LabelSchema({"background": (0,), "organ": (1,), "core": (2,)})
REGIONS = LabelSchema({"background": (0,), "whole": (1, 2), "core": (2,)}, regions_class_order=(1, 2))
WITH_IGNORE = LabelSchema({"background": (0,), "organ": (1,), "ignore": (2,)})


def slabs_of(probabilities: np.ndarray, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, probabilities.shape[1], rows):
        yield start, probabilities[:, start : start + rows]


def test_the_error_is_the_mean_over_voxels_of_what_the_bins_miss() -> None:
    probabilities = np.array([0.9] * 10 + [0.3] * 20)
    inside = np.array([True] * 7 + [False] * 3 + [True] * 6 + [False] * 14)
    assert reliability(probabilities, inside).error == pytest.approx(10 / 30 * 0.2)


def test_sure_and_right_is_0_and_sure_and_wrong_is_1() -> None:
    inside = np.array([True, False, True])
    assert reliability(inside.astype(float), inside).error == 0.0
    assert reliability(1.0 - inside, inside).error == 1.0
    assert math.isnan(nothing_seen().error)


def test_every_bin_holds_the_same_number_of_stored_steps() -> None:
    steps = np.arange(256, dtype=np.float32) / np.float32(255)
    counts = reliability(steps, np.zeros(256, dtype=bool)).counts
    assert counts.tolist() == [17.0] * 14 + [18.0]


def test_probabilities_that_are_frequencies_are_calibrated() -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.random(200_000)
    inside = generator.random(200_000) < probabilities
    assert reliability(probabilities, inside).error < 0.01
    assert reliability(probabilities**3, inside).error > 0.2


def test_parts_add_up() -> None:
    generator = np.random.default_rng(1)
    probabilities, inside = generator.random(100), generator.random(100) > 0.5
    parts = reliability(probabilities[:30], inside[:30]) + reliability(probabilities[30:], inside[30:])
    assert parts.error == pytest.approx(reliability(probabilities, inside).error)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        reliability(np.zeros(3), np.zeros(4, dtype=bool))


@pytest.mark.parametrize("schema", [LABELS, REGIONS, WITH_IGNORE])
@pytest.mark.parametrize("rows", [2, 9])
def test_each_class_is_taken_in_its_own_box_with_its_own_output(schema: LabelSchema, rows: int) -> None:
    generator = np.random.default_rng(2)
    reference = np.zeros((9, 6, 7), dtype=np.uint8)
    reference[3:6, 2:4, 1:5] = generator.integers(0, 3, size=(3, 2, 4))
    probabilities = generator.random((schema.n_outputs, 9, 6, 7))
    boxes = {name: masks.box for name, masks in class_masks(reference, reference, schema)}
    errors = calibration_per_class(slabs_of(probabilities, rows), reference, schema, boxes)
    for number, (name, values) in enumerate(schema.foreground.items()):
        own = probabilities[number + (0 if schema.has_regions else 1)][boxes[name]]
        true = reference[boxes[name]]
        counted = true != (2 if schema is WITH_IGNORE else 9)
        assert errors[name] == pytest.approx(reliability(own[counted], np.isin(true, values)[counted]).error)


def test_a_class_without_voxels_has_no_error() -> None:
    reference = np.zeros((4, 4, 4), dtype=np.uint8)
    reference[1, 1, 1] = 1
    boxes = {name: masks.box for name, masks in class_masks(reference, reference, LABELS)}
    errors = calibration_per_class([(0, np.zeros((3, 4, 4, 4)))], reference, LABELS, boxes)
    assert errors["organ"] == pytest.approx(1 / 27)
    assert math.isnan(errors["core"])
