"""Shapes as numbers: the normalized signed distance map of a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage


def signed_distance(
    mask: npt.NDArray[np.bool_], spacing: Sequence[float], mode: Literal["full", "slice"] = "full"
) -> npt.NDArray[np.float32]:
    """Signed distance in [-1, 1]: negative inside, 0 on the inner boundary, each side divided by its largest distance.

    phi = d_out / max d_out - d_in / max d_in with Euclidean distances in mm; voxels of the mask with a face neighbor
    outside it get 0. The border of the array is no boundary. An empty mask gives +1, a full one -1 everywhere.
    Source: Luo et al., AAAI 2021 (dual-task consistency); the empty and the full mask are ours.

    Args:
        mask: boolean, 2 or 3 axes.
        spacing: mm per axis of the mask.
        mode: "slice": each plane across the axis with the largest spacing for itself, for 3D data that is much coarser
            there.
    """
    if mode == "slice" and mask.ndim == 3:
        across = int(np.argmax(spacing))
        in_plane = [mm for axis, mm in enumerate(spacing) if axis != across]
        return np.stack([signed_distance(plane, in_plane) for plane in np.moveaxis(mask, across, 0)], axis=across)
    if not mask.any():
        return np.ones(mask.shape, dtype=np.float32)
    if mask.all():
        return np.full(mask.shape, -1, dtype=np.float32)
    distance = ndimage.distance_transform_edt(~mask, sampling=spacing)
    distance /= distance.max()
    box = _box_with_margin(mask)
    inside = ndimage.distance_transform_edt(mask[box], sampling=spacing)
    inside /= inside.max()
    distance[box] -= inside
    distance[box][mask[box] & ~ndimage.binary_erosion(mask[box], border_value=1)] = 0
    return distance.astype(np.float32)


def _box_with_margin(mask: npt.NDArray[np.bool_]) -> tuple[slice, ...]:
    """The mask's bounding box and a voxel more on each side: what is nearest outside to a voxel inside lies in it."""
    (box,) = ndimage.find_objects(mask.astype(np.uint8))
    return tuple(slice(max(0, axis.start - 1), axis.stop + 1) for axis in box)
