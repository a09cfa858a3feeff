"""Cropping to the region where any channel is nonzero, and the mask of that region, as nnU-Net v2 defines them."""

from __future__ import annotations

from typing import Any

import cc3d
import numpy as np
import numpy.typing as npt

from autossl.data.prepared import Box


def nonzero_box(image: npt.NDArray[Any]) -> Box:
    """The smallest box around all voxels that are nonzero in any channel; the whole volume where there is none.

    Args:
        image: [C,z,y,x].

    Returns:
        Start and end (exclusive) per axis.
    """
    (z0, z1), (y0, y1), (x0, x1) = (_extent(image, axis) for axis in range(3))
    return (z0, z1), (y0, y1), (x0, x1)


def crop(array: npt.NDArray[Any], box: Box) -> npt.NDArray[Any]:
    """View of [..., z, y, x] inside the box."""
    (z0, z1), (y0, y1), (x0, x1) = box
    return array[..., z0:z1, y0:y1, x0:x1]


def nonzero_region(image: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Voxels that are nonzero in any channel, with enclosed holes filled.

    A hole is a zero region that no path through face neighbors connects with the border of the volume. Cropping to
    `nonzero_box` first does not change the result: what it cuts off is connected with the border.

    Args:
        image: [C,z,y,x].

    Returns:
        [z,y,x].
    """
    nonzero = (image != 0).any(axis=0)
    if nonzero.all():
        return nonzero
    regions = cc3d.connected_components(~nonzero, connectivity=6)
    faces = [regions.take(side, axis=axis).ravel() for axis in range(3) for side in (0, -1)]
    is_outside = np.zeros(int(regions.max()) + 1, dtype=bool)
    for face in faces:
        is_outside[face] = True
    is_outside[0] = False  # cc3d numbers what is nonzero in the image as 0
    inside: npt.NDArray[np.bool_] = ~is_outside[regions]
    return inside


def _extent(image: npt.NDArray[Any], axis: int) -> tuple[int, int]:
    n = image.shape[axis + 1]
    planes = np.moveaxis(image, axis + 1, 0)
    start = next((i for i in range(n) if planes[i].any()), None)
    if start is None:
        return 0, n
    return start, next(i for i in range(n, 0, -1) if planes[i - 1].any())
