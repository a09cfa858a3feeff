"""How many stages a U-Net gets, and the patch it is trained on, by nnU-Net v2's rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autossl.planners.spacing import FloatArray

MIN_EDGE = 4
"""Smallest edge of the bottleneck's feature map, voxels (nnU-Net v2)."""
START_VOXELS = {2: 2048**2, 3: 256**3}
"""Volume of the patch that the shrinking starts from (nnU-Net v2)."""


@dataclass(frozen=True)
class Topology:
    """A U-Net's strides and kernels per stage for a patch; the first stage keeps the resolution."""

    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    patch_size: tuple[int, ...]
    divisors: tuple[int, ...]
    """2^(number of poolings) per axis; the patch is a multiple of it."""

    @property
    def n_stages(self) -> int:
        """Resolution stages, the bottleneck included."""
        return len(self.strides)

    @property
    def voxels(self) -> int:
        """Voxels of the patch."""
        return math.prod(self.patch_size)


def derive_topology(spacing: Sequence[float], patch_size: Sequence[float]) -> Topology:
    """Pools each axis while it is long enough and no more than twice as coarse as the finest one that can be pooled.

    Args:
        spacing: mm per axis.
        patch_size: voxels per axis; padded up to what the poolings need.
    """
    dims = len(spacing)
    now, size = [float(value) for value in spacing], [float(value) for value in patch_size]
    kernel, divisors = [1] * dims, [1] * dims
    strides: list[tuple[int, ...]] = [(1,) * dims]
    kernels: list[tuple[int, ...]] = []
    while pooled := _axes_to_pool(now, size):
        finest = min(now)
        kernel = [3 if k == 3 or s / finest < 2 else 1 for k, s in zip(kernel, now, strict=True)]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if axis in pooled else 1 for axis in range(dims)))
        for axis in pooled:
            now[axis] *= 2
            size[axis] = math.ceil(size[axis] / 2)
            divisors[axis] *= 2
    kernels.append((3,) * dims)
    padded = tuple(math.ceil(edge / divisor) * divisor for edge, divisor in zip(patch_size, divisors, strict=True))
    return Topology(tuple(strides), tuple(kernels), padded, tuple(divisors))


def start_patch(spacing: Sequence[float], median_shape: Sequence[float]) -> tuple[float, ...]:
    """The patch before shrinking: edges proportional to 1/spacing, no larger than the median image."""
    inverse: FloatArray = 1 / np.asarray(spacing, dtype=np.float64)
    dims = len(spacing)
    edges = inverse * (START_VOXELS[dims] / np.prod(inverse)) ** (1 / dims)
    return tuple(min(round(float(edge)), float(limit)) for edge, limit in zip(edges, median_shape, strict=True))


def shrink_to_fit(
    spacing: Sequence[float], median_shape: Sequence[float], too_large: Callable[[Topology], bool]
) -> tuple[Topology, int]:
    """Shrinks the axis that covers most of the median image, again and again, until the patch is not too large.

    Returns:
        The topology of the patch that fits, and the number of reductions.
    """
    topology = derive_topology(spacing, start_patch(spacing, median_shape))
    reductions = 0
    while too_large(topology):
        topology = _reduced(topology, spacing, median_shape)
        reductions += 1
    return topology, reductions


def _reduced(topology: Topology, spacing: Sequence[float], median_shape: Sequence[float]) -> Topology:
    patch = list(topology.patch_size)
    reducible = [a for a in range(len(patch)) if patch[a] > topology.divisors[a]]
    if not reducible:
        raise ValueError(f"patch {topology.patch_size} cannot be reduced any further")
    # the last of equals, as a stable sort by the covered share leaves it
    axis = max(reducible, key=lambda a: (patch[a] / median_shape[a], a))
    # The divisor of the smaller patch counts: 256 with divisor 64 becomes 224 (divisor 32), not 192.
    trial = list(patch)
    trial[axis] -= topology.divisors[axis]
    smaller = list(patch)
    smaller[axis] -= derive_topology(spacing, trial).divisors[axis]
    result = derive_topology(spacing, smaller)
    # Padding could bring the old patch back; then the larger step is taken, which always ends.
    return result if result.voxels < topology.voxels else derive_topology(spacing, trial)


def _axes_to_pool(spacing: Sequence[float], size: Sequence[float]) -> list[int]:
    long_enough = [axis for axis in range(len(size)) if size[axis] >= 2 * MIN_EDGE]
    if not long_enough:
        return []
    finest = min(spacing[axis] for axis in long_enough)
    pooled = [axis for axis in long_enough if spacing[axis] / finest < 2]
    if len(pooled) == 1 and size[pooled[0]] < 3 * MIN_EDGE:
        return []
    return pooled
