"""Tiles of labeled patches, and what is sampled from them: pixels near borders, and prototypes of classes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from autossl.trainers.components.contrast import choose_voxels
from autossl.trainers.components.masks import through_plane_axis

TILE, THICK_TILE = 64, 8
"""Voxels of a tile in plane, and slices of one in 3D (one slice where they are coarse)."""
ANCHORS, ANCHORS_PER_CLASS, FURTHER_CANDIDATES = 64, 32, 128
"""Drawn of a tile for the ranking near borders."""
FEWEST_PIXELS, MOST_PIXELS = 32, 256
"""Pixels of a class that a tile must have for a prototype, and at most so many that are drawn for it."""


class Tile(NamedTuple):
    """The valid voxels of a box of one patch."""

    places: Tensor
    """Int64 [n] into N·|S|."""
    labels: Tensor
    """Int64 [n]."""
    band: Tensor
    """Boolean [n]: near a border."""

    @property
    def is_mixed(self) -> bool:
        """Whether it holds two classes."""
        return bool((self.labels != self.labels[:1]).any())


class Prototype(NamedTuple):
    """A class in a tile."""

    number: int
    """Of the class."""
    places: Tensor
    """Int64 [n] into N·|S|: the pixels whose embeddings are averaged."""
    weight: Tensor
    """`contrast_weight`, a scalar."""


def tiles_per_axis(shape: Sequence[int], spacing: Sequence[float]) -> tuple[int, ...]:
    """In plane tiles of about 64 voxels, two at least where there are 64; through plane of about 8 slices.

    Through plane is the axis of a 3D patch with the largest spacing. Where that is more than three times the smallest
    one, each slice has tiles of its own.
    """
    through = None if len(shape) == 2 else max(range(3), key=lambda axis: spacing[axis])
    thickness = 1 if through_plane_axis(spacing) is not None else THICK_TILE
    return tuple(
        max(1, round(size / thickness)) if axis == through else max(1 if size < TILE else 2, round(size / TILE))
        for axis, size in enumerate(shape)
    )


def random_tiles(
    labels: Tensor, valid: Tensor, band: Tensor, counts: Sequence[int], most: int, generator: torch.Generator
) -> list[Tile]:
    """At most so many tiles with a valid voxel, at random; those with two classes come first.

    Args:
        labels, valid, band: [N, 1, *S].
        counts: tiles per axis of S.
        most: tiles in all.
        generator: on the CPU.
    """
    places = torch.arange(labels.numel(), device=labels.device).view(labels.shape)
    found = []
    for box in _boxes(labels.shape, counts):
        inside = valid[box].flatten()
        if bool(inside.any()):
            found.append(Tile(*(values[box].flatten()[inside] for values in (places, labels, band))))
    mixed = [tile.is_mixed for tile in found]
    order = torch.randperm(len(found), generator=generator).tolist()
    order.sort(key=lambda index: not mixed[index])
    return [found[index] for index in order[:most]]


def border_sample(tile: Tile, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Anchors from the band and further candidates from the whole tile, int64 positions in the tile.

    64 anchors, evenly from the classes of the band and at most 32 of each; 128 candidates that are no anchors, half of
    them from the band. No pixel comes twice, so there are fewer where the tile has not enough. Where the band does not
    hold two classes there are none.
    """
    nothing = tile.places[:0]
    n_classes = len(tile.labels[tile.band].unique())
    if n_classes < 2:
        return nothing, nothing
    per_class = max(1, min(ANCHORS_PER_CLASS, ANCHORS // n_classes))
    anchors = choose_voxels(tile.labels, per_class, tile.band, generator)[:ANCHORS]
    free = torch.ones_like(tile.band)
    free[anchors] = False
    others = choose_voxels(torch.zeros_like(tile.labels), FURTHER_CANDIDATES, free, generator, tile.band)
    return anchors, others


def prototypes_of(tile: Tile, intensity: Tensor, generator: torch.Generator) -> list[Prototype]:
    """One for each class with at least 32 pixels in the tile, of at most 256 of them; intensity is flat, [N·|S|]."""
    found = []
    values, counts = tile.labels.unique(return_counts=True)
    for number, count in zip(values.tolist(), counts.tolist(), strict=True):
        if count < FEWEST_PIXELS:
            continue
        mine = tile.labels == number
        chosen = tile.places[choose_voxels(tile.labels, MOST_PIXELS, mine, generator)]
        background = intensity[tile.places[tile.labels == 0]]
        found.append(Prototype(number, chosen, contrast_weight(intensity[tile.places[mine]], background)))
    return found


def contrast_weight(inside: Tensor, outside: Tensor) -> Tensor:
    """1 + 1 / (1 + k) with the contrast k = |μ_in - μ_out| / (σ_in + σ_out + 1e-3): 2 where a structure does not stand
    out at all, towards 1 where it does; 1 without anything outside."""
    if not len(outside):
        return torch.ones((), device=inside.device)
    inside, outside = inside.float(), outside.float()
    spread = inside.std(unbiased=False) + outside.std(unbiased=False) + 1e-3
    return 1 + 1 / (1 + (inside.mean() - outside.mean()).abs() / spread)


def _boxes(shape: Sequence[int], counts: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Slices of [N, 1, *S] for each tile of each sample; borders are whole voxels."""
    ranges = [
        [slice(size * index // count, size * (index + 1) // count) for index in range(count)]
        for size, count in zip(shape[2:], counts, strict=True)
    ]
    samples = [slice(index, index + 1) for index in range(shape[0])]
    for sample, *box in itertools.product(samples, *ranges):
        yield (sample, slice(None), *box)
