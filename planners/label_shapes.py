"""What a label map says about the shape of each class: volume, components, and how well an ellipse describes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
import numpy.typing as npt
from scipy.ndimage import find_objects

from autossl.data.labels import LabelSchema

MIN_VOXELS_OF_ELLIPSE = 20
MAX_VOXELS_OF_ELLIPSE = 2**18
"""A class whose box is larger is measured on every second, fourth, … voxel (the finest axes first)."""

Box = tuple[slice, ...]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ClassShape:
    """Of one class in one case."""

    voxels: int
    components: int
    """Connected by faces, edges or corners (26 neighbors; 8 in 2D); 0 where the class is absent."""
    largest_share: float
    """Voxels of the largest component / voxels of the class; 0 where the class is absent."""
    ellipse_dice: float | None
    """See `ellipse_dice`; None below 20 voxels."""


def class_shapes(
    label_map: npt.NDArray[np.integer], schema: LabelSchema, spacing_zyx_mm: Sequence[float]
) -> dict[str, ClassShape]:
    """Shape figures per foreground class (or region) of a label map.

    Args:
        label_map: [z,y,x], declared values only; z = 1 for a 2D image.
        schema: names and values; the ignore label belongs to no class.
        spacing_zyx_mm: voxel size.
    """
    boxes = find_objects(np.maximum(label_map, 0), max_label=max(schema.values))
    shapes = {}
    for name, values in schema.foreground.items():
        box = _union([boxes[value - 1] for value in values if value > 0])
        shapes[name] = _shape_in_box(label_map[box], values, spacing_zyx_mm) if box else ClassShape(0, 0, 0.0, None)
    return shapes


def component_sizes(mask: Mask) -> npt.NDArray[np.intp]:
    """Voxels of each connected component (26 neighbors; 8 in 2D), the largest first; empty for an empty mask."""
    # numbers, not booleans: cc3d 4.1.1 connects boolean images over corners wrongly where a side is odd
    components = cc3d.connected_components(mask.astype(np.uint8), connectivity=26)
    return np.sort(np.bincount(components.ravel())[1:])[::-1]


def ellipse_dice(mask: Mask, spacing_zyx_mm: Sequence[float]) -> float | None:
    """How elliptic a mask is: its Dice overlap with the ellipse (3D: ellipsoid) of the same moments, in mm.

    With μ the mean and Σ the covariance of the mask's points in d dimensions (voxel centers, plus spacing²/12 on the
    diagonal for the extent of a voxel), a solid ellipsoid with the same μ and Σ is {x: (x-μ)ᵀ Σ⁻¹ (x-μ) ≤ d + 2}. It is
    rasterized on the grid, beyond the image where it reaches beyond. Dice = 2 |mask ∩ ellipsoid| / (|mask| +
    |ellipsoid|). Exact values in the limit: ellipse 1, square 0.905, cube 0.836, equilateral triangle 0.796.

    Args:
        mask: [z,y,x]; z = 1 is a 2D image and its slice spacing is not used.
        spacing_zyx_mm: voxel size.

    Returns:
        Dice from 0 to 1; None where the mask has fewer than 20 voxels.
    """
    if np.count_nonzero(mask) < MIN_VOXELS_OF_ELLIPSE:
        return None
    steps = steps_for(mask.shape, MAX_VOXELS_OF_ELLIPSE, spacing_zyx_mm)
    mask = mask[tuple(slice(None, None, step) for step in steps)]
    spacing = np.asarray(spacing_zyx_mm, dtype=np.float64) * steps
    if mask.shape[0] == 1 and steps[0] == 1:
        mask, spacing = mask[0], spacing[1:]
    indices = np.argwhere(mask)
    if len(indices) < MIN_VOXELS_OF_ELLIPSE:
        return None
    points = indices * spacing
    center: npt.NDArray[np.float64] = points.mean(0)
    covariance: npt.NDArray[np.float64] = np.cov(points.T, bias=True) + np.diag(spacing**2 / 12)
    squared_radius = mask.ndim + 2
    reach = np.sqrt(squared_radius * np.diag(covariance))
    first = np.ceil((center - reach) / spacing).astype(int)
    last = np.floor((center + reach) / spacing).astype(int)
    inside = _quadratic_form(first, last, spacing, center, covariance) <= squared_radius
    visible = tuple(slice(max(0, a), b + 1) for a, b in zip(first, last, strict=True))
    shifted = tuple(slice(s.start - a, None) for s, a in zip(visible, first, strict=True))
    seen = mask[visible]
    common = np.count_nonzero(inside[shifted][tuple(slice(n) for n in seen.shape)] & seen)
    return float(2 * common / (len(indices) + np.count_nonzero(inside)))


def steps_for(shape: Sequence[int], limit: int, spacing_zyx_mm: Sequence[float] | None = None) -> tuple[int, ...]:
    """Step per axis, powers of 2, that leaves at most `limit` of an array's entries; the longest axis is thinned first.

    Args:
        shape: of the array.
        limit: entries to keep at most.
        spacing_zyx_mm: where given, the axis with the smallest resulting spacing is thinned first (axes down to 8
            entries are left alone as long as others are longer).
    """
    steps = [1] * len(shape)

    def kept(axis: int) -> int:
        return -(-shape[axis] // steps[axis])

    while math.prod(kept(axis) for axis in range(len(shape))) > limit:
        long = [axis for axis in range(len(shape)) if kept(axis) > 8] or list(range(len(shape)))
        finest = (
            max(long, key=kept)
            if spacing_zyx_mm is None
            else min(long, key=lambda axis: (spacing_zyx_mm[axis] * steps[axis], -kept(axis)))
        )
        steps[finest] *= 2
    return tuple(steps)


def _shape_in_box(part: npt.NDArray[np.integer], values: tuple[int, ...], spacing: Sequence[float]) -> ClassShape:
    mask = part == values[0] if len(values) == 1 else np.isin(part, values)
    sizes = component_sizes(mask)
    total = int(sizes.sum())
    if total == 0:
        return ClassShape(0, 0, 0.0, None)
    return ClassShape(total, len(sizes), float(sizes[0] / total), ellipse_dice(mask, spacing))


def _union(boxes: Sequence[Box | None]) -> Box | None:
    present = [box for box in boxes if box is not None]
    if not present:
        return None
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*present, strict=True))


def _quadratic_form(
    first: npt.NDArray[np.int_],
    last: npt.NDArray[np.int_],
    spacing: npt.NDArray[np.float64],
    center: npt.NDArray[np.float64],
    covariance: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """(x-μ)ᵀ Σ⁻¹ (x-μ) at all grid points from index `first` to `last`."""
    dims = len(spacing)
    matrix = np.linalg.inv(covariance)
    axes = []
    for axis in range(dims):
        offsets = np.arange(first[axis], last[axis] + 1) * spacing[axis] - center[axis]
        axes.append(offsets.reshape([-1 if other == axis else 1 for other in range(dims)]))
    result = np.zeros(())
    for i in range(dims):
        for j in range(i, dims):
            result = result + (1 if i == j else 2) * matrix[i, j] * axes[i] * axes[j]
    return result
