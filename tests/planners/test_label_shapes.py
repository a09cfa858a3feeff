"""Volumes, components and ellipse fits of shapes whose values are known."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy.ndimage import label

from autossl.data.labels import LabelSchema
from autossl.planners import label_shapes
from autossl.planners.label_shapes import ClassShape, class_shapes, component_sizes, ellipse_dice, steps_for

FLAT = (999.0, 1.0, 1.0)
ISOTROPIC = (1.0, 1.0, 1.0)
Mask = npt.NDArray[np.bool_]


def _ellipsoid(semi_axes_mm: tuple[float, float, float], spacing: tuple[float, float, float]) -> Mask:
    shape = [2 * math.ceil(a / s) + 5 for a, s in zip(semi_axes_mm, spacing, strict=True)]
    grid = np.indices(shape, dtype=float)
    offsets = [
        (grid[i] - (shape[i] - 1) / 2 + 0.3) * spacing[i] / semi_axes_mm[i] for i in range(3)
    ]  # a center off the grid
    result: Mask = np.add.reduce([offset**2 for offset in offsets]) <= 1
    return result


def test_an_ellipse_and_an_anisotropic_ellipsoid_fit_themselves() -> None:
    y, x = np.mgrid[:120, :140]
    turned = ((y - 60 + 0.4 * (x - 70)) / 30) ** 2 + ((x - 70) / 50) ** 2 <= 1
    fit = ellipse_dice(turned[None], FLAT)
    assert fit is not None
    assert fit > 0.995
    fit = ellipse_dice(_ellipsoid((24, 20, 16), (4.0, 1.0, 1.0)), (4.0, 1.0, 1.0))
    assert fit is not None
    assert fit > 0.98


def test_square_and_cube_have_their_closed_form_values() -> None:
    square = np.zeros((1, 400, 400), bool)
    square[0, 100:300, 100:300] = True
    # a disk of radius 1/sqrt(3) about a unit square: four segments stick out
    radius = 1 / math.sqrt(3)
    segment = radius**2 * math.acos(0.5 / radius) - 0.5 * math.sqrt(radius**2 - 0.25)
    expected = 2 * (math.pi * radius**2 - 4 * segment) / (1 + math.pi * radius**2)
    assert ellipse_dice(square, FLAT) == pytest.approx(expected, abs=2e-3)
    cube = np.zeros((50, 50, 50), bool)
    cube[5:45, 5:45, 5:45] = True
    assert ellipse_dice(cube, ISOTROPIC) == pytest.approx(0.836, abs=2e-3)


def test_ellipse_fit_is_measured_in_mm() -> None:
    ball = _ellipsoid((20, 20, 20), (5.0, 1.0, 1.0))
    in_mm, in_voxels = ellipse_dice(ball, (5.0, 1.0, 1.0)), ellipse_dice(ball, ISOTROPIC)
    assert in_mm == pytest.approx(in_voxels, abs=1e-9)  # a ball in mm is an ellipsoid in voxels: both fit
    bent = ball & (np.indices(ball.shape)[0] > ball.shape[0] // 2 - 1)
    assert (ellipse_dice(bent, (5.0, 1.0, 1.0)) or 1) < 0.95


def test_two_far_blobs_are_no_ellipse_and_few_voxels_are_not_measured() -> None:
    blobs = np.zeros((1, 60, 200), bool)
    blobs[0, 20:40, 10:30] = blobs[0, 20:40, 170:190] = True
    assert (ellipse_dice(blobs, FLAT) or 1) < 0.5
    few = np.zeros((1, 9, 9), bool)
    few[0, 4, :9] = few[0, 5, :9] = True
    assert ellipse_dice(few, FLAT) is None
    few[0, 6, :2] = True
    assert ellipse_dice(few, FLAT) is not None


def test_a_thinned_mask_gives_nearly_the_same_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    cube = np.zeros((48, 60, 60), bool)
    cube[6:42, 10:50, 10:50] = True
    whole = ellipse_dice(cube, ISOTROPIC)
    monkeypatch.setattr(label_shapes, "MAX_VOXELS_OF_ELLIPSE", 20_000)
    assert ellipse_dice(cube, ISOTROPIC) == pytest.approx(whole, abs=0.01)


def test_steps_thin_the_longest_axis_or_the_finest() -> None:
    assert steps_for((10, 10, 10), 1000) == (1, 1, 1)
    assert steps_for((10, 10, 40), 1000) == (1, 1, 4)
    assert steps_for((40, 40, 40), 16_000, (1.0, 1.0, 1.0)) == (2, 2, 1)
    assert steps_for((40, 40, 40), 16_000, (5.0, 1.0, 1.0)) == (1, 2, 2)


def test_components_touch_at_corners() -> None:
    mask = np.zeros((2, 4, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[0, 3, 3] = True
    assert component_sizes(mask).tolist() == [2, 1]
    assert component_sizes(np.zeros((2, 2, 2), bool)).tolist() == []


@pytest.mark.parametrize("dims", [2, 3])
def test_components_of_random_shapes_equal_another_labeling(dims: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        shape = (1, *rng.integers(1, 33, size=2)) if dims == 2 else tuple(rng.integers(1, 12, size=3))
        mask = rng.random(shape) < rng.uniform(0.05, 0.9)
        components, _ = label(mask, np.ones((3, 3, 3)))
        assert component_sizes(mask).tolist() == sorted(np.bincount(components.ravel())[1:].tolist(), reverse=True)


def test_class_shapes_of_labels_leave_out_the_ignore_label() -> None:
    schema = LabelSchema({"background": (0,), "a": (1,), "b": (2,), "c": (3,), "ignore": (4,)})
    label_map = np.zeros((6, 8, 8), np.int16)
    label_map[1:4, 1:4, 1:4] = 1
    label_map[5, 7, 7] = 1
    label_map[0, 0, 0] = 2
    label_map[4, 5:7, 5:7] = 4
    shapes = class_shapes(label_map, schema, ISOTROPIC)
    assert list(shapes) == ["a", "b", "c"]
    assert (shapes["a"].voxels, shapes["a"].components, shapes["a"].largest_share) == (28, 2, 27 / 28)
    assert shapes["b"] == ClassShape(1, 1, 1.0, None)
    assert shapes["c"] == ClassShape(0, 0, 0.0, None)


def test_a_region_is_the_union_of_its_values() -> None:
    schema = LabelSchema({"background": (0,), "whole": (1, 2), "core": (2,)}, regions_class_order=(1, 2))
    label_map = np.zeros((3, 6, 6), np.uint8)
    label_map[1, 1:3, 1:5] = 1
    label_map[1, 3, 1:3] = 2
    shapes = class_shapes(label_map, schema, ISOTROPIC)
    assert (shapes["whole"].voxels, shapes["whole"].components) == (10, 1)
    assert (shapes["core"].voxels, shapes["core"].components) == (2, 1)


def test_a_plate_of_one_slice_in_a_volume_is_measured() -> None:
    plate = np.zeros((5, 40, 40), bool)
    y, x = np.mgrid[:40, :40]
    plate[2] = ((y - 20) / 15) ** 2 + ((x - 20) / 10) ** 2 <= 1
    fit = ellipse_dice(plate, (3.0, 1.0, 1.0))
    assert fit is not None
    assert 0.5 < fit < 1  # an ellipsoid of one slice's thickness bulges less than a plate
