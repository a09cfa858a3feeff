"""Ellipsoids, mirror images and the band around borders. Axes are those of the arrays, (z,) y, x."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Points = npt.NDArray[np.float64]

ANISOTROPY = 3
"""A 3D axis whose spacing is more than so many times the smallest one is through-plane."""
QUADRIC_LIMITS = (100.0, 30.0, 10.0, 4.0)
"""k of k·J > I² in 3D, tried in turn: 4 admits ellipsoids only, larger ones flatter shapes as well."""


# --------------------------------------------------------------------------------------------------------- ellipsoids


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipse (d=2) or ellipsoid (d=3), in the units and axes of the points that it was fitted to."""

    center: Points
    """[d]."""
    semi_axes: Points
    """[d], longest first."""
    directions: Points
    """[d, d]: row i is the unit vector along semi-axis i; its sign means nothing."""

    def squared_radius(self, points: Points) -> Points:
        """ρ² of points [..., d]: 0 in the center, 1 on the surface."""
        along = (np.asarray(points, dtype=np.float64) - self.center) @ self.directions.T / self.semi_axes
        squares: Points = np.square(along).sum(-1)
        return squares


def fit_ellipsoid(points: Points) -> Ellipsoid | None:
    """The ellipse or ellipsoid through points [n, d] with the least algebraic distance; d = 2 or 3.

    A direct fit, on centered and scaled points, under a constraint that only ellipses fulfill: a·c - h² = 1 in 2D
    (Fitzgibbon et al., PAMI 1999, in the stable form of Halír and Flusser 1998), k·J - I² = 1 in 3D (Li and Griffiths,
    GMP 2004), with the invariants I and J of the quadric's matrix.

    Returns:
        None where the points define none: fewer than 5 (2D) or 9 (3D), all on a line or a plane, or a degenerate fit.

    Raises:
        ValueError: points of another dimension.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] not in (2, 3):
        raise ValueError(f"points of shape {points.shape}: expected [n, 2] or [n, 3]")
    n, d = points.shape
    if n < {2: 5, 3: 9}[d]:
        return None
    middle = points.mean(0)
    scale = float(np.sqrt(np.square(points - middle).mean()))
    if scale == 0 or np.linalg.matrix_rank((points - middle) / scale, tol=1e-9 * np.sqrt(n)) < d:
        return None
    try:
        return _fit_scaled((points - middle) / scale, middle, scale)
    except np.linalg.LinAlgError:
        return None


def _fit_scaled(x: Points, middle: Points, scale: float) -> Ellipsoid | None:
    d = x.shape[1]
    pairs = list(itertools.combinations(range(d), 2))
    quadratic = np.column_stack([x**2, *(2 * x[:, i] * x[:, j] for i, j in pairs)])
    linear = np.column_stack([2 * x, np.ones(len(x))])
    from_quadratic = -np.linalg.solve(linear.T @ linear, linear.T @ quadratic)  # the best linear part of each one
    scatter = quadratic.T @ quadratic + quadratic.T @ linear @ from_quadratic
    for limit in QUADRIC_LIMITS if d == 3 else (None,):
        shape = _constrained_minimum(scatter, _constraint(d, limit))
        if shape is None:
            continue
        found = _ellipsoid_of(shape, from_quadratic @ shape, pairs)
        if found is not None:
            return Ellipsoid(middle + scale * found.center, scale * found.semi_axes, found.directions)
    return None


def _constraint(d: int, limit: float | None) -> Points:
    """The matrix of J (limit None) or limit·J - I², as a form of (a_11, …, a_dd, a_12, …)."""
    n_mixed = d * (d - 1) // 2
    second = np.zeros((d + n_mixed,) * 2)
    second[:d, :d] = (1 - np.eye(d)) / 2
    second[d:, d:] = -np.eye(n_mixed)
    if limit is None:
        return second
    first = np.zeros_like(second)
    first[:d, :d] = 1
    return limit * second - first


def _constrained_minimum(scatter: Points, constraint: Points) -> Points | None:
    """v with the least vᵀ·scatter·v among those with vᵀ·constraint·v = 1 (up to its length)."""
    _, vectors = np.linalg.eig(np.linalg.solve(constraint, scatter))
    vectors = np.real(vectors)
    values = np.einsum("ik,ij,jk->k", vectors, constraint, vectors)
    best: Points = vectors[:, int(np.argmax(values))]  # the constraint has one positive direction, so one candidate
    return best if values.max() > 0 else None


def _ellipsoid_of(shape: Points, linear: Points, pairs: list[tuple[int, int]]) -> Ellipsoid | None:
    """From xᵀ·Q·x + 2·l·x + t = 0; None where this is no ellipsoid."""
    d = len(linear) - 1
    matrix = np.diag(shape[:d])
    for value, (i, j) in zip(shape[d:], pairs, strict=True):
        matrix[i, j] = matrix[j, i] = value
    center = np.asarray(np.linalg.solve(matrix, -linear[:d]), dtype=np.float64)
    size = center @ matrix @ center - linear[d]
    if size == 0:
        return None
    values, vectors = np.linalg.eigh(matrix / size)
    if values[0] <= 0 or not np.isfinite(values).all():
        return None
    semi_axes: Points = 1 / np.sqrt(values)  # ascending eigenvalues: the longest axis first
    return Ellipsoid(center, semi_axes, vectors.T)


# ------------------------------------------------------------------------------------------------------ mirror images


def reflect(v: Tensor, center: Tensor, normal: Tensor) -> Tensor:
    """Points [..., d] mirrored at the line (2D) or plane (3D) through `center` [d]: v - 2·((v - center)·n)·n.

    `normal` [d] need not be of unit length. For mirror images in plane, leave its through-plane component 0.
    """
    n = normal / normal.norm()
    return v - 2 * ((v - center) @ n)[..., None] * n


@dataclass(frozen=True)
class MirrorPlanes:
    """One line (2D) or plane (3D) for each of N patches, at which they are mirrored: nearest sampling."""

    source: Tensor
    """Int64 [N, V]: for each voxel of the patch the flat index of its mirror image, clamped at the border."""
    first_half: Tensor
    """Boolean [N, 1, *S]: (v - center)·normal < 0; the rest, the line itself included, is the second half."""
    inside: Tensor
    """Boolean [N, 1, *S]: the mirror image lies in the patch, so nothing was clamped."""

    @classmethod
    def through(
        cls, centers: Tensor, normals: Tensor, size: Sequence[int], spacing: Sequence[float] | None = None
    ) -> MirrorPlanes:
        """Planes through `centers` [N, d] across `normals` [N, d] for patches [*S] = `size`.

        Args:
            centers: in mm from the center of the first voxel (in voxels without `spacing`).
            normals: in the same axes, of any length but 0; a component of 0 leaves that axis as it is.
            size: S.
            spacing: mm per axis; None: 1 each.
        """
        device = centers.device
        unit = torch.tensor(spacing or (1.0,) * len(size), dtype=torch.float64, device=device)
        last = torch.tensor(size, device=device) - 1
        strides = [math.prod(size[axis + 1 :]) for axis in range(len(size))]
        axes = [torch.arange(n, dtype=torch.float64, device=device) for n in size]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2) * unit
        sources, first, inside = [], [], []
        for center, normal in zip(centers.to(unit), normals.to(unit), strict=True):
            seen = (reflect(places, center, normal) / unit).round().long()
            clamped = seen.clamp(min=torch.zeros_like(last), max=last)
            sources.append((clamped * torch.tensor(strides, device=device)).sum(-1))
            inside.append((seen == clamped).all(-1))
            first.append((places - center) @ normal < 0)
        shape = (len(centers), 1, *size)
        return cls(torch.stack(sources), torch.stack(first).view(shape), torch.stack(inside).view(shape))

    def mirror(self, x: Tensor) -> Tensor:
        """Mirror images of x [N, c, *S], any type; gradients flow through."""
        flat = x.flatten(2)
        return flat.gather(2, self.source[:, None].expand(-1, x.shape[1], -1)).view_as(x)


def mirror_image(x: Tensor, center: Tensor, normal: Tensor, spacing: Sequence[float] | None = None) -> Tensor:
    """One image [c, *S] mirrored like `reflect`: `MirrorPlanes` for a single patch, with `center` and `normal` [d]."""
    planes = MirrorPlanes.through(center[None].to(x.device), normal[None].to(x.device), x.shape[1:], spacing)
    return planes.mirror(x[None])[0]


# --------------------------------------------------------------------------------------------------------------- band


def boundary_band(y: Tensor, width: float, spacing: Sequence[float], valid: Tensor | None = None) -> Tensor:
    """Voxels with another label within `width`, boolean [N, 1, *S]: a band on both sides of every border.

    Distances are Euclidean between voxel centers, in units of the smallest spacing; in 3D, axes whose spacing is more
    than three times that are left out (in-plane bands). The edge of the patch is no border.

    Args:
        y: labels [N, 1, *S], or regions [N, C, *S] (a border is where any of them changes).
        width: e.g. 2: two voxels on each side of a straight border.
        spacing: mm per axis of S.
        valid: boolean [N, 1, *S]; other voxels are in no band and make none.
    """
    band = torch.zeros_like(y[:, :1], dtype=torch.bool)
    for offset in _half_ball(width, spacing):
        here, there = _overlap(offset)
        differs = (y[here] != y[there]).any(1, keepdim=True)
        if valid is not None:
            differs &= valid[here] & valid[there]
        band[here] |= differs
        band[there] |= differs
    return band


def _half_ball(width: float, spacing: Sequence[float]) -> list[tuple[int, ...]]:
    """Offsets in voxels no longer than `width` smallest spacings, one of each pair of opposite ones."""
    unit = min(spacing)
    steps = [s / unit for s in spacing]
    reach = [0 if len(steps) == 3 and s > ANISOTROPY else int(width / s + 1e-6) for s in steps]
    ball = itertools.product(*(range(-r, r + 1) for r in reach))
    limit = width**2 * (1 + 1e-6)
    zero = (0,) * len(steps)
    return [o for o in ball if o > zero and sum((k * s) ** 2 for k, s in zip(o, steps, strict=True)) <= limit]


def _overlap(offset: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Slices of [N, C, *S] whose entries lie `offset` apart."""
    every = (slice(None), slice(None))
    here = tuple(slice(max(0, -k), -k if k > 0 else None) for k in offset)
    there = tuple(slice(max(0, k), k if k < 0 else None) for k in offset)
    return every + here, every + there
