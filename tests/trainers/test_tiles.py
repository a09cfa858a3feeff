"""Tiles of patches and what is sampled from them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autossl.trainers.components.shapes import boundary_band
from autossl.trainers.components.tiles import (
    Tile,
    border_sample,
    contrast_weight,
    prototypes_of,
    random_tiles,
    tiles_per_axis,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tile_of(labels: Tensor, width: float = 2) -> Tile:
    """One 2D map as one tile."""
    y = labels[None, None]
    return Tile(torch.arange(y.numel()), y.flatten(), boundary_band(y, width, (1.0, 1.0)).flatten())


def square(side: int = 20, size: int = 40, at: int = 10) -> Tensor:
    labels = torch.zeros(size, size, dtype=torch.long)
    labels[at : at + side, at : at + side] = 1
    return labels


@pytest.mark.parametrize(
    ("shape", "spacing", "expected"),
    [
        ((56, 40), (1.0, 1.0), (1, 1)),
        ((64, 80), (1.0, 1.0), (2, 2)),
        ((256, 224), (1.0, 1.0), (4, 4)),
        ((40, 56, 40), (1.0, 1.0, 1.0), (5, 1, 1)),
        ((40, 56, 128), (1.0, 2.0, 1.0), (1, 7, 2)),
        ((6, 128, 128), (4.0, 1.0, 1.0), (6, 2, 2)),
    ],
)
def test_tiles_per_axis(shape: tuple[int, ...], spacing: tuple[float, ...], expected: tuple[int, ...]) -> None:
    assert tiles_per_axis(shape, spacing) == expected


def test_tiles_part_the_valid_voxels() -> None:
    labels = torch.zeros(2, 1, 10, 7, dtype=torch.long)
    valid = torch.rand(labels.shape, generator=generator()) < 0.8
    valid[1] = False
    tiles = random_tiles(labels, valid, valid, (3, 2), 100, generator())
    assert len(tiles) == 6, "none without a valid voxel"
    places = torch.cat([tile.places for tile in tiles]).sort().values
    assert torch.equal(places, valid.flatten().nonzero()[:, 0])
    widths = {tuple((tile.places // 7).unique().tolist()) for tile in tiles}
    assert widths == {(0, 1, 2), (3, 4, 5), (6, 7, 8, 9)}


def test_tiles_with_two_classes_come_first_and_the_number_is_bounded() -> None:
    labels = torch.zeros(1, 1, 20, 20, dtype=torch.long)
    labels[0, 0, 3, 3] = labels[0, 0, 19, 0] = 1
    everywhere = torch.ones_like(labels, dtype=torch.bool)
    chosen = [random_tiles(labels, everywhere, everywhere, (5, 5), 4, generator(seed)) for seed in range(5)]
    for tiles in chosen:
        assert [tile.is_mixed for tile in tiles] == [True, True, False, False]
    assert len({tuple(int(tile.places[0]) for tile in tiles) for tiles in chosen}) > 1


def test_anchors_of_a_square_lie_within_two_voxels_of_its_edge() -> None:
    tile = tile_of(square())
    anchors, others = border_sample(tile, generator())
    y, x = anchors // 40, anchors % 40
    inside = torch.stack([y - 9, 30 - y, x - 9, 30 - x]).amin(0)  # 1 for the outermost row of the square, 0 outside
    assert inside.max() <= 2
    outside = (
        torch.stack([10 - y, y - 29]).amax(0).clamp(min=0) ** 2
        + torch.stack([10 - x, x - 29]).amax(0).clamp(min=0) ** 2
    )
    assert outside.max() <= 4
    assert tile.labels[anchors].bincount().tolist() == [32, 32]
    assert len(others) == 128
    assert int(tile.band[others].sum()) == 64
    assert len(torch.cat([anchors, others]).unique()) == 192, "no pixel twice"


def test_small_tiles_give_what_they_have() -> None:
    anchors, others = border_sample(tile_of(square(2, 6, 2)), generator())
    tile = tile_of(square(2, 6, 2))
    assert tile.labels[anchors].bincount().tolist() == [int(tile.band.sum()) - 4, 4]
    assert len(anchors) + len(others) == 36
    assert [len(part) for part in border_sample(tile_of(torch.zeros(8, 8, dtype=torch.long)), generator())] == [0, 0]


def test_many_classes_share_the_anchors() -> None:
    labels = (torch.arange(40)[:, None] // 4 * torch.ones(40, dtype=torch.long)[None]).long()
    anchors, _ = border_sample(tile_of(labels), generator())
    assert (labels.flatten()[anchors].bincount() == 6).all(), "64 // 10 of each"


def test_low_contrast_weighs_twice() -> None:
    values = torch.tensor([0.0, 2.0])  # σ = 1
    assert contrast_weight(values, values).item() == pytest.approx(2.0)
    assert contrast_weight(values + 2.001, values).item() == pytest.approx(1.5, abs=1e-4)
    assert contrast_weight(values + 1e6, values).item() == pytest.approx(1.0, abs=1e-5)
    assert contrast_weight(values, values[:0]).item() == 1


def test_a_prototype_for_each_class_with_enough_pixels() -> None:
    labels = square()
    labels[0, :31] = 2
    labels[39, :32] = 3
    tile = tile_of(labels)
    intensity = torch.zeros(1600)
    intensity[labels.flatten() == 1] = 5.0
    found = prototypes_of(tile, intensity, generator())
    assert [prototype.number for prototype in found] == [0, 1, 3]
    assert [len(prototype.places) for prototype in found] == [256, 256, 32]
    for prototype in found:
        assert (labels.flatten()[prototype.places] == prototype.number).all()
    assert found[1].weight.item() == pytest.approx(1 + 1 / (1 + 5 / 1e-3))
    assert found[2].weight.item() == pytest.approx(2.0)
