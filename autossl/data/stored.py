"""What one image file holds before anything is made of it, and the ways in which it can disappoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autossl.data.geometry import Geometry
from autossl.data.parallel import free_memory
from autossl.data.problems import InvalidInput, Problem

MAX_INFLATION = 1040
"""Unpacked bytes per byte of a file; deflate reaches 1032, so a header that claims more cannot be true."""
UNCHECKED_BYTES = 64 << 20
"""Images below this size are read without asking how much memory is free."""
SPACING_RANGE_MM = (1e-6, 1e6)
SMALLEST_VOLUME = 1e-3
"""Of the box that three unit directions span; 1 where they are at right angles."""


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
        with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold becomes infinite, and is told so
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


def check_claim(path: Path, shape: Sequence[int], itemsize: int, inflation: int = MAX_INFLATION) -> None:
    """Whether an image of the size that a header claims can be in the file and in memory, before memory is taken.

    Args:
        path: of the file.
        shape: voxels per axis, and numbers per voxel where there are several.
        itemsize: bytes of a number.
        inflation: how many bytes one byte of the file can stand for at most.

    Raises:
        InvalidInput: the file is too small to hold it, or it takes more memory than is free.
    """
    voxels = math.prod(int(n) for n in shape)
    claimed, there = voxels * itemsize, path.stat().st_size
    size = f"the header claims {' x '.join(str(n) for n in shape)} voxels of {itemsize} bytes"
    if claimed > there * inflation:
        raise unreadable(path, f"{size}, the file has {there:,} bytes")
    needed = claimed + 4 * voxels  # as stored, and as float32
    if needed > UNCHECKED_BYTES and needed > (free := free_memory()):
        raise InvalidInput(
            Problem(
                f"{size}, which take {needed / 2**30:.1f} GiB of memory; {free / 2**30:.1f} GiB are free",
                "an image that fits into memory",
                "free memory or use a larger machine; where the size is wrong, export the file again",
                file=path,
            )
        )


def check_axes(path: Path, spacing: Sequence[float], directions: npt.NDArray[np.floating]) -> None:
    """Whether voxels have a size that can be, and axes that span a volume.

    Args:
        path: of the file.
        spacing: in mm, one per axis.
        directions: [3,3], its columns the directions of the axes; their lengths do not count.

    Raises:
        InvalidInput: a spacing that is zero, negative, not finite or out of all proportion, or axes in one plane.
    """
    smallest, largest = SPACING_RANGE_MM
    if not all(smallest <= value <= largest for value in spacing):
        raise InvalidInput(
            Problem(
                f"a spacing of {' x '.join(f'{value:.6g}' for value in spacing)} mm (x,y,z)",
                f"positive numbers from {smallest:g} to {largest:g}",
                "repair the spacing in the header, or export the file again",
                file=path,
            )
        )
    lengths = np.linalg.norm(directions, axis=0)
    volume = np.linalg.det(directions / lengths) if np.all(lengths > 0) and np.all(np.isfinite(lengths)) else 0.0
    if not abs(volume) >= SMALLEST_VOLUME:
        raise unreadable(path, f"a header whose axes span no volume: {np.round(directions, 6).tolist()}")


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
