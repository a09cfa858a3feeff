"""Normalized signed distance maps: closed forms, brute force, and what the loader makes of them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_store import TinyStore, code_image

from autossl.trainers.augmentation import GeometricAugmentation, Geometry
from autossl.trainers.base import BatchRequest, StreamBatch, StreamRequest
from autossl.trainers.batches import BatchMaker, Streams
from autossl.trainers.components.geometry import signed_distance
from toys import toy_architecture, toy_configuration, toy_schema


def brute_force(mask: npt.NDArray[np.bool_], spacing: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """The definition, voxel by voxel."""
    voxels = np.argwhere(np.ones_like(mask)) * np.array(spacing)
    flat = mask.ravel()
    apart = np.linalg.norm(voxels[:, None] - voxels[None], axis=-1)
    out = np.where(flat, 0, apart[:, flat].min(1))
    inside = np.where(flat, apart[:, ~flat].min(1), 0)
    distance = (out / out.max() - inside / inside.max()).reshape(mask.shape)
    for voxel in np.argwhere(mask):
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            neighbor = voxel.copy()
            neighbor[axis] += step
            if 0 <= neighbor[axis] < mask.shape[axis] and not mask[tuple(neighbor)]:
                distance[tuple(voxel)] = 0
    return distance


def test_closed_form_in_one_dimension() -> None:
    distance = signed_distance(np.array([[0, 0, 1, 1, 1]], dtype=bool), (1, 1))
    np.testing.assert_allclose(distance, [[1, 0.5, 0, -2 / 3, -1]], atol=1e-6)


def test_empty_full_and_single_voxel_masks() -> None:
    assert (signed_distance(np.zeros((3, 4), dtype=bool), (1, 1)) == 1).all()
    assert (signed_distance(np.ones((3, 4), dtype=bool), (1, 1)) == -1).all()
    single = np.zeros((5, 5), dtype=bool)
    single[2, 2] = True
    assert signed_distance(single, (1, 1))[2, 2] == 0


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.5, 1.0, 0.7)])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.7, 0.97])
def test_equals_a_brute_force_computation(spacing: tuple[float, ...], density: float) -> None:
    rng = np.random.default_rng(int(100 * density))
    for _ in range(3):
        mask = rng.random((6, 6, 6)) < density
        mask[0, 0, 0], mask[5, 5, 5] = True, False
        distance = signed_distance(mask, spacing)
        np.testing.assert_allclose(distance, brute_force(mask, spacing), atol=1e-6)
        assert np.abs(distance).max() <= 1
        assert mask[distance < 0].all()


def test_spacing_counts_but_not_its_unit() -> None:
    mask = np.zeros((5, 5), dtype=bool)
    mask[2, 2] = True
    distance = signed_distance(mask, (3.0, 1.0))
    assert distance[2, 2] == 0
    assert distance[0, 2] / distance[2, 0] == pytest.approx(3)
    assert distance.max() == distance[0, 0] == 1
    np.testing.assert_allclose(signed_distance(mask, (30.0, 10.0)), distance, atol=1e-6)
    assert not np.allclose(signed_distance(mask, (1.0, 1.0)), distance)


@pytest.mark.parametrize("across", [0, 1, 2])
def test_slice_mode_treats_each_plane_for_itself(across: int) -> None:
    mask = np.zeros((3, 4, 5), dtype=bool)
    mask[0, 1:3, 1:3] = True
    mask[1, 0, 0] = True
    spacing = [1.0, 2.0]
    spacing.insert(across, 9.0)
    distance = signed_distance(np.moveaxis(mask, 0, across), spacing, "slice")
    for plane, found in zip(mask, np.moveaxis(distance, across, 0), strict=True):
        np.testing.assert_array_equal(signed_distance(plane, (1.0, 2.0)), found)
    assert (np.moveaxis(distance, across, 0)[2] == 1).all()


# ------------------------------------------------------------------------------------------------- in the loader


def loaded(
    folder: Path, spacing: tuple[float, ...], augment: bool = True, ignore: bool = False, step: int = 0
) -> StreamBatch:
    """A labeled batch of a case with two blocks, the second beside ignored voxels where asked."""
    shape = (8, 16, 16)
    label = np.zeros(shape, dtype=int)
    label[2:6, 3:9, 3:9] = 1
    label[3:5, 10:14, 8:15] = 2
    if ignore:
        label[:, :2] = 3
    schema = toy_schema(ignore=ignore)
    plan = toy_configuration(3, patch_size=shape, architecture=toy_architecture(3, (4,)), spacing=spacing)
    streams = Streams((TinyStore(folder).labeled("case", code_image(shape), label),))
    maker = BatchMaker(streams, plan, schema, seed=3, augment=augment, signed_distance=True)
    return maker.make(step, BatchRequest(StreamRequest(2, sampler="foreground"), StreamRequest(0))).labeled


@pytest.mark.parametrize(
    "spacing, mode",
    [((1.0, 1.0, 1.0), "full"), ((3.0, 1.0, 1.0), "full"), ((3.1, 1.0, 1.0), "slice"), ((1.0, 1.5, 5.0), "slice")],
)
def test_the_loader_measures_the_augmented_patch_in_the_plans_spacing(
    tmp_path: Path, spacing: tuple[float, ...], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned = Geometry(angles=(0.1, 0.0, 0.4), scale=0.9, flips=(2,))
    monkeypatch.setattr(GeometricAugmentation, "draw", lambda self, seed: replace(turned, flips=(seed % 3,)))
    labeled = loaded(tmp_path, spacing)
    assert labeled.signed_distances is not None
    for row, channel in itertools.product(range(2), range(2)):
        mask = labeled.target[row, 0].numpy() == channel + 1
        assert mask.any()
        expected = signed_distance(mask, spacing, mode)  # type: ignore[arg-type]
        np.testing.assert_array_equal(labeled.signed_distances[row, channel], expected)
    plain = loaded(tmp_path / "plain", spacing, augment=False)
    assert not torch.equal(plain.target, labeled.target)


def test_the_loader_takes_ignored_voxels_as_outside(tmp_path: Path) -> None:
    labeled = loaded(tmp_path, (1.0, 1.0, 1.0), augment=False, ignore=True)
    assert labeled.signed_distances is not None
    assert not labeled.valid.all()
    assert (labeled.signed_distances[~labeled.valid.expand(-1, 2, -1, -1, -1)] > 0).all()
