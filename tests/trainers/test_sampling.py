"""Where patches lie."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autossl.trainers.sampling import (
    PatchSizes,
    Place,
    choose_voxel,
    initial_patch,
    is_dummy_2d,
    is_forced_foreground,
    patch_sizes,
    place_around,
    rotation_limit,
    start_bounds,
    uniform_place,
)


@pytest.mark.parametrize(
    "patch, expected",
    [  # nnU-Net 2.8.1's get_patch_size, called with its own rotation limits
        ((40, 56, 40), (73, 80, 64)),
        ((48, 48, 48), (77, 77, 77)),
        ((112, 112, 80), (179, 161, 147)),
        ((20, 40, 60), (43, 76, 72)),
        ((16, 256, 224), (16, 301, 301)),
        ((56, 40), (65, 65)),
        ((128, 128), (150, 150)),
        ((128, 64), (164, 75)),
        ((64, 40), (84, 47)),
    ],
)
def test_initial_patch_is_nnunets(patch, expected):
    assert initial_patch(patch) == expected


def test_flat_patches_turn_in_plane_only():
    assert is_dummy_2d((16, 64, 48))
    assert not is_dummy_2d((16, 48, 48))
    assert not is_dummy_2d((16, 64))
    limits = [rotation_limit(p) for p in ((16, 64, 48), (16, 48, 48), (64, 40), (64, 48))]
    assert limits == pytest.approx([math.pi, math.pi / 6, math.pi / 12, math.pi])


def test_a_2d_patch_is_one_slice_thick():
    sizes = patch_sizes((56, 40))
    assert sizes == PatchSizes((1, 56, 40), (1, 65, 65))
    assert sizes.offset == (0, 4, 12)
    assert patch_sizes((56, 40), room_for_rotation=False) == PatchSizes((1, 56, 40), (1, 56, 40))


@pytest.mark.parametrize("count, forced", [(2, [1]), (3, [2]), (9, [6, 7, 8]), (24, list(range(16, 24)))])
def test_the_last_third_is_forced_foreground(count, forced):
    assert [i for i in range(count) if is_forced_foreground(i, count, 0.999)] == forced


def test_a_single_sample_is_forced_now_and_then():
    assert is_forced_foreground(0, 1, 0.32)
    assert not is_forced_foreground(0, 1, 0.34)


def test_bounds_let_the_patch_touch_the_borders_of_a_large_case():
    sizes = PatchSizes((4, 6, 8), (6, 6, 12))
    lower, upper = start_bounds((20, 20, 20), sizes)
    finals = [Place(edge, sizes).final_start for edge in (lower, upper)]
    assert finals == [(0, 0, 0), (16, 14, 12)]


def test_a_small_case_lies_in_the_middle_of_the_patch():
    sizes = PatchSizes((16, 16, 16), (16, 16, 16))
    lower, upper = start_bounds((10, 9, 16), sizes)
    assert lower == (-3, -4, 0)
    assert upper == (-3, -3, 0)


def test_uniform_places_reach_every_start_and_every_slice():
    sizes = PatchSizes((1, 4, 4), (1, 4, 4))
    rng = np.random.default_rng(0)
    starts = {uniform_place(rng, (3, 5, 4), sizes).start for _ in range(200)}
    assert starts == {(z, y, 0) for z in range(3) for y in range(2)}


def test_the_chosen_voxel_is_in_the_final_patch_wherever_it_lies():
    rng = np.random.default_rng(0)
    for _ in range(500):
        dims = int(rng.integers(2, 4))
        sizes = patch_sizes(tuple(rng.integers(4, 30, size=dims).tolist()))
        shape = tuple(rng.integers(3, 50, size=3).tolist())
        voxel = tuple(int(rng.integers(n)) for n in shape)
        start = place_around(voxel, shape, sizes).final_start
        assert all(s <= v < s + f for s, v, f in zip(start, voxel, sizes.final, strict=True))


def test_places_center_the_voxel_but_begin_in_the_case():
    sizes = PatchSizes((4, 4, 4), (6, 6, 6))
    assert place_around((10, 11, 12), (20, 20, 20), sizes).final_start == (8, 9, 10)
    assert place_around((0, 1, 19), (20, 20, 20), sizes).final_start == (0, 0, 17)


def test_classes_are_chosen_evenly_among_those_present():
    locations = {"large": np.zeros((900, 3), int), "absent": np.zeros((0, 3), int), "small": np.ones((1, 3), int)}
    rng = np.random.default_rng(0)
    drawn = [choose_voxel(rng, locations) for _ in range(400)]
    assert 150 < drawn.count((1, 1, 1)) < 250
    assert drawn.count((1, 1, 1)) + drawn.count((0, 0, 0)) == 400
    assert choose_voxel(rng, {"absent": np.zeros((0, 3), int)}) is None


def test_centers_are_fractions_of_the_case():
    sizes = PatchSizes((2, 4, 4), (4, 4, 4))
    assert Place((0, 2, 6), sizes).center((4, 8, 10)) == (0.5, 0.5, 0.8)
    assert Place((-5, 0, 9), sizes).center((4, 8, 10)) == (0, 0.25, 1)
