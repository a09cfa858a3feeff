"""Where an image lies in space: the geometry of its file, and how its array was reoriented.

Two array orders occur. *Stored* is z,y,x as the file holds it. *Oriented* is what the rest of autossl sees: for "RAS",
the axes permuted and flipped so that x, y, z grow to the right, the front and the top; for "native", as stored.
Positions follow ITK's convention (LPS: x grows to the left, y to the back), as SimpleITK and 3D Slicer show them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from nibabel.orientations import io_orientation

from autossl.data.problems import InvalidInput, Problem

Orientation = Literal["RAS", "native"]
LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0])
FOREIGN_SLICE_SPACING = 999.0
"""Slice spacing of an image without slices, relative to its pixels; nnU-Net v2's value."""


@dataclass(frozen=True)
class Geometry:
    """The geometry of one image file, enough to write another array onto exactly the same grid."""

    kind: Literal["nibabel", "sitk", "natural"]
    """Which reader made it: NIfTI header by nibabel, SimpleITK, or a picture (PNG, BMP, TIFF)."""
    size_xyz: tuple[int, ...]
    """Voxels per axis as the file says; two entries for a 2D file."""
    spacing_xyz: tuple[float, ...]
    """In mm, of the stored axes x,y,z (always three)."""
    origin_xyz: tuple[float, ...]
    """Center of the first stored voxel, mm, LPS."""
    direction: tuple[float, ...]
    """Nine numbers, row by row; column i is the direction of stored axis i (x,y,z) in LPS."""
    spacing_zyx_mm: tuple[float, float, float]
    """Of the oriented array."""
    axes: tuple[int, int, int] = (0, 1, 2)
    """Oriented axis i (z,y,x) is stored axis axes[i]."""
    flips: tuple[bool, bool, bool] = (False, False, False)
    """True where oriented axis i runs against the stored axis."""
    stored_dtype: str = ""
    """Type of the numbers in the file, e.g. "uint8"."""
    header: Mapping[str, Any] = field(default_factory=dict)
    """Header fields of the file that a writer must repeat for the geometry to be the same bit by bit."""

    @property
    def stored_shape_zyx(self) -> tuple[int, int, int]:
        """Shape of the stored array; a 2D file has one slice."""
        z, y, x = ((*self.size_xyz, 1, 1)[:3])[::-1]
        return z, y, x

    @property
    def shape_zyx(self) -> tuple[int, int, int]:
        """Shape of the oriented array."""
        stored = self.stored_shape_zyx
        z, y, x = (stored[axis] for axis in self.axes)
        return z, y, x

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        """4×4, from stored voxel x,y,z to mm in RAS."""
        return ras_affine(self.spacing_xyz, self.origin_xyz, self.direction)

    def orient(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Oriented view of a stored array [..., z,y,x]; copies nothing."""
        lead = stored.ndim - 3
        moved = stored.transpose(*range(lead), *(lead + axis for axis in self.axes))
        return moved[(..., *(slice(None, None, -1 if flip else None) for flip in self.flips))]

    def restore(self, oriented: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Stored view of an oriented array [..., z,y,x]: undoes `orient`; copies nothing."""
        if oriented.shape[-3:] != self.shape_zyx:
            raise ValueError(f"the array is {oriented.shape}, the image it belongs to is {self.shape_zyx} (z,y,x)")
        lead = oriented.ndim - 3
        flipped = oriented[(..., *(slice(None, None, -1 if flip else None) for flip in self.flips))]
        return flipped.transpose(*range(lead), *(lead + axis for axis in np.argsort(self.axes)))

    def oriented_to_ras(self) -> Geometry:
        """The same file, its array to be reoriented to RAS+ as nibabel does it; 2D files stay as stored.

        Raises:
            InvalidInput: where the axes span no volume.
        """
        if len(self.size_xyz) == 2:
            return self
        axes, flips = _ras_axes(tuple(self.affine[:3, :3].ravel().tolist()))
        if axes == (0, 1, 2) and not any(flips):
            return self
        # nibabel takes a reoriented image's spacing from its affine and, in a NIfTI-1 header, rounds it to float32
        precision = np.float32 if self.header.get("sizeof_hdr") == 348 else np.float64
        exact = np.asarray(self.spacing_xyz, dtype=precision)[::-1].tolist()
        return replace(self, axes=axes, flips=flips, spacing_zyx_mm=(exact[axes[0]], exact[axes[1]], exact[axes[2]]))

    def differences(self, other: Geometry, tolerance: float = 1e-3) -> list[str]:
        """How another image's grid differs, as texts with both values; empty where they are the same.

        Args:
            other: the grid to compare with.
            tolerance: of spacing and origin relative to the spacing, and of the direction's entries.
        """
        found = []
        if self.stored_shape_zyx != other.stored_shape_zyx:
            found.append(f"size {_text(self.size_xyz)} against {_text(other.size_xyz)} voxels (x,y,z)")
        unit = np.asarray(self.spacing_xyz)
        for name, scale in (("spacing_xyz", unit), ("origin_xyz", unit.max()), ("direction", 1.0)):
            mine, others = np.asarray(getattr(self, name)), np.asarray(getattr(other, name))
            if np.any(np.abs(mine - others) > tolerance * scale):
                label = name.removesuffix("_xyz")
                found.append(f"{label} {_text(mine)} against {_text(others)}")
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives the same geometry back, bit by bit."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Geometry:
        """The geometry that `to_json` wrote.

        Raises:
            InvalidInput: where a key is missing or unknown.
        """
        known = {entry.name for entry in fields(cls)}
        if set(content) != known:
            raise InvalidInput(
                Problem(
                    f"a geometry with the keys {', '.join(sorted(content))}",
                    f"the keys {', '.join(sorted(known))}",
                    "preprocess the case again",
                )
            )
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()}
        return cls(**values)


def ras_affine(
    spacing_xyz: tuple[float, ...], origin_xyz: tuple[float, ...], direction: tuple[float, ...]
) -> npt.NDArray[np.float64]:
    """4×4 affine from stored voxel to mm in RAS, from ITK's spacing, origin and direction (LPS)."""
    affine = np.eye(4)
    affine[:3, :3] = LPS_FROM_RAS @ (np.reshape(direction, (3, 3)) * np.asarray(spacing_xyz))
    affine[:3, 3] = LPS_FROM_RAS @ np.asarray(origin_xyz)
    return affine


@lru_cache(maxsize=1024)
def _ras_axes(columns: tuple[float, ...]) -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """Axes and flips (z,y,x) that bring an array to RAS+; `columns` is the affine's 3×3 part, row by row."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(columns, (3, 3))
    to_ras = io_orientation(affine) if np.all(np.isfinite(affine)) else np.full((3, 2), np.nan)
    if np.any(np.isnan(to_ras)):
        raise InvalidInput(
            Problem(
                f"the header's axes span no volume: {np.round(affine[:3, :3], 6).tolist()}",
                "three independent directions with a spacing above 0",
                "repair the header",
            )
        )
    stored_xyz = np.argsort(to_ras[:, 0])
    axes = [2 - int(stored_xyz[2 - i]) for i in range(3)]
    flips = [bool(to_ras[stored_xyz[2 - i], 1] < 0) for i in range(3)]
    return (axes[0], axes[1], axes[2]), (flips[0], flips[1], flips[2])


def _text(values: Any) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in np.asarray(values, dtype=float)) + ")"
