"""Finds the same image twice: exactly (same voxels), or up to flips, intensity scaling and a small change of size."""

from __future__ import annotations

import base64
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt

CELLS_3D = 12
CELLS_2D = 24
LEVELS = 16
SIMILAR = 0.96
"""Correlation from which two robust hashes count as the same image.

Measured on 384 cases (best of all flips): two different cases reach 0.88 (hippocampus crops), 0.90 (glioma brains) and
0.93 (fetal heads); the same case reaches 0.995 resized to 90 %, 0.98 with gamma 0.7, 0.96 with noise of 10 % of the
standard deviation (smallest of all), 0.97 with 2 % of its rows and columns cut off (median).
"""
ROWS_AT_ONCE = 512

Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True)
class HashedCase:
    """What is compared of one case."""

    id: str
    voxel_hash: str
    robust_hash: str


@dataclass(frozen=True)
class DuplicatePair:
    """Two cases that show the same image. `first` < `second` in the order of the ids."""

    first: str
    second: str
    kind: Literal["identical", "similar"]
    similarity: float
    """1 for identical voxels, else the correlation of the robust hashes (at least `SIMILAR`)."""


def voxel_hash(array: npt.NDArray[np.generic]) -> str:
    """SHA-256 (first 32 hexadecimal digits) of an array's type, shape and values; headers do not matter."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]


def robust_hash(image: npt.NDArray[np.floating]) -> str:
    """Text that is the same for an image and its flips, its intensities scaled or shifted; close to it when resized.

    Each channel is averaged over 12³ cells (24² where z = 1) and standardized, the channels are averaged, the cells
    ranked, the ranks cut into 16 levels; of the eight flips of that grid the smallest in dictionary order is kept.

    Args:
        image: [C,z,y,x], finite.

    Returns:
        base64 text; empty where all cells are equal (nothing to compare).
    """
    flat = image.shape[1] == 1
    cells = (1, CELLS_2D, CELLS_2D) if flat else (CELLS_3D,) * 3
    mean = sum(_standardized(_cell_means(channel, cells)) for channel in image)
    mean = np.round(np.asarray(mean), 5)  # so that rounding errors make no ranks
    if np.ptp(mean) == 0:
        return ""
    levels = np.floor(_ranks(mean.ravel()).reshape(cells) * (LEVELS / mean.size)).astype(np.uint8)
    smallest = min(flipped.tobytes() for flipped in _flips(levels))
    nibbles = np.frombuffer(smallest, np.uint8)
    return base64.b85encode((nibbles[::2] << 4 | nibbles[1::2]).tobytes()).decode("ascii")


def find_duplicates(cases: Sequence[HashedCase]) -> list[DuplicatePair]:
    """All pairs of cases that show the same image, ordered by id; identical pairs are not listed as similar too."""
    by_voxels: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        by_voxels[case.voxel_hash].append(case.id)
    found = {
        (first, second): DuplicatePair(first, second, "identical", 1.0)
        for ids in by_voxels.values()
        for i, first in enumerate(sorted(ids))
        for second in sorted(ids)[i + 1 :]
    }
    by_length: dict[int, dict[str, str]] = defaultdict(dict)
    for case in cases:
        if case.robust_hash:
            by_length[len(case.robust_hash)][case.id] = case.robust_hash
    for hashes in by_length.values():
        for first, second, similarity in _similar_pairs(hashes):
            found.setdefault((first, second), DuplicatePair(first, second, "similar", similarity))
    return [found[key] for key in sorted(found)]


def _similar_pairs(hashes: Mapping[str, str]) -> list[tuple[str, str, float]]:
    """Pairs whose grids correlate with at least `SIMILAR` under the best flip.

    Averaging over all flips is a projection that commutes with every flip, so the averaged grids of a similar pair are
    at most as far apart as the grids themselves: that bound sorts out nearly all pairs with one small matrix product.
    """
    ids = sorted(hashes)
    grids = np.stack([_unit(_decode(hashes[i])) for i in ids])
    averaged = _averaged_over_flips(grids)
    lengths = (averaged**2).sum(1)
    largest = 2 - 2 * SIMILAR + 1e-4
    pairs = []
    for start in range(0, len(ids), ROWS_AT_ONCE):
        later = np.arange(start, len(ids))
        distance = lengths[start : start + ROWS_AT_ONCE, None] + lengths[None, start:]
        distance -= 2 * averaged[start : start + ROWS_AT_ONCE] @ averaged[start:].T
        near = (distance <= largest) & (later[: len(distance), None] < later[None])
        rows, columns = later[: len(distance)][near.any(1)], later[near.any(0)]
        if len(rows):
            similarity = _best_correlation(grids[rows], grids[columns])
            for i, j in np.argwhere((similarity >= SIMILAR) & (rows[:, None] < columns[None])):
                pairs.append((ids[rows[i]], ids[columns[j]], round(min(float(similarity[i, j]), 1.0), 4)))
    return pairs


def _best_correlation(some: npt.NDArray[np.float32], others: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[n,z,y,x] and [m,z,y,x] of unit length → [n,m]: the largest correlation over all flips."""
    flat = some.reshape(len(some), -1)
    correlations = [flat @ flipped.reshape(len(others), -1).T for flipped in _flips(others)]
    best: npt.NDArray[np.float32] = np.maximum.reduce(correlations)
    return best


def _averaged_over_flips(grids: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[n,z,y,x] → [n, cells of one octant], scaled so that distances are those of the whole averaged grids."""
    averaged: npt.NDArray[np.float32] = grids
    weight = 1
    for axis in (1, 2, 3):
        size = averaged.shape[axis]
        if size > 1:
            averaged = np.take(averaged + np.flip(averaged, axis), range(size // 2), axis=axis) * np.float32(0.5)
            weight *= 2
    return averaged.reshape(len(grids), -1) * np.float32(np.sqrt(weight))


def _decode(text: str) -> npt.NDArray[np.float32]:
    packed = np.frombuffer(base64.b85decode(text), np.uint8)
    levels = np.stack([packed >> 4, packed & 15], axis=1).astype(np.float32)
    shape = (1, CELLS_2D, CELLS_2D) if levels.size == CELLS_2D**2 else (CELLS_3D,) * 3
    return levels.reshape(shape)


def _unit(grid: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    centered = grid - grid.mean()
    return np.asarray(centered / np.linalg.norm(centered), dtype=np.float32)


def _flips(grid: npt.NDArray[Number]) -> list[npt.NDArray[Number]]:
    """All flips of the last three axes; axes of one cell are left out."""
    flips = [grid]
    for axis in (-3, -2, -1):
        if grid.shape[axis] > 1:
            flips += [np.flip(flipped, axis) for flipped in flips]
    return flips


def _standardized(grid: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    deviation = grid.std()
    return np.zeros_like(grid) if deviation == 0 else (grid - grid.mean()) / deviation


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rank of each value from 0 to n-1; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: npt.NDArray[np.float64] = (last - counts + last - 1)[inverse] / 2
    return mean_rank


def _cell_means(channel: npt.NDArray[np.floating], cells: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Means over equal cells [z,y,x]; a voxel on a border counts in both cells by its parts."""
    result = channel
    for axis in (2, 1, 0):
        weights = _cell_weights(channel.shape[axis], cells[axis]).astype(result.dtype)
        result = np.moveaxis(np.tensordot(result, weights, axes=(axis, 1)), -1, axis)
    return result.astype(np.float64)


def _cell_weights(size: int, cells: int) -> npt.NDArray[np.float64]:
    """[cells, size]: the share of each voxel in the mean of each cell; rows sum to 1."""
    borders = np.linspace(0, size, cells + 1)
    voxels = np.arange(size)
    overlap = np.minimum(borders[1:, None], voxels + 1) - np.maximum(borders[:-1, None], voxels)
    return np.clip(overlap, 0, None) * (cells / size)
