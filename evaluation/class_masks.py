"""One class of one case as masks of its own box, so that no metric looks at more of a volume than it must."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from autossl.data.labels import LabelSchema

LabelMap = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]
Box = tuple[slice, ...]


@dataclass(frozen=True)
class ClassMasks:
    """A class or region in the box around both of its masks and a voxel more, [z,y,x]; nothing of it lies outside."""

    prediction: Mask
    reference: Mask
    ignored: Mask | None
    """Voxels that the reference leaves without annotation; None where the schema knows no such label."""
    box: Box
    """Where the masks lie in the label maps."""


def class_masks(prediction: LabelMap, reference: LabelMap, schema: LabelSchema) -> Iterator[tuple[str, ClassMasks]]:
    """Masks of every foreground class or region, one at a time; where both are empty, the box is.

    Args:
        prediction: [z,y,x], declared values only.
        reference: [z,y,x], declared values only.
        schema: What the values mean.
    """
    boxes = [_boxes_of_values(label_map, max(schema.values)) for label_map in (prediction, reference)]
    for name, values in schema.foreground.items():
        own = [box for found in boxes for value in values if (box := found[value]) is not None]
        around = _grown(own, prediction.shape)
        ignored = None if schema.ignore_label is None else reference[around] == schema.ignore_label
        yield name, ClassMasks(_mask(prediction[around], values), _mask(reference[around], values), ignored, around)


def box_around(array: npt.NDArray[Any]) -> Box:
    """The smallest box that holds everything but zeros; empty slices where there is nothing else."""
    box: list[slice] = []
    for axis in range(array.ndim):  # what was found narrows what the next axes have to look at
        inside = array[tuple(box)]
        filled = np.flatnonzero(inside.any(axis=tuple(other for other in range(array.ndim) if other != axis)))
        box.append(slice(int(filled[0]), int(filled[-1]) + 1) if len(filled) else slice(0, 0))
    return tuple(box)


def union_of(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds all boxes; there must be one."""
    return tuple(slice(min(s.start for s in own), max(s.stop for s in own)) for own in zip(*boxes, strict=True))


def _boxes_of_values(label_map: LabelMap, largest: int) -> list[Box | None]:
    """Box of each value 0..largest, None for those that do not occur (and for 0)."""
    return [None, *ndimage.find_objects(label_map, max_label=max(largest, 1))]


def _grown(boxes: Sequence[Box], shape: tuple[int, ...]) -> Box:
    """Union of the boxes and one voxel more on each side, within the shape."""
    if not boxes:
        return (slice(0, 0),) * len(shape)
    around = union_of(boxes)
    return tuple(slice(max(s.start - 1, 0), min(s.stop + 1, n)) for s, n in zip(around, shape, strict=True))


def _mask(label_map: LabelMap, values: Sequence[int]) -> Mask:
    mask = label_map == values[0]
    for value in values[1:]:
        mask |= label_map == value
    return mask
