"""Target spacing, axis order and image size after resampling, by nnU-Net v2's rules.

All sequences are in array order z,y,x; spacing in mm, sizes in voxels. Floating-point expressions keep the order of
operations that the rules were published with, so that plans agree to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autossl.data.problems import InvalidInput, Problem

ANISOTROPY_THRESHOLD = 3
"""A coarsest axis beyond this multiple of the others is treated apart (nnU-Net v2)."""
FINE_PERCENTILE = 10
COARSENING_STEP = 1.03
"""Factor of one step of the search for a coarser spacing (nnU-Net v2)."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TargetSpacing:
    """The spacing that cases are resampled to, in the original axis order, and why."""

    spacing_zyx_mm: tuple[float, float, float]
    why: str


def target_spacing(spacings: FloatArray, shapes: FloatArray) -> TargetSpacing:
    """Per-axis median, except for a coarse axis with few slices, which gets a finer percentile.

    Args:
        spacings: [cases, 3], mm.
        shapes: [cases, 3], voxels after the crop to non-zero.
    """
    median = np.percentile(spacings, 50, 0)
    size = np.percentile(shapes, 50, 0)
    coarse = int(np.argmax(median))
    others = [axis for axis in range(3) if axis != coarse]
    finest_allowed = max(median[axis] for axis in others)
    base = f"per-axis median of {len(spacings)} labeled cases = {_numbers(median)} mm"
    thick = median[coarse] > ANISOTROPY_THRESHOLD * finest_allowed
    few = size[coarse] * ANISOTROPY_THRESHOLD < min(size[axis] for axis in others)
    if not (thick and few):
        return TargetSpacing(_three(median), base)
    percentile = np.percentile(spacings[:, coarse], FINE_PERCENTILE)
    target = median.copy()
    target[coarse] = percentile if percentile >= finest_allowed else finest_allowed + 1e-5
    why = (
        f"{base}; axis {coarse} is more than {ANISOTROPY_THRESHOLD} times coarser than the others "
        f"({median[coarse]:g} against {finest_allowed:g} mm) and has less than a third of their voxels "
        f"({size[coarse]:g} of {min(size[axis] for axis in others):g}), so it gets the {FINE_PERCENTILE}th percentile, "
        f"{percentile:g} mm{'' if percentile >= finest_allowed else ', raised to the next axis'}"
    )
    return TargetSpacing(_three(target), why)


def check_overwritten_spacing(spacing: Sequence[float]) -> tuple[float, float, float]:
    """A target spacing given by the user; raises `InvalidInput` unless it is three positive numbers in mm."""
    if len(spacing) != 3 or any(not math.isfinite(value) or value <= 0 for value in spacing):
        raise InvalidInput(
            Problem(
                f"target spacing {' '.join(str(value) for value in spacing)}",
                "three positive numbers z y x in mm",
                "correct --overwrite_target_spacing",
            )
        )
    return _three(spacing)


def axis_order(target: Sequence[float]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(forward, backward) transposition that puts the coarsest axis (the first of equals) in front."""
    coarse = int(np.argmax(target))
    forward = [coarse, *(axis for axis in range(3) if axis != coarse)]
    backward = [forward.index(axis) for axis in range(3)]
    return (forward[0], forward[1], forward[2]), (backward[0], backward[1], backward[2])


def resampled_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """Voxels of an image after resampling: round(old spacing / new spacing × old size), half to even."""
    return tuple(round(old / new * size) for size, old, new in zip(shape, spacing, target, strict=True))


def median_resampled_shape(shapes: FloatArray, spacings: FloatArray, target: Sequence[float]) -> FloatArray:
    """Per-axis median over cases of the shape after resampling; [3], may end in .5."""
    resampled = [
        resampled_shape([int(v) for v in shape], list(spacing), target)
        for shape, spacing in zip(shapes, spacings, strict=True)
    ]
    return np.asarray(np.median(np.asarray(resampled), 0), dtype=np.float64)


def coarser(spacing: FloatArray) -> FloatArray:
    """One step coarser: axes more than twice as fine as the coarsest one first; all of them once none is."""
    fine = max(spacing) / spacing > 2
    result = spacing.copy()
    if np.any(fine):
        result[fine] *= COARSENING_STEP
    else:
        result *= COARSENING_STEP
    return result


def _three(values: Sequence[float] | FloatArray) -> tuple[float, float, float]:
    z, y, x = (float(value) for value in values)
    return z, y, x


def _numbers(values: Sequence[float] | FloatArray) -> str:
    return " × ".join(f"{value:g}" for value in values)
