"""For any grid: crop, resample and restore end where they began, and tiles cover every voxel with a positive weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_plans

from autossl.data.geometry import Geometry
from autossl.data.image_io import LoadedImage
from autossl.data.labels import LabelSchema
from autossl.inference.predictor import Slab
from autossl.inference.preprocessed import original_grid
from autossl.inference.restore import restore
from autossl.inference.tiles import tile_groups, tile_starts, tile_weights
from autossl.planners.plans import Plans
from autossl.preprocessing.prepare import prepare_case

THOROUGHLY = settings(max_examples=60, deadline=None, database=None, derandomize=True)
LABELS = LabelSchema({"background": (0,), "organ": (1,), "tumor": (2,)})

shapes = st.tuples(*[st.integers(1, 9)] * 3)
spacings = st.tuples(*[st.sampled_from([0.5, 0.7, 1.0, 2.0, 5.0])] * 3)
orders = st.permutations(range(3))


def image_of(shape: tuple[int, int, int], spacing: tuple[float, float, float], margin: int, seed: int) -> LoadedImage:
    """Positive numbers with a margin of zeros where there is room for one."""
    array = np.zeros((1, *shape), np.float32)
    inner = tuple(slice(margin, n - margin) if n > 2 * margin else slice(None) for n in shape)
    array[(0, *inner)] = 1 + np.random.default_rng(seed).random(array[(0, *inner)].shape)
    z, y, x = spacing
    geometry = Geometry("natural", shape[::-1], (x, y, z), (0, 0, 0), tuple(np.eye(3).ravel()), spacing)
    return LoadedImage(array, (geometry,))


def plans_for(order: list[int], target: tuple[float, float, float]) -> Plans:
    content = tiny_plans().to_json()
    content["transpose_forward"] = order
    content["transpose_backward"] = [order.index(axis) for axis in range(3)]
    content["configurations"]["3d_fullres"]["spacing"] = target
    return Plans.model_validate(content)


@THOROUGHLY
@given(shapes, spacings, spacings, orders, st.integers(0, 2), st.integers(0, 99))
def test_restoring_ends_on_the_original_grid(
    shape: tuple[int, int, int], spacing: Any, target: Any, order: list[int], margin: int, seed: int
) -> None:
    image = image_of(shape, spacing, margin, seed)
    kept = [n - 2 * margin if n > 2 * margin else n for n in shape]
    if min(round(spacing[axis] / new * kept[axis]) for axis, new in zip(order, target, strict=True)) < 1:
        return  # refused, as test_prepare shows
    prepared = prepare_case(image, None, plans_for(order, target), "3d_fullres")
    properties = prepared.properties
    logits = torch.zeros(1, 3, *properties.shape)
    logits[:, 1] = 1
    restored = restore([Slab(0, logits)], properties.shape, original_grid(properties), LABELS, "softmax")
    assert restored.label_map.shape == shape
    outside = np.ones(shape, bool)
    box = tuple(slice(*properties.crop_box[properties.transpose_forward.index(axis)]) for axis in range(3))
    outside[box] = False
    np.testing.assert_array_equal(restored.label_map, np.where(outside, 0, 1))
    assert not (outside & (image.array[0] != 0)).any()


@THOROUGHLY
@given(shapes, spacings, orders, st.integers(0, 2), st.integers(0, 99))
def test_on_its_own_spacing_a_label_comes_back_voxel_for_voxel(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], order: list[int], margin: int, seed: int
) -> None:
    image = image_of(shape, spacing, margin, seed)
    target = (spacing[order[0]], spacing[order[1]], spacing[order[2]])
    label = np.random.default_rng(seed).integers(0, 3, shape).astype(np.uint8) * (image.array[0] != 0)
    prepared = prepare_case(image, label, plans_for(order, target), "3d_fullres")
    assert prepared.label is not None
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(prepared.label.astype(np.int64)), 3).movedim(-1, 0).float()
    grid = original_grid(prepared.properties)
    restored = restore([Slab(0, one_hot[None])], prepared.properties.shape, grid, LABELS, "softmax")
    np.testing.assert_array_equal(restored.label_map, label)


@THOROUGHLY
@given(st.integers(1, 400), st.integers(1, 400), st.floats(0.05, 1.0))
def test_tiles_of_an_axis_cover_it_in_steps_of_at_most_the_share(size: int, tile: int, step: float) -> None:
    if size < tile:
        return
    starts = tile_starts(size, tile, step)
    assert starts[0] == 0
    assert starts[-1] == size - tile
    gaps = np.diff(starts)
    assert (gaps >= 0).all()
    assert (gaps <= max(1, np.ceil(tile * step))).all()  # rounded to voxels
    assert set(range(size)) == {voxel for start in starts for voxel in range(start, start + tile)}


@THOROUGHLY
@given(st.lists(st.integers(1, 24), min_size=2, max_size=3))
def test_weights_are_positive_finite_and_largest_in_the_middle(tile: list[int]) -> None:
    weights = tile_weights(tuple(tile))
    assert weights.shape == tuple(tile)
    assert (weights > 0).all()
    assert np.isfinite(weights).all()
    assert weights[tuple(edge // 2 for edge in tile)] == weights.max()


@THOROUGHLY
@given(shapes, st.tuples(*[st.integers(1, 9)] * 3), st.floats(0.2, 1.0), st.integers(1, 9))
def test_groups_of_tiles_cover_every_voxel_before_its_row_is_finished(
    shape: tuple[int, int, int], tile: tuple[int, int, int], step: float, at_once: int
) -> None:
    tile = (min(tile[0], shape[0]), min(tile[1], shape[1]), min(tile[2], shape[2]))
    covered, finished = np.zeros(shape, int), 0
    for group in tile_groups(shape, tile, step, at_once):
        for start in group.starts:
            assert start[0] >= finished
            covered[tuple(slice(s, s + n) for s, n in zip(start, tile, strict=True))] += 1
        finished = group.finished
        assert (covered[:finished] > 0).all()
    assert finished == shape[0]
