"""Geometry moves everything of a patch alike; intensity moves nothing."""

# ruff: noqa: NPY002 -- the global generators are what is tested

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch

from autossl.trainers.augmentation import (
    GeometricAugmentation,
    Geometry,
    IntensityAugmentation,
    PatchArrays,
    default_augmentation,
    mask_outside,
    seeded,
)
from autossl.trainers.sampling import initial_patch
from toys import toy_architecture, toy_configuration


def global_draws() -> tuple[float, float, float]:
    """One number of each global generator; puts the generators back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = random.random(), float(np.random.normal()), float(torch.rand(1))
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return drawn


def arrays(shape: tuple[int, ...], seed: int = 0) -> PatchArrays:
    """Smooth image, a three-valued label that follows from it, and the image again as a scalar map."""
    generator = torch.Generator().manual_seed(seed)
    mode = "bilinear" if len(shape) == 2 else "trilinear"
    coarse = torch.rand(1, 1, *[4] * len(shape), generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=shape, mode=mode)[0]
    label = (image[0] > 0.4).to(torch.int8) + (image[0] > 0.6).to(torch.int8)
    return PatchArrays(image, {"label": label, "ones": torch.ones_like(label)}, {"same": image[0].clone()})


# --------------------------------------------------------------------------------------------------------------- seeds


def test_seeded_repeats_draws_and_puts_the_global_generators_back():
    np.random.normal()  # leaves a cached second normal number in numpy's state
    before = global_draws()
    with seeded(2**62 + 5):
        first = global_draws()
        np.random.normal(size=3)
        torch.rand(7)
        random.random()
    with seeded(2**62 + 5):
        second = global_draws()
    with seeded(6):
        other = global_draws()
    assert global_draws() == before
    assert first == second != other


def test_seeded_puts_them_back_after_an_error():
    before = global_draws()
    with pytest.raises(RuntimeError), seeded(1):
        torch.rand(-1)
    assert global_draws() == before


# ------------------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("patch", [(8, 10), (6, 8, 10)])
def test_flips_move_image_label_and_scalars_exactly_alike(patch):
    augmentation = GeometricAugmentation(patch, tuple(range(len(patch))))
    source = arrays(patch)
    for n in range(len(patch) + 1):
        for flips in itertools.combinations(range(len(patch)), n):
            moved = augmentation.apply(Geometry(flips=flips), source)
            index = tuple(slice(None, None, -1 if axis in flips else 1) for axis in range(len(patch)))
            np.testing.assert_array_equal(moved.image[0], source.image[0].numpy()[index])
            np.testing.assert_array_equal(moved.maps["label"], source.maps["label"].numpy()[index])
            np.testing.assert_array_equal(moved.scalars["same"], moved.image[0])


def test_a_quarter_turn_in_plane_is_a_rotation_of_the_array():
    augmentation = GeometricAugmentation((8, 8), ())
    source = arrays((12, 12))
    moved = augmentation.apply(Geometry(angles=(0.0, math.pi / 2)), source)
    inner = source.image[0, 2:10, 2:10]
    np.testing.assert_allclose(moved.image[0], torch.rot90(inner, -1, (0, 1)), atol=1e-5)
    np.testing.assert_array_equal(moved.maps["label"], torch.rot90(source.maps["label"][2:10, 2:10], -1, (0, 1)))


@pytest.mark.parametrize("angles, plane", [((math.pi / 2, 0, 0), (1, 2)), ((0, 0, math.pi / 2), (0, 1))])
def test_quarter_turns_in_3d_turn_about_their_axis(angles, plane):
    source = arrays((8, 8, 8))
    moved = GeometricAugmentation((8, 8, 8), ()).apply(Geometry(angles=angles), source)
    np.testing.assert_allclose(moved.image[0], torch.rot90(source.image[0], -1, plane), atol=1e-5)


def test_scaling_above_one_shrinks_things_and_shows_what_lies_outside():
    source = PatchArrays(torch.ones(1, 8, 8), {"inside": torch.ones(8, 8, dtype=torch.uint8)}, {})
    moved = GeometricAugmentation((8, 8), ()).apply(Geometry(scale=2.0), source)
    expected = torch.zeros(8, 8, dtype=torch.int16)
    expected[2:6, 2:6] = 1
    assert torch.equal(moved.maps["inside"], expected)
    assert torch.equal(moved.image[0], expected.float())


def test_a_flat_patch_is_turned_slice_by_slice():
    augmentation = GeometricAugmentation((2, 8, 8), ())
    source = arrays((2, 12, 12))
    moved = augmentation.apply(Geometry(angles=(0.0, math.pi / 2)), source)
    assert augmentation.dummy_2d
    for z in range(2):
        np.testing.assert_allclose(moved.image[0, z], torch.rot90(source.image[0, z, 2:10, 2:10], -1), atol=1e-5)
        np.testing.assert_array_equal(moved.maps["label"][z], torch.rot90(source.maps["label"][z, 2:10, 2:10], -1))


def test_labels_and_scalars_follow_the_image_under_rotation_and_scaling():
    augmentation = GeometricAugmentation((24, 24, 24), (0, 1, 2))
    source = arrays(initial_patch((24, 24, 24)))
    moved = augmentation.apply(Geometry((0.4, -0.3, 0.2), 0.8, (0, 2)), source)
    from_image = (moved.image[0] > 0.4).to(torch.int16) + (moved.image[0] > 0.6).to(torch.int16)
    assert (from_image == moved.maps["label"]).float().mean() > 0.97
    assert torch.equal(moved.scalars["same"], moved.image[0])
    assert moved.maps["ones"].all()


def test_draws_have_nnunets_frequencies_and_ranges():
    augmentation = GeometricAugmentation((16, 16, 16), (0, 2))
    drawn = [augmentation.draw(seed) for seed in range(2000)]
    assert drawn[:20] == [augmentation.draw(seed) for seed in range(20)]
    assert np.mean([bool(g.angles) for g in drawn]) == pytest.approx(0.2, abs=0.03)
    assert np.mean([g.scale != 1 for g in drawn]) == pytest.approx(0.2, abs=0.03)
    assert np.mean([2 in g.flips for g in drawn]) == pytest.approx(0.5, abs=0.04)
    assert {axis for g in drawn for axis in g.flips} == {0, 2}
    angles = np.array([g.angles for g in drawn if g.angles])
    scales = [g.scale for g in drawn if g.scale != 1]
    assert np.abs(angles).max() <= math.pi / 6
    assert np.ptp(angles) > math.pi / 4
    assert min(scales) >= 0.7
    assert max(scales) <= 1.4


# ----------------------------------------------------------------------------------------------------------- intensity


def test_intensities_are_a_function_of_the_seed_and_leave_source_and_generators_alone():
    augmentation = IntensityAugmentation((12, 12))
    image = torch.randn(2, 12, 12)
    kept, before = image.clone(), global_draws()
    first = [augmentation.apply(image, seed) for seed in range(60)]
    second = [augmentation.apply(image, seed) for seed in range(60)]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(image, kept)
    assert global_draws() == before
    unchanged = np.mean([torch.equal(changed, image) for changed in first])
    assert 0.1 < unchanged < 0.45  # nothing at all is drawn for a quarter of the patches


def test_intensities_move_nothing():
    """The center of a bright block stays where it is, on average; low resolution may shift it by part of a voxel."""
    augmentation = IntensityAugmentation((16, 16))
    image = torch.zeros(1, 16, 16)
    image[0, 4:8, 8:14] = 5
    shifts = []
    for seed in range(300):
        weights = augmentation.apply(image, seed)[0].clamp(min=1) - 1
        weights /= weights.sum()
        center = weights.sum(1) @ torch.arange(16.0), weights.sum(0) @ torch.arange(16.0)
        shifts.append((float(center[0]) - 5.5, float(center[1]) - 10.5))
    assert np.abs(shifts).max() < 1
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.05


@pytest.mark.parametrize("patch", [(1, 12, 12), (2, 16, 3), (12, 2)])
def test_axes_of_few_voxels_are_no_trouble(patch):
    architecture = toy_architecture(len(patch), (4,))
    augmentation = default_augmentation(toy_configuration(len(patch), patch_size=patch, architecture=architecture))
    image = torch.randn(1, *patch)
    for seed in range(100):
        assert augmentation.intensity.apply(image, seed).isfinite().all()


def test_masking_spares_other_channels_and_the_inside():
    image, nonzero = torch.ones(2, 3, 3), torch.zeros(3, 3, dtype=torch.uint8)
    nonzero[1, 1] = 1
    mask_outside(image, nonzero, (False, True))
    assert image[0].sum() == 9
    assert image[1].sum() == 1
    assert image[1, 1, 1] == 1
