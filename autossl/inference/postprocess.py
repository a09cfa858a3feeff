"""Rules that tidy a predicted label map: pure functions of arrays. `autossl.evaluation.postprocessing` finds them.

Components are connected by faces, edges or corners (26 neighbors; 8 in an image of one slice), holes by faces only.
Nothing here depends on how the array is turned or flipped, so that a case gets the same result however it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import cc3d
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from autossl.data.geometry import FOREIGN_SLICE_SPACING
from autossl.data.labels import LabelSchema
from autossl.data.problems import InvalidInput, Problem, nearest

LabelMap = npt.NDArray[np.integer[Any]]
Mask = npt.NDArray[np.bool_]
Box = tuple[slice, ...]
Keeps = Callable[[npt.NDArray[np.int64]], Mask]
"""Voxels of each component → which of them stay."""
Kind = Literal["keep_largest", "keep_largest_foreground", "min_size_mm3", "fill_holes"]


class Rule(BaseModel):
    """One rule, as postprocessing.json and inference_plan.json hold it.

    - keep_largest: of the class only its largest component stays.
    - keep_largest_foreground: of everything that is not background only the largest component stays.
    - min_size_mm3: components of the class below `value` mm³ go. An image without slices counts as 1 mm thick, so that
      `value` is an area there: in mm², of pictures in pixels.
    - fill_holes: what the class encloses on all sides becomes part of it, except voxels of another class.

    Components that tie for the largest all stay. A voxel that leaves a class becomes background; one that leaves a
    region stays in as many of its other regions as some label value stands for (that of a tumor's core becomes edema).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Kind
    class_name: str | None = None
    """A class or region of dataset.json; None: each of them in turn (keep_largest_foreground is for none)."""
    value: float | None = Field(default=None, gt=0)
    """In mm³, of min_size_mm3 alone."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Rule:
        if (self.value is None) == (self.kind == "min_size_mm3"):
            raise ValueError(f"{self.kind} {'needs a value in mm³' if self.value is None else 'takes no value'}")
        if self.kind == "keep_largest_foreground" and self.class_name is not None:
            raise ValueError("keep_largest_foreground takes no class_name: it is about all of them together")
        return self

    def __str__(self) -> str:
        of = self.class_name or "each class"
        if self.kind == "keep_largest_foreground":
            return "keep the largest component of all foreground"
        if self.kind == "keep_largest":
            return f"keep the largest component of {of}"
        return f"fill the holes of {of}" if self.value is None else f"drop components of {of} below {self.value:g} mm³"


def check_rules(rules: Sequence[Rule], schema: LabelSchema) -> None:
    """Whether the rules are about classes that there are.

    Raises:
        InvalidInput: naming every rule that is not.
    """
    problems = [
        Problem(
            f"postprocessing rule {number}, {rule}: there is no class '{rule.class_name}'",
            f"one of {nearest(rule.class_name, schema.foreground)}",
            "use rules that were found for these labels",
        )
        for number, rule in enumerate(rules, start=1)
        if rule.class_name is not None and rule.class_name not in schema.foreground
    ]
    if problems:
        raise InvalidInput(problems)


def apply_rules(
    label_map: LabelMap, rules: Sequence[Rule], schema: LabelSchema, spacing_zyx_mm: Sequence[float]
) -> LabelMap:
    """The label map after the rules, one after the other; a new array of the same type.

    Args:
        label_map: [z,y,x]; z = 1 for a 2D image. The ignore value and undeclared ones are left alone.
        rules: in the order in which they are applied.
        schema: what the values mean.
        spacing_zyx_mm: voxel size, in the order of the array's axes.

    Raises:
        InvalidInput: a rule names a class that the schema does not have.
    """
    check_rules(rules, schema)
    result = np.array(label_map)
    work, voxel_mm3 = _Work.of(result, schema), voxel_size_mm3(result.shape, spacing_zyx_mm)
    for rule in rules:
        work.apply(rule, voxel_mm3)
    return result


def voxel_size_mm3(shape: Sequence[int], spacing_zyx_mm: Sequence[float]) -> float:
    """Volume of a voxel; an image without slices (which readers give a slice spacing of 999 pixels) is 1 mm thick."""
    z, y, x = spacing_zyx_mm
    without_slices = shape[0] == 1 and z >= FOREIGN_SLICE_SPACING * max(y, x) * (1 - 1e-6)
    return float(y * x * (1.0 if without_slices else z))


def tight_box(mask: Mask) -> Box | None:
    """The smallest box that holds all of the mask; None where it is empty."""
    box: list[slice] = []
    for axis in range(mask.ndim):
        there = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not len(there):
            return None
        box.append(slice(int(there[0]), int(there[-1]) + 1))
    return tuple(box)


def hole_mask(mask: Mask, flat_axes: Sequence[int] = ()) -> Mask:
    """Voxels outside of the mask that no path over faces connects with the border of the array.

    Cutting the array to the mask's tight box does not change the result: what is cut off is connected with the border.

    Args:
        mask: [z,y,x].
        flat_axes: along which the *whole* image has one voxel; its two faces there are no border.
    """
    outside, n_parts = cc3d.connected_components((~mask).view(np.uint8), connectivity=6, return_N=True)
    is_hole = np.ones(n_parts + 1, dtype=bool)
    is_hole[0] = False  # cc3d numbers what is zero, here the mask itself, as 0
    for axis in set(range(mask.ndim)) - set(flat_axes):
        for side in (0, -1):
            is_hole[np.unique(outside.take(side, axis=axis))] = False
    holes: Mask = is_hole[outside] if is_hole.any() else np.zeros_like(mask)
    return holes


class _Work:
    """A label map that rules change in place, cut to its foreground: no rule reaches out of that box."""

    def __init__(self, label_map: LabelMap, schema: LabelSchema, flat_axes: tuple[int, ...]) -> None:
        self._map, self._schema, self._flat_axes = label_map, schema, flat_axes

    @classmethod
    def of(cls, label_map: LabelMap, schema: LabelSchema) -> _Work:
        """On a view of `label_map`."""
        box = tight_box(_mask_of(label_map, _foreground_values(schema))) or (slice(0, 0),) * label_map.ndim
        return cls(label_map[box], schema, tuple(axis for axis, n in enumerate(label_map.shape) if n == 1))

    def apply(self, rule: Rule, voxel_mm3: float) -> None:
        """Changes the map."""
        if rule.kind == "keep_largest_foreground":
            values = _foreground_values(self._schema)
            self._drop(values, dict.fromkeys(values, 0), _largest)
            return
        for name in self._schema.foreground if rule.class_name is None else (rule.class_name,):
            values = self._schema.foreground[name]
            if rule.kind == "fill_holes":
                self._fill(values, _values_with(self._schema, name))
            else:
                keeps = _largest if rule.value is None else _at_least(rule.value / voxel_mm3)
                self._drop(values, _values_without(self._schema, name), keeps)

    def _drop(self, values: Sequence[int], becomes: dict[int, int], keeps: Keeps) -> None:
        part, mask = self._part(values)
        if not mask.size:
            return
        # numbers, not booleans: cc3d 4.1.1 connects boolean images over corners wrongly where a side is odd
        components, n = cc3d.connected_components(mask.view(np.uint8), connectivity=26, return_N=True)
        kept = keeps(_sizes(components, n, mask))
        if not kept.all():
            _replace(part, np.concatenate([[False], ~kept])[components], becomes)

    def _fill(self, values: Sequence[int], becomes: dict[int, int]) -> None:
        part, mask = self._part(values)
        if mask.size:
            _replace(part, hole_mask(mask, self._flat_axes), becomes)

    def _part(self, values: Sequence[int]) -> tuple[LabelMap, Mask]:
        """The tight box of a class and its mask there; without voxels where the class is absent."""
        mask = _mask_of(self._map, values)
        box = tight_box(mask) or (slice(0, 0),) * mask.ndim
        return self._map[box], np.ascontiguousarray(mask[box])


def _foreground_values(schema: LabelSchema) -> tuple[int, ...]:
    return tuple(sorted({value for values in schema.foreground.values() for value in values} - {0}))


def _mask_of(label_map: LabelMap, values: Sequence[int]) -> Mask:
    mask: Mask = label_map == values[0] if len(values) == 1 else np.isin(label_map, values)
    return mask


def _largest(sizes: npt.NDArray[np.int64]) -> Mask:
    largest: Mask = sizes == sizes.max()
    return largest


def _at_least(voxels: float) -> Keeps:
    """A component of exactly this size stays, whatever rounding did to it."""
    return lambda sizes: sizes >= voxels * (1 - 1e-9)


def _sizes(components: npt.NDArray[Any], n: int, mask: Mask) -> npt.NDArray[np.int64]:
    """Voxels of components 1 to n."""
    if n == 1:  # cc3d's statistics refuse a label that is not below the number of voxels
        return np.array([np.count_nonzero(mask)])
    counts = cc3d.statistics(components, no_slice_conversion=True)["voxel_counts"][1:]
    return np.asarray(counts, dtype=np.int64)


def _replace(part: LabelMap, where: Mask, becomes: dict[int, int]) -> None:
    """Gives voxels their new values, in place; values that `becomes` does not know stay."""
    old = part[where]
    new = old.copy()
    for before, after in becomes.items():
        new[old == before] = after
    part[where] = new


def _memberships(schema: LabelSchema) -> dict[int, frozenset[str]]:
    """Declared value without the ignore label → the classes or regions that it belongs to."""
    values = {0, *schema.values} - {schema.ignore_label}
    return {
        value: frozenset(name for name, own in schema.foreground.items() if value in own)
        for value in sorted(value for value in values if value is not None)
    }


def _values_without(schema: LabelSchema, name: str) -> dict[int, int]:
    """What each value of a class becomes when it leaves the class: in no new class, in as many old ones as possible."""
    of = _memberships(schema)
    becomes = {}
    for value in schema.foreground[name]:
        fitting = [other for other in of if name not in of[other] and of[other] <= of.get(value, frozenset())]
        becomes[value] = max(fitting, key=lambda other: (len(of[other]), -other), default=0)
    return becomes


def _values_with(schema: LabelSchema, name: str) -> dict[int, int]:
    """What each value becomes when it enters a class: in all its old classes, in as few new ones as possible.

    Values for which there is no such value, those of another class where there are no regions, are left out.
    """
    of = _memberships(schema)
    becomes = {}
    for value in of:
        if name in of[value]:
            continue
        fitting = [other for other in of if of[other] >= of[value] | {name}]
        if fitting:
            becomes[value] = min(fitting, key=lambda other: (len(of[other]), other))
    return becomes
