"""Pseudo-labels of objects that are nearly ellipses: how regular they are, and what an ellipse makes of them.

NumPy, for one patch and one class at a time: `q` is the probability of the class, float32 [*S]; `valid` boolean [*S];
`spacing` mm per axis of S. Patches with a coarse through-plane axis are taken as stacks of planes.
Source: Zhou et al., IEEE JBHI 2025 (arXiv:2508.19815) and its released code, with its constants. Ours: when a fit is
believed, what an empty mask is worth, mm, 3D and stacks of planes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from autossl.trainers.components.masks import through_plane_axis
from autossl.trainers.components.pseudo import keep_largest
from autossl.trainers.components.schedules import sigmoid_ramp
from autossl.trainers.components.shapes import Ellipsoid, MirrorPlanes, Points, fit_ellipsoid

SCORED_AT = 0.5
"""The mask whose contour is scored is q > 0.5."""
LABELED_AT = 0.6
"""The mask that an ellipse is fitted to, and every label, is > 0.6."""
MIN_POINTS = 20
MAX_AXIS_RATIO = 3.0
MIN_DICE = 0.7
KEPT_SHARE = 0.8
"""Of the patches of a step, so many are used however irregular they are (unless they are empty)."""

Mask = npt.NDArray[np.bool_]
Values = npt.NDArray[np.floating]


# -------------------------------------------------------------------------------------------------------------- scores


def irregularity(
    q: Values, valid: Mask, spacing: Sequence[float], edge_share: float = 0.5, per_size: bool = False
) -> float:
    """edge_share · E + (1 - edge_share) · R, means over the valid voxels; small is good.

    E, of √(|∇q|² + 1e-6): soft, ragged or long borders. R, of |ΔD| with the distance D from the mask q > 0.5: corners
    of its contour. Derivatives are Sobel's in 2D and central differences in 3D, in units of the finest spacing; beyond
    the patch its edge goes on.

    Args:
        per_size: divide by the square root of the mask's area, against a liking for small objects.

    Returns:
        Infinite where nothing is above 0.5, which would have the best score, or where q is not finite.
    """
    mask = (q > SCORED_AT) & valid
    size = int(np.count_nonzero(mask))
    if size == 0 or not np.isfinite(q).all():
        return math.inf
    edges = np.concatenate([_slope(part, steps) for part, steps in _planes(q, spacing)], axis=None)
    corners = np.concatenate([_corners(part, steps) for part, steps in _planes(mask, spacing)], axis=None)
    counted = np.concatenate([part for part, _ in _planes(valid, spacing)], axis=None)
    score = edge_share * float(edges[counted].mean()) + (1 - edge_share) * float(corners[counted].mean())
    return score / math.sqrt(size) if per_size else score


def _slope(q: Values, steps: Sequence[float]) -> Values:
    squares = np.full(q.shape, 1e-6)
    for axis, step in enumerate(steps):
        if q.ndim == 2:
            derivative = ndimage.sobel(q, axis, mode="nearest") / 8
        else:
            derivative = ndimage.correlate1d(q, [-0.5, 0.0, 0.5], axis, mode="nearest")
        squares += np.square(derivative / step)
    return np.sqrt(squares)


def _corners(mask: Mask, steps: Sequence[float]) -> Values:
    if not mask.any():  # of a stack, a plane that the object does not reach
        return np.zeros(mask.shape)
    distance = ndimage.distance_transform_edt(~mask, sampling=steps)
    bends = (ndimage.correlate1d(distance, [1.0, -2.0, 1.0], a, mode="nearest") / s**2 for a, s in enumerate(steps))
    return np.abs(np.sum(list(bends), axis=0))


def _planes(values: npt.NDArray, spacing: Sequence[float]) -> list[tuple[npt.NDArray, tuple[float, ...]]]:
    """The patch, or its planes where the through-plane axis is coarse, with spacings in units of the finest one."""
    steps = tuple(mm / min(spacing) for mm in spacing)
    flat = through_plane_axis(spacing)
    if flat is None:
        return [(values, steps)]
    in_plane = tuple(step for axis, step in enumerate(steps) if axis != flat)
    return [(plane, in_plane) for plane in np.moveaxis(values, flat, 0)]


def selected_share(r: float) -> float:
    """Share of the scored patches that is used, 0.5034 at the start and 1 at the end."""
    return 0.5 + 0.5 * sigmoid_ramp(r, 1.0)


def select_regular(scores: Sequence[float], earlier: Sequence[float], share: float) -> list[bool]:
    """Which patches of a step are used: those among the best ⌊share · n⌋ of the n scores of this pass over the pool.

    Fewer than max(1, ⌊0.8·B⌋) are topped up with the step's own best others; an infinite score is never used.

    Args:
        scores: of the B patches of this step.
        earlier: of the steps before in this pass. Of equal scores the earlier one is better.
        share: see `selected_share`.
    """
    everything = [*earlier, *scores]
    best = sorted(range(len(everything)), key=lambda index: everything[index])
    chosen = {index - len(earlier) for index in best[: math.floor(share * len(everything))] if index >= len(earlier)}
    at_least = max(1, math.floor(KEPT_SHARE * len(scores)))
    for index in sorted(range(len(scores)), key=lambda index: scores[index]):
        if len(chosen) >= at_least:
            break
        chosen.add(index)
    return [index in chosen and math.isfinite(score) for index, score in enumerate(scores)]


# ------------------------------------------------------------------------------------------------------------- the fit


@dataclass(frozen=True)
class AcceptedFit:
    """An ellipse that is believed to be the object's outline."""

    ellipse: Ellipsoid
    """In mm from the center of the first voxel."""
    squared_radius: Values
    """ρ² of each voxel [*S]."""


def accepted_fit(q: Values, valid: Mask, spacing: Sequence[float]) -> AcceptedFit | None:
    """The ellipse through the outline of the largest component of q > 0.6, its holes filled.

    Believed where at least 20 points of the outline are seen, they go at least halfway around the center, the center
    is no farther from the patch's than its size (per axis), no axis is longer than 3 times another, and the Dice of
    ellipse and mask inside the patch is at least 0.7.
    """
    mask = _filled(_largest((q > LABELED_AT) & valid))
    points = outline_points(mask, valid, spacing)
    if len(points) < MIN_POINTS:
        return None
    ellipse = fit_ellipsoid(points)
    if ellipse is None or ellipse.semi_axes[0] > MAX_AXIS_RATIO * ellipse.semi_axes[-1]:
        return None
    extent = np.asarray(q.shape) * spacing
    middle = (np.asarray(q.shape) - 1) / 2 * spacing
    if (np.abs(ellipse.center - middle) > extent).any() or not goes_halfway_around(points, ellipse):
        return None
    grid = np.meshgrid(*(np.arange(n) * mm for n, mm in zip(q.shape, spacing, strict=True)), indexing="ij")
    squared_radius = ellipse.squared_radius(np.stack(grid, -1))
    inside = (squared_radius <= 1) & valid
    dice = 2 * np.count_nonzero(inside & mask) / (np.count_nonzero(inside) + np.count_nonzero(mask))
    return AcceptedFit(ellipse, squared_radius) if dice >= MIN_DICE else None


def outline_points(mask: Mask, valid: Mask, spacing: Sequence[float]) -> Points:
    """Midpoints [n, d] in mm between voxels of the mask and their face neighbors outside it.

    Neither voxel may be at the border of the patch or next to an invalid voxel: what is cut off there is no outline.
    """
    inner = ndimage.binary_erosion(valid, border_value=0)
    found = []
    for axis in range(mask.ndim):
        before, behind = ((slice(None),) * axis + (rows,) for rows in (slice(None, -1), slice(1, None)))
        differs = (mask[before] != mask[behind]) & inner[before] & inner[behind]
        places = np.argwhere(differs).astype(np.float64)
        places[:, axis] += 0.5
        found.append(places * spacing)
    return np.concatenate(found)


def goes_halfway_around(points: Points, ellipse: Ellipsoid) -> bool:
    """Whether the points span at least 180° around the center: in 2D no gap between their directions is larger.

    In 3D some point must lie on either side of 13 planes through the center, in the frame of the ellipsoid.
    """
    seen = (points - ellipse.center) @ ellipse.directions.T
    if seen.shape[1] == 2:
        angles = np.sort(np.arctan2(seen[:, 1], seen[:, 0]))
        gaps = np.diff(angles, append=angles[0] + 2 * math.pi)
        return bool(gaps.max() <= math.pi)
    towards = np.array([u for u in np.ndindex(3, 3, 3) if u != (1, 1, 1)]) - 1
    return bool(((seen / ellipse.semi_axes) @ towards.T).max(0).min() >= 0)


def _largest(mask: Mask) -> Mask:
    whole = torch.from_numpy(mask.astype(np.float32))[None, None]
    largest: Mask = keep_largest(whole, [0], spare_border=False)[0, 0].numpy() > 0.5
    return largest


def _filled(mask: Mask) -> Mask:
    boxes = ndimage.find_objects(mask.astype(np.uint8))
    if boxes:
        mask = mask.copy()
        mask[boxes[0]] = ndimage.binary_fill_holes(mask[boxes[0]])
    return mask


# ---------------------------------------------------------------------------------------------------------- the labels


@dataclass(frozen=True)
class EllipseLabel:
    """What is believed of one class in one patch."""

    label: Mask
    """[*S]; never where the patch is invalid."""
    fitted: Mask
    """[*S]: the voxels that an accepted fit judged (all or none; planes of a stack on their own)."""
    mirror: tuple[Points, Points] | None
    """Center [d] in mm and normal [d] of the line or plane at which the object is symmetric; None: not known."""
    n_fits: int
    """Planes (or volumes) that a fit was tried in."""
    n_accepted: int


def sharpened(q: Values, squared_radius: Values) -> Values:
    """Filled and confident inside the ellipse, damped outside.

    ρ² ≤ 1: max(q, min(1, 0.6 + (1 - ρ²)²)); beyond: q · exp(-½·(ρ² - 1)).
    """
    inside = np.maximum(q, np.minimum(1.0, LABELED_AT + np.square(1 - squared_radius)))
    # within, the exponent would be positive; the branch is not used there
    outside = q * np.exp(-0.5 * np.maximum(squared_radius - 1, 0))
    return np.where(squared_radius <= 1, inside, outside)


def ellipse_label(q: Values, valid: Mask, spacing: Sequence[float], refine: bool = True) -> EllipseLabel:
    """The label after its ellipse, and the symmetry axis; where no fit is accepted the plain q > 0.6.

    A 2D patch is mirrored at the ellipse's long axis, a volume across that principal axis for which its label overlaps
    best with its mirror image, a stack of planes like its largest accepted plane.

    Args:
        refine: False keeps the plain label; fit and symmetry axis are the same.
    """
    flat = through_plane_axis(spacing)
    if flat is not None:
        return _label_of_planes(q, valid, spacing, flat, refine)
    fit = accepted_fit(q, valid, spacing)
    label = _label(q, valid, fit, refine)
    fitted = np.full(q.shape, fit is not None)
    if fit is None:
        return EllipseLabel(label, fitted, None, 1, 0)
    normal = fit.ellipse.directions[-1] if q.ndim == 2 else _best_normal(label, valid, fit.ellipse, spacing)
    return EllipseLabel(label, fitted, (fit.ellipse.center, normal), 1, 1)


def _label(q: Values, valid: Mask, fit: AcceptedFit | None, refine: bool) -> Mask:
    value = sharpened(q, fit.squared_radius) if fit is not None and refine else q
    label: Mask = (value > LABELED_AT) & valid
    return label


def _label_of_planes(q: Values, valid: Mask, spacing: Sequence[float], flat: int, refine: bool) -> EllipseLabel:
    in_plane = [mm for axis, mm in enumerate(spacing) if axis != flat]
    body = np.moveaxis(_largest((q > LABELED_AT) & valid), flat, 0)
    labels, fitted, largest, n_fits, n_accepted = [], [], None, 0, 0
    for plane, inside, part in zip(np.moveaxis(q, flat, 0), np.moveaxis(valid, flat, 0), body, strict=True):
        n_fits += bool(part.any())
        fit = accepted_fit(np.where(part, plane, 0), inside, in_plane) if part.any() else None
        labels.append(_label(plane, inside, fit, refine))
        fitted.append(np.full(plane.shape, fit is not None))
        if fit is not None:
            n_accepted += 1
            area = fit.ellipse.semi_axes.prod()
            if largest is None or area > largest.semi_axes.prod():
                largest = fit.ellipse
    mirror = None
    if largest is not None:
        mirror = (np.insert(largest.center, flat, 0.0), np.insert(largest.directions[-1], flat, 0.0))
    return EllipseLabel(np.stack(labels, flat), np.stack(fitted, flat), mirror, n_fits, n_accepted)


def _best_normal(label: Mask, valid: Mask, ellipsoid: Ellipsoid, spacing: Sequence[float]) -> Points:
    """The principal axis along which the label is most symmetric, by the Dice with its mirror image in the patch."""
    n = len(ellipsoid.directions)
    centers, normals = torch.from_numpy(ellipsoid.center).expand(n, -1), torch.from_numpy(ellipsoid.directions.copy())
    planes = MirrorPlanes.through(centers, normals, label.shape, spacing)
    masks = torch.from_numpy(np.stack([label, valid])).expand(n, -1, *label.shape)
    mirrored = planes.mirror(masks)
    counted = masks[:, 1] & mirrored[:, 1] & planes.inside[:, 0]
    mine, theirs = masks[:, 0] & counted, mirrored[:, 0] & counted
    both = (mine & theirs).flatten(1).sum(1)
    dice = 2 * both / (mine.flatten(1).sum(1) + theirs.flatten(1).sum(1)).clamp(min=1)
    best: Points = ellipsoid.directions[int(dice.argmax())]
    return best
