"""Resampling: equal to scikit-image's and batchgenerators' resize, which nnU-Net v2 uses, and to closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from batchgenerators.augmentations.utils import resize_segmentation
from scipy.ndimage import map_coordinates
from skimage.transform import resize

from autossl.preprocessing.resample import find_coarse_axis, resample_image, resample_label_map, target_shape

SHAPES = [
    ((9, 14, 11), (12, 9, 11)),
    ((5, 70, 6), (5, 150, 9)),
    ((1, 20, 30), (1, 33, 17)),
    ((7, 1, 4), (3, 2, 9)),
    ((12, 10, 8), (6, 20, 16)),
    ((2, 3, 2), (1, 1, 1)),
]


@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_images_equal_scikit_image(old: tuple[int, ...], new: tuple[int, ...], order: int) -> None:
    image = np.random.default_rng(1).normal(size=(2, *old)).astype(np.float32)
    expected = [resize(c.astype(float), new, order, mode="edge", clip=True, anti_aliasing=False) for c in image]
    found = resample_image(image, new, order)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("slices", [3, 6, 13])
def test_a_coarse_axis_takes_whole_slices_that_were_resized_and_clipped_alone(axis: int, slices: int) -> None:
    rng = np.random.default_rng(2)
    shape = [9, 12, 7]
    shape[axis] = 6
    image = rng.normal(size=shape) * rng.uniform(1, 50, [6 if a == axis else 1 for a in range(3)])
    new = [13, 8, 10]
    new[axis] = slices
    in_plane = [n for a, n in enumerate(new) if a != axis]
    planes = [resize(p, in_plane, 3, mode="edge", anti_aliasing=False) for p in np.moveaxis(image, axis, 0)]
    places = np.mgrid[tuple(slice(0, n) for n in new)].astype(float)
    places[axis] = 6 / slices * (places[axis] + 0.5) - 0.5
    expected = map_coordinates(np.stack(planes, axis), places, order=0, mode="nearest")
    found = resample_image(image[None], new, 3, coarse_axis=axis)[0]
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_a_cubic_spline_does_not_leave_the_range_of_its_input() -> None:
    step = np.zeros((1, 4, 4, 20), dtype=np.float32)
    step[..., 10:] = 1
    found = resample_image(step, (4, 4, 47))
    assert found.min() == 0
    assert found.max() == 1
    overshooting = np.concatenate([step, 5 * step])[:, :1].reshape(1, 2, 4, 20)
    per_slice = resample_image(overshooting, (2, 4, 47), coarse_axis=0)
    assert per_slice[0, 0].max() == 1
    assert per_slice[0, 1].max() == 5


def test_a_ramp_stays_a_ramp_away_from_the_borders() -> None:
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32), (1, 3, 4, 40))
    found = resample_image(ramp, (3, 4, 100))[0, 1, 2]
    expected = (np.arange(100) + 0.5) * 0.4 - 0.5
    np.testing.assert_allclose(found[30:70], expected[30:70], atol=1e-4)


def test_a_constant_stays_that_constant() -> None:
    found = resample_image(np.full((1, 5, 6, 7), 3.25, dtype=np.float32), (9, 4, 11))
    assert (found == 3.25).all()


def test_an_unchanged_shape_is_no_work() -> None:
    image, label = np.ones((1, 3, 4, 5), dtype=np.float32), np.ones((3, 4, 5), dtype=np.int8)
    assert resample_image(image, (3, 4, 5)) is image
    assert resample_label_map(label, (3, 4, 5)) is label


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_label_maps_equal_batchgenerators_voxel_by_voxel(
    old: tuple[int, ...], new: tuple[int, ...], block: int
) -> None:
    for seed in range(4):
        label = np.random.default_rng(seed).integers(0, 2 + 2 * seed, old).astype(np.int16)
        for axis in range(3):
            label = label.repeat(block, axis=axis)
        expected = resize_segmentation(label.astype(float), new, 1)
        found = resample_label_map(label, new)
        assert found.dtype == label.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("order", [0, 1])
def test_label_maps_with_a_coarse_axis_are_resized_slice_by_slice(order: int) -> None:
    label = np.random.default_rng(3).integers(0, 4, (5, 9, 8)).astype(np.int8)
    planes = np.stack([resize_segmentation(plane.astype(float), (13, 5), order) for plane in label])
    expected = planes[[0, 1, 1, 2, 3, 3, 4]]
    np.testing.assert_array_equal(resample_label_map(label, (7, 13, 5), order, coarse_axis=0), expected)


def test_ties_between_labels_go_to_the_nearest_voxel_else_to_the_smaller_label() -> None:
    halves = np.array([2, 1], dtype=np.int8).reshape(1, 1, 2)
    assert (
        resample_label_map(halves, (1, 1, 1)).item() == resize_segmentation(halves.astype(float), (1, 1, 1), 1).item()
    )
    block = np.array([3, 1, 1, 1, 2, 2, 2, 3], dtype=np.int8).reshape(2, 2, 2)
    assert resample_label_map(block, (1, 1, 1)).item() == 1


def test_labels_of_other_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="order 3 for a label map"):
        resample_label_map(np.zeros((2, 2, 2), dtype=np.int8), (3, 3, 3), order=3)


@pytest.mark.parametrize(
    ("shape", "spacing", "target", "expected"),
    [
        ((35, 51, 35), (1, 1, 1), (1.2, 0.8, 1.0), (29, 64, 35)),
        ((5, 5, 7), (1, 1, 1), (2, 2, 2), (2, 2, 4)),
        ((10, 10, 10), (3.0, 0.5, 0.7), (3.0, 0.5, 0.7), (10, 10, 10)),
    ],
)
def test_target_shapes_round_half_to_even(shape: Any, spacing: Any, target: Any, expected: Any) -> None:
    assert target_shape(shape, spacing, target) == expected


@pytest.mark.parametrize(
    ("spacing", "target", "force", "expected"),
    [
        ((1, 1, 1), (1, 1, 1), None, None),
        ((3.0, 1, 1), (1, 1, 1), None, None),
        ((3.01, 1, 1), (1, 1, 1), None, 0),
        ((1, 1, 1), (1, 5, 1), None, 1),
        ((1, 1, 4), (5, 1, 1), None, 2),
        ((0.2, 1, 1), (5, 1, 1), None, None),
        ((999, 1, 1), (999, 1, 1), None, 0),
        ((4, 1, 1), (4, 1, 1), False, None),
        ((1, 1, 1.1), (1, 1, 1), True, 2),
        ((1, 1, 1), (2, 1, 1), True, None),
    ],
)
def test_the_coarse_axis_is_the_one_that_nnunet_separates(
    spacing: Any, target: Any, force: bool | None, expected: int | None
) -> None:
    assert find_coarse_axis(spacing, target, force) == expected
