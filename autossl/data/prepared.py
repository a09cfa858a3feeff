"""What preprocessing makes of a case, and what is needed to bring a prediction back to the case's own grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from autossl.data.geometry import Geometry
from autossl.data.problems import InvalidInput, Problem

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]

ANNOTATED = "annotated"
"""Name, among the classes of the voxel locations, of all voxels that carry an annotation (ignore label in use)."""


@dataclass(frozen=True)
class CaseProperties:
    """How a prepared array lies in the image it came from. All but the geometry are in transposed axis order.

    From the image to the prepared array: transpose, crop, resample. Back: resample to `shape_after_crop`, place into
    zeros of `shape_before_crop` at `crop_box`, transpose by `transpose_backward`, write with `geometry`.
    """

    geometry: Geometry
    """Of the (first) image file: size, spacing, origin, direction and reorientation."""
    transpose_forward: Shape
    """Axis i of the transposed array is axis transpose_forward[i] of the oriented image."""
    spacing_mm: Spacing
    """Of the image before resampling."""
    target_spacing_mm: Spacing
    """Of the prepared array, as planned; a 2d configuration keeps the case's own spacing on the first axis."""
    shape_before_crop: Shape
    crop_box: Box
    """Start and end (exclusive) per axis of what was kept, in voxels of the uncropped array."""
    shape: Shape
    """Of the prepared array."""
    has_nonzero_mask: bool
    """Whether a mask of the nonzero region belongs to the case (a channel was normalized within it)."""
    values_hash: str
    """Of all parameters that decide the values, the case's own slice spacing included."""

    @property
    def shape_after_crop(self) -> Shape:
        """Shape between cropping and resampling."""
        (z0, z1), (y0, y1), (x0, x1) = self.crop_box
        return z1 - z0, y1 - y0, x1 - x0

    @property
    def transpose_backward(self) -> Shape:
        """Undoes `transpose_forward`."""
        z, y, x = (self.transpose_forward.index(axis) for axis in range(3))
        return z, y, x

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives the same properties back."""
        content = {key: _as_lists(value) for key, value in asdict(self).items()}
        return content | {"geometry": self.geometry.to_json()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CaseProperties:
        """The properties that `to_json` wrote.

        Raises:
            InvalidInput: where a key is missing or unknown.
        """
        known = {entry.name for entry in fields(cls)}
        if set(content) != known:
            raise InvalidInput(
                Problem(
                    f"case properties with the keys {', '.join(sorted(content))}",
                    f"the keys {', '.join(sorted(known))}",
                    "preprocess the case again",
                )
            )
        values: dict[str, Any] = {key: _as_tuples(value) for key, value in content.items() if key != "geometry"}
        return cls(geometry=Geometry.from_json(content["geometry"]), **values)


@dataclass(frozen=True)
class PreparedCase:
    """A preprocessed case; arrays in transposed axis order at the target spacing."""

    image: npt.NDArray[np.float32]
    """[C,z,y,x], normalized."""
    properties: CaseProperties
    label: npt.NDArray[np.integer[Any]] | None = None
    """[z,y,x], int8 or int16 where a value needs it."""
    nonzero: npt.NDArray[np.bool_] | None = None
    """[z,y,x]; outside of it the image was not normalized. None where no channel is normalized within it."""
    locations: Mapping[str, npt.NDArray[np.integer[Any]]] | None = None
    """Class or region name → sampled voxels [n,3] of the label; only of labeled cases."""


def _as_lists(value: Any) -> Any:
    return [_as_lists(entry) for entry in value] if isinstance(value, tuple) else value


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(entry) for entry in value) if isinstance(value, list) else value
