"""Tile positions and weights: closed forms, full coverage, rows that are finished when they say so."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from autossl.inference.tiles import tile_groups, tile_starts, tile_weights


def test_starts_are_spread_evenly() -> None:
    assert tile_starts(110, 64, 0.5) == [0, 23, 46]
    assert tile_starts(64, 64, 0.5) == [0]
    assert tile_starts(65, 64, 0.5) == [0, 1]
    assert tile_starts(128, 64, 1.0) == [0, 64]


@pytest.mark.parametrize("size", range(12, 60, 5))
@pytest.mark.parametrize("step", [0.3, 0.5, 0.8, 1.0])
def test_starts_cover_every_voxel_within_the_step(size: int, step: float) -> None:
    starts = tile_starts(size, 12, step)
    covered = {voxel for start in starts for voxel in range(start, start + 12)}
    assert covered == set(range(size))
    gaps = np.diff(starts)
    assert np.all(gaps <= np.ceil(12 * step))


def test_bad_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter than its tile"):
        tile_starts(10, 12)
    with pytest.raises(ValueError, match="step 0"):
        tile_starts(20, 12, 0)


def test_weights_are_a_gaussian_of_an_eighth_of_the_tile() -> None:
    weights = tile_weights((32, 32))
    assert weights.max() == weights[16, 16] == 10
    expected = 10 * np.exp(-0.5 * (8 / 4) ** 2)  # 8 voxels from the middle, sigma 4
    assert weights[16, 24] == pytest.approx(expected, rel=2e-3)  # half precision
    assert weights[16, 8] == weights[16, 24]


@pytest.mark.parametrize("tile", [(40, 56, 40), (1, 128, 128), (7, 9, 3)])
def test_weights_are_those_of_the_filter_that_nnunet_uses(tile: tuple[int, ...]) -> None:
    impulse = np.zeros(tile)
    impulse[tuple(edge // 2 for edge in tile)] = 1
    blurred = ndimage.gaussian_filter(impulse, [edge / 8 for edge in tile], mode="constant", cval=0)
    expected = (10 * blurred / blurred.max()).astype(np.float32).astype(np.float16).astype(np.float32)
    expected[expected == 0] = expected[expected > 0].min()
    assert np.abs(tile_weights(tile) / expected - 1).max() <= 2**-10, "at most the last digit of half precision"


@pytest.mark.parametrize("tile", [(40, 56, 40), (1, 128, 128), (4, 16, 8)])
def test_weights_are_positive_everywhere(tile: tuple[int, ...]) -> None:
    assert tile_weights(tile).min() > 0


@pytest.mark.parametrize("shape, tile", [((20, 9, 14), (8, 8, 8)), ((5, 20, 20), (1, 8, 8)), ((8, 8, 8), (8, 8, 8))])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_groups_finish_rows_in_order_and_cover_all(
    shape: tuple[int, int, int], tile: tuple[int, int, int], at_once: int
) -> None:
    counts = np.zeros(shape, dtype=int)
    finished = 0
    for group in tile_groups(shape, tile, 0.5, at_once):
        assert group.first >= finished  # finished rows get nothing any more
        for start in group.starts:
            assert group.first <= start[0] <= start[0] + tile[0] <= group.end
            counts[tuple(slice(s, s + t) for s, t in zip(start, tile, strict=True))] += 1
        assert np.all(counts[: group.finished] > 0)
        finished = group.finished
    assert finished == shape[0]


def test_groups_have_the_tiles_of_nnunet() -> None:
    starts = [start for group in tile_groups((43, 46, 36), (40, 46, 36), 0.5, 1) for start in group.starts]
    assert starts == [(0, 0, 0), (3, 0, 0)]
    flat = [start for group in tile_groups((2, 12, 8), (1, 8, 8), 0.5, 64) for start in group.starts]
    assert flat == [(0, 0, 0), (0, 4, 0), (1, 0, 0), (1, 4, 0)]
