"""Distances between the surfaces of two masks, and what is made of them: HD95, ASSD and NSD. Pure functions of arrays.

Two conventions, both with the true spacing of each axis:

- `surface_elements` (default): the surface is cut into elements whose place is a corner between voxels and whose area
  in mm² counts as weight (see `surface_elements`). HD95 is the larger of both directions' 95th percentiles, ASSD the
  mean over all elements of both surfaces, NSD the share of the area of both surfaces that lies within the tolerance of
  the other one (Nikolov et al., J Med Internet Res 23, 2021). DeepMind's surface-distance does the same. Differences:
  it gives ASSD as two directed means, ours is their mean weighted by the two areas; an empty mask makes distances
  infinite or 0/0 there, here the rule below holds; images with one slice are volumes there unless passed as 2D.
- `border_voxels`: the surface are the voxels of the mask with a face neighbor outside, at their centers, all of equal
  weight. HD95 is the 95th percentile (interpolated) of both directions' distances together, ASSD the mean of them. This
  is MedPy's hd95 and assd (connectivity 1), which most tables of semi-supervised papers show, often in voxels.

Why they differ on the same masks: a border voxel stands for as much surface as its neighbors, however long its spacing
or oblique the surface; centers of border voxels lie half a voxel inside, so that small objects shrink; and a percentile
of both directions together is smaller than the larger of the two. On boxes one voxel apart both say 1 voxel where the
shift is; on thin structures they can differ by several voxels. Elements count here by default because they are
independent of how finely an axis is sampled.

Empty masks: both empty, nothing is defined (NaN). One empty: there is no distance, HD95 and ASSD are NaN, left out of
means and counted (n_false_alarm, n_missed); NSD is 0. So a method that misses a structure is not punished in HD95 and
ASSD: read them beside the counts, or NSD.

Ignored voxels: whatever was predicted there, the reference is taken to say the same, and elements that touch one have
no weight; they can only be the nearest of others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import cKDTree

from autossl.evaluation.class_masks import ClassMasks
from autossl.evaluation.surface_elements import cell_patterns, element_sizes

Convention = Literal["surface_elements", "border_voxels"]
CONVENTIONS: tuple[Convention, ...] = ("surface_elements", "border_voxels")
DEFAULT_TOLERANCE = 1.0
"""Of NSD, in mm (pixels where their size is unknown): a voxel's edge of usual CT and MR. Better is what two experts
differ by, which only the user can know; stated beside every figure."""
SHARE = 0.95
ROUNDING = 1e-6

FloatArray = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SurfaceDistances:
    """From each element of one surface to the nearest of the other, in the unit of the spacing; infinite without one.

    Elements without weight are left out.
    """

    of_prediction: FloatArray
    weights_of_prediction: FloatArray
    of_reference: FloatArray
    weights_of_reference: FloatArray

    @property
    def all(self) -> FloatArray:
        """Of both surfaces."""
        return np.concatenate([self.of_prediction, self.of_reference])

    @property
    def all_weights(self) -> FloatArray:
        """Of both surfaces."""
        return np.concatenate([self.weights_of_prediction, self.weights_of_reference])


def surface_distances(
    prediction: Mask,
    reference: Mask,
    spacing: Sequence[float],
    convention: Convention = "surface_elements",
    ignored: Mask | None = None,
) -> SurfaceDistances:
    """Distances between two surfaces in both directions.

    Args:
        prediction: Mask [z,y,x] or [y,x].
        reference: Mask of the same shape.
        spacing: Of each axis in mm (or pixels).
        convention: What a surface is; see this module's text.
        ignored: Voxels without annotation, of the same shape.

    Raises:
        ValueError: The shapes differ, or the spacing has another number of axes.
    """
    if prediction.shape != reference.shape or len(spacing) != prediction.ndim or prediction.ndim not in (2, 3):
        raise ValueError(f"masks of shape {prediction.shape} and {reference.shape} with the spacing {tuple(spacing)}")
    if ignored is not None:
        reference = np.where(ignored, prediction, reference)
    surfaces = [_surface_of(mask, spacing, convention) for mask in (prediction, reference)]
    touched = None if ignored is None else _touched(ignored, convention)
    found = []
    for own, other in (surfaces, surfaces[::-1]):
        places = np.flatnonzero(own.on_surface if touched is None else own.on_surface & ~touched)
        found.append((_distances(places, other, spacing), own.sizes[own.patterns[places]]))
    return SurfaceDistances(*found[0], *found[1])


def hd95(distances: SurfaceDistances) -> float:
    """The larger of both directions' weighted 95th percentiles, of those that have any element; NaN without."""
    one = weighted_percentile(distances.of_prediction, distances.weights_of_prediction, SHARE)
    other = weighted_percentile(distances.of_reference, distances.weights_of_reference, SHARE)
    return float(np.fmax(one, other))


def hd95_of_both_together(distances: SurfaceDistances) -> float:
    """95th percentile of both directions' distances together, interpolated, without weights: MedPy's."""
    return float(np.percentile(distances.all, 100 * SHARE))


def assd(distances: SurfaceDistances) -> float:
    """Weighted mean distance over both surfaces."""
    return float(np.average(distances.all, weights=distances.all_weights))


def nsd(distances: SurfaceDistances, tolerance: float) -> float:
    """Share of both surfaces that lies within the tolerance of the other one, the tolerance included (to a millionth,
    because headers hold a spacing of 0.3 mm as 0.30000001)."""
    weights = distances.all_weights
    return float(weights[distances.all <= tolerance * (1 + ROUNDING)].sum() / weights.sum())


def weighted_percentile(values: FloatArray, weights: FloatArray, share: float) -> float:
    """The smallest value that, with all below it, has at least this share of the weight; NaN without values."""
    if not len(values):
        return math.nan
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order]) / weights.sum()
    return float(values[order[min(int(np.searchsorted(reached, share)), len(values) - 1)]])


def surface_metrics(
    masks: ClassMasks, spacing: Sequence[float], tolerance: float, convention: Convention, unit: str
) -> dict[str, float]:
    """`hd95_<unit>`, `assd_<unit>` and `nsd` of a class, by the rules of this module.

    Args:
        masks: Of the class; arrays with one slice are measured as 2D.
        spacing: z,y,x.
        tolerance: Of NSD.
        convention: What a surface is.
        unit: Of spacing and tolerance, "mm" or "px".
    """
    counted = np.True_ if masks.ignored is None else ~masks.ignored
    present = [bool((mask & counted).any()) for mask in (masks.prediction, masks.reference)]
    if not all(present):
        return _named(unit, math.nan, math.nan, 0.0 if any(present) else math.nan)
    flat = next((axis for axis, n in enumerate(masks.prediction.shape) if n == 1), None)
    distances = surface_distances(
        _without(flat, masks.prediction),
        _without(flat, masks.reference),
        [length for axis, length in enumerate(spacing) if axis != flat],
        convention,
        None if masks.ignored is None else _without(flat, masks.ignored),
    )
    if not len(distances.all):
        return _named(unit, math.nan, math.nan, math.nan)
    percentile = hd95 if convention == "surface_elements" else hd95_of_both_together
    return _named(unit, percentile(distances), assd(distances), nsd(distances, tolerance))


@dataclass(frozen=True)
class _Surface:
    """Where a mask has its surface, on a grid that two masks of the same shape share."""

    on_surface: Mask
    sizes: FloatArray
    """Weight of each pattern."""
    patterns: npt.NDArray[np.uint8]
    """Flat, one for each place of the grid."""


def _surface_of(mask: Mask, spacing: Sequence[float], convention: Convention) -> _Surface:
    if convention == "border_voxels":
        border = mask ^ ndimage.binary_erosion(mask)
        return _Surface(border, np.ones(2), border.view(np.uint8).ravel())
    patterns = cell_patterns(mask)
    full = 2 ** (2**mask.ndim) - 1
    return _Surface((patterns != 0) & (patterns != full), element_sizes(spacing), patterns.ravel())


def _touched(ignored: Mask, convention: Convention) -> Mask:
    """Places whose element depends on an ignored voxel."""
    return ndimage.binary_dilation(ignored) if convention == "border_voxels" else cell_patterns(ignored) != 0


def _distances(places: npt.NDArray[np.intp], other: _Surface, spacing: Sequence[float]) -> FloatArray:
    """From flat places of the shared grid to the nearest place on the other surface; 0 where it runs there too.

    A tree over the surface's places is exact for any spacing and looks at the surface only: a distance transform looks
    at every voxel of the box.
    """
    distances = np.zeros(len(places))
    apart = np.flatnonzero(~other.on_surface.ravel()[places])
    targets = np.flatnonzero(other.on_surface)
    if not len(targets):
        distances[:] = math.inf
    elif len(apart):
        scale = np.asarray(spacing, dtype=np.float64)
        there, here = (_indices(flat, other.on_surface.shape) for flat in (targets, places[apart]))
        tree = cKDTree(there * scale, balanced_tree=False, compact_nodes=False)
        nearest = tree.query(here * scale)[1]
        # from whole numbers: two steps of 0.7 mm are 1.4 mm wherever they are, and not a rounding error more
        distances[apart] = np.linalg.norm((here - there[nearest]) * scale, axis=1)
    return distances


def _indices(places: npt.NDArray[np.intp], shape: tuple[int, ...]) -> npt.NDArray[np.intp]:
    return np.stack(np.unravel_index(places, shape), axis=1)


def _without(axis: int | None, mask: Mask) -> Mask:
    """The mask without an axis of length 1; as it is where there is none."""
    return mask if axis is None else mask.squeeze(axis)


def _named(unit: str, hd95_value: float, assd_value: float, nsd_value: float) -> dict[str, float]:
    return {f"hd95_{unit}": hd95_value, f"assd_{unit}": assd_value, "nsd": nsd_value}
