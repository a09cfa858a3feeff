"""Where the tiles of a sliding window lie and how much each of their voxels counts: nnU-Net v2's values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt

SIGMA_SHARE = 1 / 8  # nnU-Net v2: standard deviation of the weight as a share of the tile's edge
PEAK_WEIGHT = 10.0  # nnU-Net v2's scale of the weights; any scale gives the same blend


def tile_starts(size: int, tile: int, step: float = 0.5) -> list[int]:
    """First voxels of the tiles along one axis: evenly spread, at most `step` of a tile apart, covering every voxel.

    Args:
        size: voxels along the axis, at least `tile`.
        tile: edge of the tile.
        step: share of the tile, above 0 and at most 1.

    Raises:
        ValueError: the axis is shorter than the tile, or the step is no such share.
    """
    if size < tile:
        raise ValueError(f"an axis of {size} voxels is shorter than its tile of {tile}; pad it first")
    if not 0 < step <= 1:
        raise ValueError(f"step {step} must be above 0 and at most 1")
    last = size - tile
    n_steps = math.ceil(last / (tile * step))
    return [round(last / n_steps * i) for i in range(n_steps + 1)] if n_steps else [0]


@lru_cache(maxsize=8)
def tile_weights(tile: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Gaussian weight of each voxel of a tile, peak 10 in the middle, positive everywhere; read-only.

    Weights that are 0 in half precision, nnU-Net's precision for them, become the smallest one that is not.
    """
    blurred = np.ones(())
    for edge in tile:  # a blurred point is a product of bells, so that SciPy, slow to import, is not needed
        blurred = np.multiply.outer(blurred, _bell(edge))
    scaled = (blurred / (blurred.max() / PEAK_WEIGHT)).astype(np.float32)
    weights = scaled.astype(np.float16).astype(np.float32)
    weights[weights == 0] = weights[weights > 0].min()
    weights.setflags(write=False)
    return weights


def _bell(edge: int) -> npt.NDArray[np.float64]:
    """A Gaussian about the middle of an edge, as SciPy's filter cuts it: 0 beyond four standard deviations."""
    sigma = edge * SIGMA_SHARE
    places = np.arange(edge) - edge // 2
    return np.where(np.abs(places) <= int(4 * sigma + 0.5), np.exp(-0.5 / sigma**2 * places**2), 0)


@dataclass(frozen=True)
class TileGroup:
    """Tiles that are predicted before the next rows of the volume are finished.

    A row is a slice across the first axis. After this group all rows below `finished` have got all their tiles.
    """

    starts: tuple[tuple[int, int, int], ...]
    """First voxel z,y,x of each tile."""
    first: int
    """First row that the group touches."""
    end: int
    """One past the last row that the group touches."""
    finished: int


def tile_groups(
    shape: Sequence[int], tile: Sequence[int], step: float = 0.5, tiles_at_once: int = 1
) -> Iterator[TileGroup]:
    """The tiles of a volume, grouped by rows in ascending order, so that finished rows can leave memory early.

    Args:
        shape: z,y,x of the volume, nowhere smaller than the tile.
        tile: edges z,y,x; a 2D tile has z = 1 and is put on every slice.
        step: share of a tile between tiles.
        tiles_at_once: where one row of tiles has fewer, further rows join the group until there are that many.
    """
    rows, *in_plane = [tile_starts(n, edge, step) for n, edge in zip(shape, tile, strict=True)]
    if tile[0] == 1:
        rows = list(range(shape[0]))
    places = list(product(*in_plane))
    rows_at_once = max(1, tiles_at_once // len(places))
    for index in range(0, len(rows), rows_at_once):
        group = rows[index : index + rows_at_once]
        following = rows[index + rows_at_once : index + rows_at_once + 1]
        end = group[-1] + tile[0]
        yield TileGroup(
            starts=tuple((row, y, x) for row in group for y, x in places),
            first=group[0],
            end=end,
            finished=following[0] if following else end,
        )
