"""Where low-confidence regions are found, and what replaces them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from autossl.trainers.components.displacement import (
    Displacement,
    Judged,
    Limits,
    best_windows,
    displaced,
    find_displacement,
    largest_component,
    low_confidence_box,
    mean_confidence,
    moved_at_random,
    smallest_sides,
    window_means,
)
from autossl.trainers.components.masks import Slices

ISOTROPIC = (1.0, 1.0)


def limits(side: int = 8, threshold: float = 0.6, n_windows: int = 4, smallest: int = 4, dims: int = 2) -> Limits:
    return Limits(threshold, (side,) * dims, (smallest,) * dims, (1.0,) * dims, n_windows, regions=False)


def judged(confidence: Tensor, q: Tensor | None = None) -> Judged:
    """Two classes; the confident one is class 1 unless told otherwise."""
    return Judged(torch.stack([1 - confidence, confidence]) if q is None else q, confidence)


def two_blobs() -> Tensor:
    """30 and 80 voxels of low confidence, 5 × 6 at (2, 2) and 8 × 10 at (20, 15)."""
    confidence = torch.full((32, 32), 0.9)
    confidence[2:7, 2:8] = 0.5
    confidence[20:28, 15:25] = 0.5
    return confidence


def spans(box: Slices | None) -> list[tuple[int, int]]:
    assert box is not None
    return [(place.start, place.stop) for place in box]


# --------------------------------------------------------------------------------------------------------- the region


def test_the_box_covers_the_larger_blob_or_is_cut_down_around_its_centroid() -> None:
    low = two_blobs() < 0.6
    assert spans(low_confidence_box(low, (20, 20), (4, 4), ISOTROPIC)) == [(20, 28), (15, 25)]
    cut = low_confidence_box(low, (6, 4), (4, 4), ISOTROPIC)
    assert spans(cut) == [(21, 27), (18, 22)], "the centroid is (23.5, 19.5)"
    assert spans(low_confidence_box(low, (1, 1), (4, 4), ISOTROPIC)) == [(22, 26), (18, 22)], "no side is below four"


def test_an_uneven_region_is_cut_at_its_centroid_and_not_at_the_middle_of_its_box() -> None:
    low = torch.zeros(32, 32, dtype=torch.bool)
    low[4:12, 4:12] = True  # the mass
    low[11:30, 11] = True  # a tail
    places = low.nonzero().double().mean(0)
    for start_and_end, center in zip(spans(low_confidence_box(low, (6, 6), (4, 4), ISOTROPIC)), places, strict=True):
        assert start_and_end[0] <= float(center) < start_and_end[1]
    assert spans(low_confidence_box(low, (6, 6), (4, 4), ISOTROPIC))[0][0] < 12


def test_boxes_at_the_edge_stay_in_the_patch_and_thin_ones_grow() -> None:
    low = torch.zeros(16, 16, dtype=torch.bool)
    low[15, 0:16] = True  # 16 voxels, as many as the smallest box
    assert spans(low_confidence_box(low, (8, 16), (4, 4), ISOTROPIC)) == [(12, 16), (0, 16)]
    low[15, 0] = False
    assert low_confidence_box(low, (8, 16), (4, 4), ISOTROPIC) is None, "15 voxels are fewer than 4 × 4"
    assert low_confidence_box(torch.zeros(16, 16, dtype=torch.bool), (8, 8), (1, 1), ISOTROPIC) is None
    everything = torch.ones(16, 16, dtype=torch.bool)
    assert [b - a for a, b in spans(low_confidence_box(everything, (5, 5), (4, 4), ISOTROPIC))] == [5, 5]


def test_voxels_that_share_a_corner_are_connected() -> None:
    low = torch.eye(9, dtype=torch.bool)
    assert largest_component(low, ISOTROPIC).sum() == 9
    assert largest_component(torch.zeros(5, 5, dtype=torch.bool), ISOTROPIC).sum() == 0


@pytest.mark.parametrize(("spacing", "gap_is_closed"), [((1.0, 1.0, 1.0), True), ((5.0, 1.0, 1.0), False)])
def test_volumes_are_searched_at_half_resolution_but_not_through_plane(
    spacing: tuple[float, ...], gap_is_closed: bool
) -> None:
    """Two slabs, with one slice between them that half the resolution cannot see."""
    low = torch.zeros(7, 9, 9, dtype=torch.bool)
    low[0:2] = low[3:7] = True
    found = largest_component(low, spacing)
    assert found.sum() == (6 if gap_is_closed else 4) * 81
    assert not found[2].any(), "mapped back to what is low"


def test_smallest_sides() -> None:
    assert smallest_sides((64, 64), (1.0, 1.0)) == (4, 4)
    assert smallest_sides((16, 64, 64), (10.0, 1.5, 1.5)) == (1, 4, 4)
    assert smallest_sides((3, 64, 64), (1.0, 1.0, 1.0)) == (3, 4, 4)


# -------------------------------------------------------------------------------------------------------- the windows


@pytest.mark.parametrize(("shape", "sides"), [((20, 24), (6, 8)), ((9, 12, 10), (4, 9, 5))])
def test_window_means_and_the_best_window_by_brute_force(shape: tuple[int, ...], sides: tuple[int, ...]) -> None:
    confidence = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    means, steps = window_means(confidence, sides)
    assert steps == tuple(max(1, side // 4) for side in sides)
    best = (-1.0, None)
    starts = [range(0, size - side + 1, step) for size, side, step in zip(shape, sides, steps, strict=True)]
    for index in itertools.product(*(range(len(s)) for s in starts)):
        window = tuple(slice(s[i], s[i] + side) for s, i, side in zip(starts, index, sides, strict=True))
        mean = confidence[window].mean().item()
        assert means[index].item() == pytest.approx(mean, abs=1e-6)
        best = max(best, (mean, window), key=lambda entry: entry[0])
    assert means.shape == tuple(len(s) for s in starts)
    assert best_windows(confidence, sides, 1) == [best[1]]


def test_windows_do_not_overlap_and_come_in_order() -> None:
    confidence = torch.rand(24, 24, generator=torch.Generator().manual_seed(5))
    windows = best_windows(confidence, (5, 6), 4)
    assert len(windows) == 4
    means = [confidence[window].mean().item() for window in windows]
    assert means == sorted(means, reverse=True)
    covered = torch.zeros(24, 24)
    for window in windows:
        covered[window] += 1
    assert covered.max() == 1
    assert len(best_windows(confidence, (20, 20), 4)) == 1, "there is no room for a second one"
    assert best_windows(torch.full((8, 8), torch.nan), (4, 4), 4) == []


# --------------------------------------------------------------------------------------------------- the displacement


def find(
    mine: Tensor, other: Tensor, settings: Limits, q: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Displacement | None:
    everywhere = torch.ones_like(mine, dtype=torch.bool)
    return find_displacement(judged(mine, q[0]), judged(other, q[1]), everywhere, settings)


def test_only_what_is_more_confident_replaces() -> None:
    mine = two_blobs()
    better = torch.full((32, 32), 0.5)
    better[0:16, 0:16] = 0.8
    move = find(mine, better, limits(16, n_windows=1))
    assert move is not None
    assert spans(move.target) == [(20, 28), (15, 25)]
    assert all(stop <= 16 for _, stop in spans(move.source))
    assert mean_confidence(judged(better), move.source) > mean_confidence(judged(mine), move.target)
    assert find(mine, torch.full((32, 32), 0.5), limits(16)) is None, "equal is not better"
    assert find(torch.full((32, 32), 0.9), better, limits(16)) is None, "nothing is low"
    assert find(torch.full((32, 32), torch.nan), better, limits(16)) is None


def test_among_confident_windows_the_classes_decide() -> None:
    """The region is mostly class 0; of two windows the less confident one shows that as well."""
    mine = torch.full((32, 32), 0.95)
    mine[24:32, 24:32] = 0.55
    q_mine = torch.stack([mine, 1 - mine])  # class 0
    other = torch.full((32, 32), 0.6)
    other[0:8, 0:8] = 0.99
    other[0:8, 16:24] = 0.9
    q_other = torch.stack([1 - other, other])
    q_other[:, 0:8, 16:24] = torch.tensor([0.9, 0.1]).view(2, 1, 1)
    sources = {}
    for n_windows in (1, 2):
        move = find(mine, other, limits(8, n_windows=n_windows), (q_mine, q_other))
        assert move is not None
        sources[n_windows] = spans(move.source)
    assert sources == {1: [(0, 8), (0, 8)], 2: [(0, 8), (16, 24)]}


def test_regions_match_by_their_own_probabilities() -> None:
    mine = torch.full((16, 16), 0.95)
    mine[0:4, 0:4] = 0.5
    other = torch.full((16, 16), 0.6)
    other[8:12, 0:4], other[8:12, 8:12] = 0.99, 0.9
    q_mine = torch.full((2, 16, 16), 0.2)
    q_other = torch.full((2, 16, 16), 0.9)
    q_other[:, 8:12, 8:12] = 0.2
    settings = Limits(0.6, (4, 4), (4, 4), (1.0, 1.0), 2, regions=True)
    move = find(mine, other, settings, (q_mine, q_other))
    assert move is not None
    assert spans(move.source) == [(8, 12), (8, 12)]


def test_what_is_not_valid_is_no_region() -> None:
    valid = torch.ones(32, 32, dtype=torch.bool)
    valid[20:28, 15:25] = False
    move = find_displacement(judged(two_blobs()), judged(torch.full((32, 32), 0.9)), valid, limits(16))
    assert move is not None
    assert spans(move.target) == [(2, 7), (2, 8)]


def test_displacement_is_exact_and_leaves_both_images_alone() -> None:
    draw = torch.Generator().manual_seed(0)
    mine, other = torch.rand(2, 3, 16, 16, generator=draw), torch.rand(2, 3, 16, 16, generator=draw)
    before = mine.clone()
    move = Displacement((slice(2, 7), slice(0, 6)), (slice(10, 15), slice(8, 14)))
    result = displaced(mine, other, [None, move])
    assert torch.equal(result[0], mine[0])
    assert torch.equal(result[1, :, 2:7, 0:6], other[1, :, 10:15, 8:14])
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[2:7, 0:6] = False
    assert torch.equal(result[1][:, outside], mine[1][:, outside])
    assert torch.equal(mine, before)


def test_random_places_have_the_size_that_was_found_and_lie_anywhere() -> None:
    move = Displacement((slice(2, 7), slice(0, 6)), (slice(10, 15), slice(8, 14)))
    drawn = [moved_at_random(move, (16, 16), torch.Generator().manual_seed(seed)) for seed in range(60)]
    for entry in drawn:
        for box in (entry.target, entry.source):
            assert [place.stop - place.start for place in box] == [5, 6]
    assert {entry.target[0].start for entry in drawn} == set(range(12))
    assert any(entry.target != entry.source for entry in drawn)
    assert np.array_equal(
        spans(moved_at_random(move, (16, 16), torch.Generator().manual_seed(1)).source), spans(drawn[1].source)
    )
