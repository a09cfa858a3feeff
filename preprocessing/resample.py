"""Resampling of images and label maps to a new grid: the values that nnU-Net v2 gets, in a small part of its time.

nnU-Net resizes with scikit-image (scipy's spline zoom: edge mode, pixel areas aligned, no anti-aliasing, clipped to
the input's range). A spline zoom is linear and separable, so it is one matrix per axis, and zooming the identity
gives that matrix, with scipy's own treatment of the borders. Its weights fade by 0.27 per voxel: where they are
below 1e-8 they are left out, which turns the product into a few narrow ones. Label maps need no one-hot volumes: only
voxels whose neighbors differ are looked at, with scipy's order of summation, so that ties fall as they do there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

FloatArray = npt.NDArray[np.float32]
LabelArray = npt.NDArray[np.integer]

ANISOTROPY_THRESHOLD = 3.0  # nnU-Net v2
SMALLEST_WEIGHT = 1e-8  # measured: changes results by less than float32's own rounding
ROWS_PER_PRODUCT = 64  # measured on 2 cores at 256³ and 512³: 16 and 256 are slower
BOUNDARY_VOXELS_AT_ONCE = 1 << 15  # measured: 2¹² to 2¹⁶ are alike, 2¹⁹ leaves the cache and takes twice the time


def target_shape(
    shape: Sequence[int], spacing_mm: Sequence[float], target_spacing_mm: Sequence[float]
) -> tuple[int, ...]:
    """Voxels per axis at the target spacing, rounded half to even as nnU-Net does; spacings in the order of `shape`."""
    return tuple(round(old / new * n) for n, old, new in zip(shape, spacing_mm, target_spacing_mm, strict=True))


def find_coarse_axis(
    spacing_mm: Sequence[float], target_spacing_mm: Sequence[float], force_separate_z: bool | None = None
) -> int | None:
    """The one axis that is resampled apart from the others (nearest neighbor), None where there is none.

    It is the coarsest axis of the source or else of the target where that spacing is anisotropic by more than 3;
    two equally coarse axes are not separated. `force_separate_z` overrides the threshold, with the source's axis.
    """
    if force_separate_z is False:
        return None
    for spacing in (spacing_mm, target_spacing_mm):
        if force_separate_z or max(spacing) / min(spacing) > ANISOTROPY_THRESHOLD:
            coarsest = [axis for axis, value in enumerate(spacing) if value == max(spacing)]
            return coarsest[0] if len(coarsest) == 1 else None
    return None


def resample_image(
    image: npt.NDArray[np.floating], shape: Sequence[int], order: int = 3, coarse_axis: int | None = None
) -> FloatArray:
    """Spline interpolation of each channel to `shape`, clipped to the range of its input.

    Args:
        image: [C,z,y,x]; returned as it is where the shape is the same.
        shape: target [z,y,x].
        order: spline order 0 to 5.
        coarse_axis: axis 0 to 2 that takes the nearest slice; the others are then interpolated and clipped slice by
            slice. None: all axes are interpolated.

    Returns:
        float32 [C,*shape].
    """
    if tuple(image.shape[1:]) == tuple(shape):
        return image.astype(np.float32, copy=False)
    result = np.empty((image.shape[0], *shape), dtype=np.float32)
    for channel, volume in enumerate(image):
        result[channel] = _resample_volume(volume.astype(np.float32, copy=False), shape, order, coarse_axis)
    return result


def resample_label_map(
    label: LabelArray, shape: Sequence[int], order: int = 1, coarse_axis: int | None = None
) -> LabelArray:
    """The label with the largest interpolated share in each target voxel; no value appears that was not there.

    Shares that are equal go to the nearest neighbor's label if it is among them, else to the smallest (the rule of
    batchgenerators 0.25.5, which nnU-Net v2.8.1 resizes label maps with).

    Args:
        label: [z,y,x]; returned as it is where the shape is the same.
        order: 1 (linear shares) or 0 (nearest neighbor).
        coarse_axis: axis that takes the nearest slice, as in `resample_image`.

    Raises:
        ValueError: another order.
    """
    if order not in (0, 1):
        raise ValueError(f"order {order} for a label map; expected 0 (nearest) or 1 (linear)")
    if tuple(label.shape) == tuple(shape):
        return label
    if coarse_axis is not None:
        label = label.take(_nearest_slices(label.shape[coarse_axis], shape[coarse_axis]), axis=coarse_axis)
    nearest = label
    for axis, size in enumerate(shape):
        nearest = nearest.take(_nearest_voxels(label.shape[axis], size), axis=axis)
    return nearest if order == 0 else _largest_share(label, nearest)


def _resample_volume(volume: FloatArray, shape: Sequence[int], order: int, coarse_axis: int | None) -> FloatArray:
    clipped_axes = tuple(axis for axis in range(3) if axis != coarse_axis)
    index = None if coarse_axis is None else _nearest_slices(volume.shape[coarse_axis], shape[coarse_axis])
    if coarse_axis is not None and index is not None and len(index) < volume.shape[coarse_axis]:
        volume, index = volume.take(index, axis=coarse_axis), None
    result = volume
    # Shrinking axes first: the products after them are smaller.
    for axis in sorted(clipped_axes, key=lambda a: shape[a] / volume.shape[a]):
        if volume.shape[axis] != shape[axis]:
            result = _multiply_along(axis, _spline_bands(volume.shape[axis], shape[axis], order), result, shape[axis])
    if result is not volume:
        lowest = volume.min(axis=clipped_axes, keepdims=True)
        np.clip(result, lowest, volume.max(axis=clipped_axes, keepdims=True), out=result)
    if coarse_axis is not None and index is not None:
        result = result.take(index, axis=coarse_axis)
    return result


_Band = tuple[int, int, int, int, FloatArray]
"""Output rows from, to; input rows from, to; the weights between them."""


def _multiply_along(axis: int, bands: tuple[_Band, ...], volume: FloatArray, size: int) -> FloatArray:
    result = np.empty((*volume.shape[:axis], size, *volume.shape[axis + 1 :]), dtype=np.float32)
    for start, end, low, high, weights in bands:
        if axis == 0:
            rows = volume[low:high].reshape(high - low, -1)
            np.matmul(weights, rows, out=result[start:end].reshape(end - start, -1))
        elif axis == 1:
            np.matmul(weights, volume[:, low:high], out=result[:, start:end])
        else:
            np.matmul(volume[:, :, low:high], weights.T, out=result[:, :, start:end])
    return result


@lru_cache(maxsize=512)
def _spline_bands(old: int, new: int, order: int) -> tuple[_Band, ...]:
    matrix = _zoom_matrix(old, new, order)
    bands = []
    for start in range(0, new, ROWS_PER_PRODUCT):
        rows = matrix[start : start + ROWS_PER_PRODUCT]
        used = np.flatnonzero((np.abs(rows) > SMALLEST_WEIGHT).any(axis=0))
        low, high = int(used[0]), int(used[-1]) + 1
        bands.append((start, start + len(rows), low, high, np.ascontiguousarray(rows[:, low:high], dtype=np.float32)))
    return tuple(bands)


def _zoom_matrix(old: int, new: int, order: int) -> npt.NDArray[np.float64]:
    """[new, old] weights of one axis."""
    return ndimage.zoom(np.eye(old), (new / old, 1.0), order=order, mode="nearest", grid_mode=True)


@lru_cache(maxsize=512)
def _nearest_voxels(old: int, new: int) -> npt.NDArray[np.intp]:
    indices = np.arange(old, dtype=np.float64)
    return ndimage.zoom(indices, new / old, order=0, mode="nearest", grid_mode=True).astype(np.intp)


@lru_cache(maxsize=512)
def _nearest_slices(old: int, new: int) -> npt.NDArray[np.intp]:
    """As nnU-Net takes slices along the coarse axis; at ties it is another neighbor than `_nearest_voxels` takes."""
    places = old / new * (np.arange(new) + 0.5) - 0.5
    indices = np.arange(old, dtype=np.float64)
    return ndimage.map_coordinates(indices, places[None], order=0, mode="nearest").astype(np.intp)


@lru_cache(maxsize=512)
def _linear_taps(old: int, new: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """The two input voxels of each output voxel and their weights, both [2, new]; the weights as scipy rounds them."""
    places = (np.arange(new) + 0.5) * (old / new) - 0.5
    below = np.floor(places)
    taps = np.stack([below, below + 1]).clip(0, old - 1).astype(np.intp)
    return taps, np.stack([1 - (places - below), places - below])


def _largest_share(label: LabelArray, nearest: LabelArray) -> LabelArray:
    """The label of the largest share per target voxel; `nearest` [the target's shape] settles ties."""
    lowest = highest = label
    for axis, size in enumerate(nearest.shape):
        if label.shape[axis] != size:
            (first, second), _ = _linear_taps(label.shape[axis], size)
            lowest = np.minimum(lowest.take(first, axis=axis), lowest.take(second, axis=axis))
            highest = np.maximum(highest.take(first, axis=axis), highest.take(second, axis=axis))
    result = lowest.reshape(-1).copy()
    undecided = np.flatnonzero(lowest != highest)
    for start in range(0, len(undecided), BOUNDARY_VOXELS_AT_ONCE):
        voxels = undecided[start : start + BOUNDARY_VOXELS_AT_ONCE]
        values, weights = _surroundings(label, nearest.shape, voxels)
        pair = [lowest.reshape(-1)[voxels], highest.reshape(-1)[voxels]]
        near = nearest.reshape(-1)[voxels]
        winners = _winners(values, weights, pair, near)
        several = np.flatnonzero(((values != pair[0]) & (values != pair[1])).any(axis=0))
        if len(several):
            values, weights = values[:, several], weights[:, several]
            winners[several] = _winners(values, weights, list(values), near[several])
        result[voxels] = winners
    return result.reshape(nearest.shape)


def _surroundings(
    label: LabelArray, shape: Sequence[int], voxels: npt.NDArray[np.intp]
) -> tuple[LabelArray, npt.NDArray[np.float64]]:
    """Labels and weights [corners, n] of the input voxels around the target voxels (flat indices into `shape`)."""
    kind: Any = np.int32 if label.size <= np.iinfo(np.int32).max else np.int64  # half the memory traffic
    index = np.zeros((1, len(voxels)), dtype=kind)
    weights = np.ones((1, len(voxels)))
    for old, new, place in zip(label.shape, shape, np.unravel_index(voxels, shape), strict=True):
        index = index * kind(old)
        if old == new:
            index = index + place.astype(kind)
            continue
        taps, shares = _linear_taps(old, new)
        # Axis by axis, the last one fastest: scipy's order of products, so that equal shares stay exactly equal.
        index = (index[:, None] + taps.astype(kind).take(place, axis=1)).reshape(-1, len(voxels))
        weights = (weights[:, None] * shares.take(place, axis=1)).reshape(-1, len(voxels))
    return label.reshape(-1).take(index), weights


def _winners(
    values: LabelArray, weights: npt.NDArray[np.float64], candidates: Sequence[LabelArray], nearest: LabelArray
) -> LabelArray:
    """Per voxel the candidate with the largest sum of weights; ties: `nearest` if it is among them, else the lowest."""
    winner = candidates[0].copy()
    best = np.full(len(winner), -math.inf)
    nearest_wins = np.zeros(len(winner), dtype=bool)
    for candidate in candidates:
        share = np.zeros(len(winner))
        for value, weight in zip(values, weights, strict=True):
            share += weight * (value == candidate)
        better = share > best
        nearest_wins = (nearest_wins & ~better) | ((share >= best) & (candidate == nearest))
        winner = np.where(better | ((share == best) & (candidate < winner)), candidate, winner)
        np.maximum(best, share, out=best)
    return np.where(nearest_wins, nearest, winner)
