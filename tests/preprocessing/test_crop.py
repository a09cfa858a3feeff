"""Cropping to the nonzero region and the mask of it, against scipy's definition of holes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes

from autossl.preprocessing.crop import crop, nonzero_box, nonzero_region


def test_the_box_holds_what_is_nonzero_in_any_channel() -> None:
    image = np.zeros((2, 6, 7, 8), dtype=np.float32)
    image[0, 2, 3, 4] = -1
    image[1, 3, 1, 4] = 5
    box = nonzero_box(image)
    assert box == ((2, 4), (1, 4), (4, 5))
    assert crop(image, box).shape == (2, 2, 3, 1)
    assert crop(image[0], box).sum() == -1


def test_an_empty_image_is_kept_whole() -> None:
    assert nonzero_box(np.zeros((1, 3, 4, 5))) == ((0, 3), (0, 4), (0, 5))
    assert not nonzero_region(np.zeros((1, 3, 4, 5))).any()


@pytest.mark.parametrize("density", [0.3, 0.6, 0.8, 0.95])
def test_holes_are_filled_as_scipy_fills_them_before_or_after_the_crop(density: float) -> None:
    rng = np.random.default_rng(int(100 * density))
    image = np.zeros((2, 11, 12, 13), dtype=np.float32)
    image[:, 2:9, 3:11, :12] = rng.random((2, 7, 8, 12)) < density / 2
    expected = binary_fill_holes((image != 0).any(axis=0))
    np.testing.assert_array_equal(nonzero_region(image), expected)
    box = nonzero_box(image)
    np.testing.assert_array_equal(nonzero_region(crop(image, box)), crop(expected, box))


def test_a_shell_is_filled_and_a_shell_with_a_leak_is_not() -> None:
    image = np.zeros((1, 5, 5, 5), dtype=np.float32)
    image[0, 1:4, 1:4, 1:4] = 1
    image[0, 2, 2, 2] = 0
    assert nonzero_region(image)[2, 2, 2]
    image[0, 1, 2, 2] = 0
    assert not nonzero_region(image)[2, 2, 2]
