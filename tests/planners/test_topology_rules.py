"""Pooling, kernels and the patch: examples from the reference that were measured with the real planner."""

from __future__ import annotations

import math

import pytest

from autossl.planners.topology import derive_topology, shrink_to_fit, start_patch


def test_hippocampus() -> None:
    topology = derive_topology((1, 1, 1), (36, 50, 35))
    assert topology.patch_size == (40, 56, 40)
    assert topology.strides == ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    assert topology.kernel_sizes == ((3, 3, 3),) * 4


def test_a_patch_is_padded_up_beyond_a_median_image_of_half_voxels() -> None:
    assert derive_topology((1, 1, 1), (50, 103.5, 103.5)).patch_size == (56, 112, 112)


def test_a_coarse_axis_is_neither_pooled_nor_convolved_until_the_others_are_as_coarse() -> None:
    topology = derive_topology((6, 1, 1), (23, 249.5, 200.5))
    assert topology.patch_size == (24, 256, 224)
    assert topology.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
    assert topology.kernel_sizes == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))


@pytest.mark.parametrize(("edge", "poolings"), [(7, 0), (8, 1), (14, 1), (15, 2), (16, 2)])
def test_two_equal_axes_are_pooled_from_eight_voxels(edge: int, poolings: int) -> None:
    assert derive_topology((1, 1), (edge, edge)).divisors == (2**poolings,) * 2


@pytest.mark.parametrize(("edge", "poolings"), [(11, 0), (12, 1), (22, 1), (23, 2)])
def test_an_axis_alone_is_pooled_from_twelve_voxels(edge: int, poolings: int) -> None:
    assert derive_topology((1, 1), (4, edge)).divisors == (1, 2**poolings)


def test_the_start_patch_follows_the_spacing_and_ends_at_the_median_image() -> None:
    assert start_patch((1, 1, 1), (1000, 1000, 100)) == (256, 256, 100)
    assert start_patch((2, 1, 1), (1000, 1000, 1000)) == (
        161,
        323,
        323,
    )  # 256 × (4)^(1/3) / 2 and 256 × 4^(1/3) / 2 × 2
    assert start_patch((1, 1), (5000, 300)) == (2048, 300)


def test_shrinking_takes_the_divisor_of_the_smaller_patch() -> None:
    topology, reductions = shrink_to_fit((1, 1), (256, 256), lambda t: t.voxels > 256 * 255)
    # 256 has divisor 64, 192 has 32: so 224 and not 192; the last of equal axes goes first
    assert topology.patch_size == (256, 224)
    assert reductions == 1


def test_shrinking_takes_the_axis_that_covers_most_of_the_image() -> None:
    topology, _ = shrink_to_fit((1, 1), (512, 128), lambda t: t.patch_size[1] == 128)
    assert topology.patch_size[0] == 512
    topology, _ = shrink_to_fit((1, 1), (100, 64), lambda t: t.voxels > 112 * 63)  # 100 is padded to 112: 112 % is most
    assert topology.patch_size == (96, 64)


def test_shrinking_ends_at_the_smallest_patch_and_says_so() -> None:
    topology, _ = shrink_to_fit((1, 1, 1), (1, 200, 200), lambda t: math.prod(t.patch_size) > 40)
    assert topology.patch_size[0] == 1
    with pytest.raises(ValueError, match="cannot be reduced any further"):
        shrink_to_fit((1, 1), (20, 20), lambda t: True)
