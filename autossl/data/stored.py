"""What one image file holds before anything is made of it, and the two ways in which it can disappoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autossl.data.geometry import Geometry
from autossl.data.problems import InvalidInput, Problem


@dataclass(frozen=True)
class StoredImage:
    """The numbers of one file [C,z,y,x] as stored (may be a read-only view) and what turns them into intensities."""

    voxels: npt.NDArray[Any]
    geometry: Geometry
    slope: float = 1.0
    intercept: float = 0.0

    def write_intensities(self, target: npt.NDArray[np.float32], geometry: Geometry) -> None:
        """Fills target [C,z,y,x] with slope × voxel + intercept, oriented by `geometry`."""
        source = geometry.orient(self.voxels)
        if self.slope == 1 and self.intercept == 0:
            np.copyto(target, source, casting="unsafe")
            return
        for part, into in zip(
            source.reshape(-1, *source.shape[2:]), target.reshape(-1, *target.shape[2:]), strict=True
        ):
            into[...] = part.astype(np.float64) * self.slope + self.intercept  # slice by slice: bounded memory

    def label_map(self, geometry: Geometry) -> npt.NDArray[Any]:
        """The single channel [z,y,x], oriented, scaled, contiguous; a copy, in the file's own type if not scaled."""
        values = geometry.orient(self.voxels[0])
        if self.slope == 1 and self.intercept == 0:
            return np.array(values, dtype=values.dtype.newbyteorder("="), order="C")
        return values.astype(np.float64) * self.slope + self.intercept


def unreadable(path: Path, found: str) -> InvalidInput:
    """The error for a file that cannot be read."""
    return InvalidInput(Problem(found, "a complete, readable image", "copy or export the file again", file=path))


def not_one_image(path: Path, found: str) -> InvalidInput:
    """The error for a file that holds something else than one real-valued image."""
    return InvalidInput(
        Problem(
            found,
            "one 3D (or 2D) image of real numbers per file",
            "split channels and time points into files of their own (CASE_0000, CASE_0001, …)",
            file=path,
        )
    )
