"""Where a patch lies: pure rules of nnU-Net v2 on shapes and voxel coordinates, no files and no global draws.

All positions are voxels of the preprocessed case in array order [z, y, x]; a 2D patch is (1, y, x), so that choosing
its position along the first axis is choosing a slice. A patch is cut from a larger *initial* patch that has room for
rotation and scaling; both may reach beyond the case. Source: nnU-Net v2 2.8.1, `nnUNetDataLoader.get_bbox` and
`compute_initial_patch_size.get_patch_size`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FOREGROUND_SHARE = 0.33
"""Share of the samples of a batch that are centered on foreground (nnU-Net's oversample_foreground_percent)."""
DUMMY_2D_RATIO = 3
"""A 3D patch this many times longer than its first axis is rotated and scaled in plane only."""
SMALLEST_SCALE = 0.85
"""The initial patch has room for this scaling; nnU-Net keeps this figure although it scales further."""

Locations = Mapping[str, npt.NDArray[np.integer]]
"""Class or region name → voxel coordinates [n, 3] of it in the case."""


@dataclass(frozen=True)
class PatchSizes:
    """The patch that the network sees and the initial one it is cut from; three axes each."""

    final: tuple[int, int, int]
    initial: tuple[int, int, int]

    @property
    def offset(self) -> tuple[int, int, int]:
        """Start of the final patch within the initial one."""
        z, y, x = (i // 2 - f // 2 for i, f in zip(self.initial, self.final, strict=True))
        return z, y, x


@dataclass(frozen=True)
class Place:
    """A patch of a case: start voxels (possibly negative) and sizes of the initial patch and of the final one."""

    start: tuple[int, int, int]
    sizes: PatchSizes

    @property
    def final_start(self) -> tuple[int, int, int]:
        """Start of the final patch in the case."""
        z, y, x = (s + o for s, o in zip(self.start, self.sizes.offset, strict=True))
        return z, y, x

    def center(self, shape: Sequence[int]) -> tuple[float, float, float]:
        """Middle of the final patch as a fraction of the case's extent, in [0, 1] per axis."""
        middles = (s + f / 2 for s, f in zip(self.final_start, self.sizes.final, strict=True))
        z, y, x = (min(1.0, max(0.0, m / n)) for m, n in zip(middles, shape, strict=True))
        return z, y, x


# ------------------------------------------------------------------------------------------------------------- sizes


def is_dummy_2d(patch: Sequence[int]) -> bool:
    """True for a 3D patch so flat that only its planes are rotated and scaled."""
    return len(patch) == 3 and max(patch) / patch[0] > DUMMY_2D_RATIO


def rotation_limit(patch: Sequence[int]) -> float:
    """Largest rotation in radians: ±30° in 3D, ±180° in plane, ±15° in a long 2D patch."""
    if len(patch) == 3:
        return math.pi if is_dummy_2d(patch) else math.radians(30)
    return math.radians(15) if max(patch) / min(patch) > 1.5 else math.pi


def initial_patch(patch: Sequence[int]) -> tuple[int, ...]:
    """Patch that is read before rotation and scaling; as long as `patch`, at least as large on every axis.

    The patch's far corner is rotated about each axis by the limit (at most 90°); per axis the largest coordinate
    counts, divided by 0.85 and cut to an integer.
    """
    angle = min(rotation_limit(patch), math.pi / 2)
    cos, sin = math.cos(angle), math.sin(angle)
    corner = [float(size) for size in patch]
    largest = list(corner)
    # (first axis, second axis, sign): the plane of each rotation and its sense in batchgenerators' rotate_coords
    planes = [(0, 1, 1)] if len(corner) == 2 else [(1, 2, 1), (0, 2, -1), (0, 1, 1)]
    for a, b, sign in planes:
        turned = {a: cos * corner[a] + sign * sin * corner[b], b: cos * corner[b] - sign * sin * corner[a]}
        for axis, value in turned.items():
            largest[axis] = max(largest[axis], abs(value))
    sizes = [int(value / SMALLEST_SCALE) for value in largest]
    if is_dummy_2d(patch):
        sizes[0] = patch[0]
    return tuple(sizes)


def patch_sizes(patch: Sequence[int], room_for_rotation: bool = True) -> PatchSizes:
    """Final and initial patch with three axes; without room for rotation both are the same."""
    initial = initial_patch(patch) if room_for_rotation else tuple(patch)
    lead = (1,) * (3 - len(patch))
    final_zyx, initial_zyx = (*lead, *patch), (*lead, *initial)
    return PatchSizes((final_zyx[0], final_zyx[1], final_zyx[2]), (initial_zyx[0], initial_zyx[1], initial_zyx[2]))


# ------------------------------------------------------------------------------------------------------------- places


def is_forced_foreground(index: int, count: int, draw: float) -> bool:
    """Whether sample `index` of `count` must contain foreground: the last third, as in nnU-Net.

    Where the rule forces no sample at all (count 1), the sample is forced with the same probability instead;
    `draw` is a uniform number in [0, 1) for that.
    """
    free = round(count * (1 - FOREGROUND_SHARE))
    return index >= free if free < count else draw < FOREGROUND_SHARE


def start_bounds(shape: Sequence[int], sizes: PatchSizes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lowest and highest start of the initial patch per axis, both included.

    The final patch may just touch the borders of the case; where the case is smaller than the initial patch, it lies
    about in its middle.
    """
    lower, upper = [], []
    for extent, final, initial in zip(shape, sizes.final, sizes.initial, strict=True):
        pad = max(initial - final, initial - extent)
        lower.append(-((pad + 1) // 2))
        upper.append(extent + pad // 2 + pad % 2 - initial)
    return tuple(lower), tuple(upper)


def uniform_place(rng: np.random.Generator, shape: Sequence[int], sizes: PatchSizes) -> Place:
    """A place drawn uniformly from all that `start_bounds` allows."""
    lower, upper = start_bounds(shape, sizes)
    z, y, x = (int(rng.integers(low, high + 1)) for low, high in zip(lower, upper, strict=True))
    return Place((z, y, x), sizes)


def place_around(voxel: Sequence[int], shape: Sequence[int], sizes: PatchSizes) -> Place:
    """The place with the voxel in its middle, moved inward at the lower borders."""
    lower, _ = start_bounds(shape, sizes)
    z, y, x = (max(low, int(v) - i // 2) for low, v, i in zip(lower, voxel, sizes.initial, strict=True))
    return Place((z, y, x), sizes)


def choose_voxel(rng: np.random.Generator, locations: Locations) -> tuple[int, int, int] | None:
    """A random voxel of a random one of the classes that are present; None where none is."""
    present = [name for name, voxels in locations.items() if len(voxels)]
    if not present:
        return None
    voxels = locations[present[int(rng.integers(len(present)))]]
    z, y, x = (int(v) for v in voxels[int(rng.integers(len(voxels)))])
    return z, y, x
