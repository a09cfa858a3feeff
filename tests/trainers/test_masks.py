"""Masks that mix two patches, and how the rows of a batch are paired."""

from __future__ import annotations

import math

import pytest
import torch

from autossl.trainers.components.masks import (
    box_mask,
    cutmix_box,
    derangement,
    grid_cells,
    grid_mask,
    half_size,
    halves,
    mix,
    through_plane_axis,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zero_box(mask: torch.Tensor) -> list[int]:
    """Sides of the smallest box that holds all False voxels of [*S]."""
    return [int(axis.max() - axis.min() + 1) for axis in (~mask).nonzero(as_tuple=True)]


# ------------------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize(
    "shape, fraction",
    [
        ((64, 48), 43 / 64 * 32 / 48),
        ((16, 48, 48), 11 / 16 * (32 / 48) ** 2),
        ((5, 48, 48), (32 / 48) ** 2),  # a short axis is taken whole
    ],
)
def test_box_has_the_rounded_size_and_lies_anywhere(shape: tuple[int, ...], fraction: float) -> None:
    mask = box_mask(2, shape, generator())
    assert mask.shape == (2, 1, *shape)
    assert mask.dtype == torch.bool
    assert (~mask[0]).float().mean().item() == pytest.approx(fraction, abs=1e-6)
    assert math.prod(zero_box(mask[0, 0])) == int((~mask[0]).sum()), "it is one box"
    starts = {int((~box_mask(1, (6, 6), generator(seed))).nonzero()[0, 2]) for seed in range(60)}
    assert starts == {0, 1, 2}, "round(4) voxels of 6: three places"


def test_one_box_for_all_or_one_each() -> None:
    shared = box_mask(4, (32, 32), generator())
    assert all(torch.equal(shared[0], row) for row in shared)
    own = box_mask(4, (32, 32), generator(), shared=False)
    assert not all(torch.equal(own[0], row) for row in own)
    small = box_mask(1, (32, 32), generator(), 0.25)
    assert zero_box(small[0, 0]) == [8, 8]


def test_grid_cells_follow_the_extent_of_the_coarse_axis() -> None:
    assert grid_cells((16, 256, 224), (10, 1.56, 1.56)) == (2, 4, 4)
    assert grid_cells((112, 112, 80), (1, 1, 1)) == (4, 4, 4)
    assert grid_cells((16, 64, 64), (3, 1, 1)) == (4, 4, 4), "three times as coarse is not yet anisotropic"
    assert grid_cells((2, 64, 64), (1, 1, 1)) == (2, 4, 4), "no more cells than voxels"
    assert grid_cells((1, 64, 64), (8, 1, 1)) == (1, 4, 4)
    assert grid_cells((64, 64), (1, 1), cells=8) == (8, 8)


@pytest.mark.parametrize("shape, spacing", [((16, 256, 224), (10, 1.56, 1.56)), ((30, 22), (1.0, 1.0))])
@pytest.mark.parametrize("ratio", [0.5, 0.3])
def test_grid_removes_exactly_its_share_of_cells(
    shape: tuple[int, ...], spacing: tuple[float, ...], ratio: float
) -> None:
    mask = grid_mask(3, shape, spacing, generator(), ratio=ratio)
    cells = grid_cells(shape, spacing)
    assert mask.shape == (3, 1, *shape)
    # the middle of each cell stands for it; borders are integer linspace
    middles = [[(2 * i + 1) * size // (2 * n) for i in range(n)] for size, n in zip(shape, cells, strict=True)]
    picked = mask[:, 0]
    for axis, places in enumerate(middles, start=1):
        picked = picked.index_select(axis, torch.tensor(places))
    assert (~picked).flatten(1).sum(1).tolist() == [math.floor(ratio * math.prod(cells))] * 3
    rebuilt = picked
    for axis, (size, n) in enumerate(zip(shape, cells, strict=True), start=1):
        borders = torch.tensor([size * i // n for i in range(n + 1)])
        rebuilt = rebuilt.repeat_interleave(borders.diff(), axis)
    assert torch.equal(rebuilt, mask[:, 0]), "cells are whole"
    assert not torch.equal(mask[0], mask[1]), "samples differ"


def test_through_plane_axis_is_there_above_a_ratio_of_three() -> None:
    assert through_plane_axis((10, 1.5, 1.5)) == 0
    assert through_plane_axis((3, 1, 1)) is None
    assert through_plane_axis((1, 1, 5)) == 2
    assert through_plane_axis((5, 1)) is None


# ------------------------------------------------------------------------------------------------------------ cutmix


@pytest.mark.parametrize("shape", [(64, 64), (40, 96), (16, 48, 40)])
def test_cutmix_box_comes_half_of_the_time_with_the_promised_share(shape: tuple[int, ...]) -> None:
    mask = cutmix_box(1000, shape, generator())
    share = (~mask).flatten(1).float().mean(1)
    assert (share == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    boxes = share[share > 0]
    rounding = 0.02
    assert boxes.min() >= 0.02 - rounding
    assert boxes.max() <= 0.4 + rounding
    assert boxes.mean().item() == pytest.approx(0.21, abs=0.02), "uniform between the two"
    assert boxes.std().item() == pytest.approx(0.38 / math.sqrt(12), abs=0.015)


def test_cutmix_aspect_is_kept_in_plane() -> None:
    for shape, free in (((96, 96), False), ((24, 96, 96), False), ((24, 96, 96), True)):
        mask = cutmix_box(400, shape, generator(), p=1.0, volume=(0.02, 0.1), through_plane_free=free)
        sides = [zero_box(row[0]) for row in mask]
        ratios = torch.tensor([side[-2] / side[-1] for side in sides])
        assert ratios.min() > 0.3 * 0.9
        assert ratios.max() < 1.1 / 0.3
        assert ratios.max() > 2.5, "flat and long boxes both come"
        assert ratios.min() < 0.6
        assert all(math.prod(side) == int((~row).sum()) for side, row in zip(sides, mask, strict=True))


def test_through_plane_free_spans_all_slices_now_and_then() -> None:
    shape = (12, 96, 96)
    lengths = [
        torch.tensor([zero_box(row[0])[0] for row in cutmix_box(300, shape, generator(), 1.0, through_plane_free=free)])
        for free in (False, True)
    ]
    assert (lengths[1] == 12).any()
    assert lengths[1].float().mean() > lengths[0].float().mean()


def test_cutmix_fits_an_elongated_patch() -> None:
    mask = cutmix_box(200, (4, 128), generator(), p=1.0)
    share = (~mask).flatten(1).float().mean(1)
    assert share.min() > 0
    assert share.max() <= 0.4 + 0.02


def test_cutmix_can_be_off_or_always_on() -> None:
    assert cutmix_box(20, (32, 32), generator(), p=0.0).all()
    assert not cutmix_box(20, (32, 32), generator(), p=1.0).flatten(1).all(1).any()
    assert torch.equal(cutmix_box(5, (32, 32), generator(2)), cutmix_box(5, (32, 32), generator(2)))


# ---------------------------------------------------------------------------------------------------- mixing, pairing


def test_mix_takes_the_first_where_true_for_every_kind_of_tensor() -> None:
    mask = torch.tensor([[True, False], [False, True]]).view(1, 1, 2, 2)
    image = mix(torch.ones(1, 3, 2, 2), torch.full((1, 3, 2, 2), 5.0), mask)
    assert image[0, 2].tolist() == [[1.0, 5.0], [5.0, 1.0]]
    labels = mix(torch.zeros(1, 1, 2, 2, dtype=torch.long), torch.full((1, 1, 2, 2), 7), mask)
    assert labels.dtype == torch.long
    assert labels[0, 0].tolist() == [[0, 7], [7, 0]]
    valid = mix(torch.ones(1, 1, 2, 2, dtype=torch.bool), torch.zeros(1, 1, 2, 2, dtype=torch.bool), mask)
    assert torch.equal(valid, mask)
    a, b = torch.rand(1, 2, 2, 2, generator=generator()), torch.rand(1, 2, 2, 2, generator=generator(1))
    assert torch.equal(mix(a, b, mask) + mix(b, a, mask), a + b), "M and 1 - M partition the patch"


def test_halves_are_shared_out_and_repeat_where_short() -> None:
    rows = torch.arange(3).view(3, 1)
    assert half_size(3, 3) == 2
    assert [half.flatten().tolist() for half in halves(rows, 2)] == [[0, 1], [2, 0]]
    assert [half.flatten().tolist() for half in halves(rows[:2], 1)] == [[0], [1]]
    one_a, one_b = halves(rows[:1], half_size(1, 1))
    assert torch.equal(one_a, one_b)
    assert [half.flatten().tolist() for half in halves(rows[:1], half_size(1, 4))] == [[0, 0], [0, 0]]
    assert half_size(1, 4) == 2


def test_a_derangement_moves_every_row() -> None:
    for seed in range(200):
        for n in range(2, 7):
            partner = derangement(n, generator(seed))
            assert sorted(partner.tolist()) == list(range(n))
            assert not (partner == torch.arange(n)).any()
    assert derangement(1, generator()).tolist() == [0]
    assert {tuple(derangement(3, generator(seed)).tolist()) for seed in range(50)} == {(1, 2, 0), (2, 0, 1)}
