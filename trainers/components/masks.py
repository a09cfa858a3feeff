"""Boolean masks [n, 1, *S] that mix two patches, and how batches are paired. True keeps the first operand.

Masks are drawn from a CPU generator as a few numbers each and moved to `device`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Slices = tuple[slice, ...]

SHORT_AXIS = 6
"""An axis with fewer voxels is taken whole by `box_mask`."""
ANISOTROPY = 3.0
"""Above this ratio of spacings the coarse axis counts as through plane."""


def box_mask(
    n: int,
    shape: Sequence[int],
    generator: torch.Generator,
    fraction: float = 2 / 3,
    shared: bool = True,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One box of round(fraction · S_i) voxels per axis, at a uniform place, is False.

    Args:
        n: samples.
        shape: the patch S, 2 or 3 axes; an axis below six voxels is taken whole.
        generator: on the CPU.
        fraction: side of the box as a share of the patch.
        shared: one box for all samples; else one each.
        device: where the mask goes.
    """
    sides = [size if size < SHORT_AXIS else round(fraction * size) for size in shape]
    mask = torch.ones(1 if shared else n, 1, *shape, dtype=torch.bool)
    for row in mask:
        row[0][placed_box(sides, shape, generator)] = False
    return mask.expand(n, *mask.shape[1:]).to(device)


def grid_cells(shape: Sequence[int], spacing: Sequence[float], cells: int = 4) -> tuple[int, ...]:
    """Cells per axis of `grid_mask`: `cells`, but as many as its extent deserves through plane; at most S_i."""
    extent = [size * step for size, step in zip(shape, spacing, strict=True)]
    flat = through_plane_axis(spacing)
    counts = [cells if axis != flat else max(1, round(cells * e / max(extent))) for axis, e in enumerate(extent)]
    return tuple(min(count, size) for count, size in zip(counts, shape, strict=True))


def grid_mask(
    n: int,
    shape: Sequence[int],
    spacing: Sequence[float],
    generator: torch.Generator,
    cells: int = 4,
    ratio: float = 0.5,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A grid of cells of which exactly floor(ratio · number), chosen for each sample on its own, are False.

    Args:
        n: samples.
        shape: the patch S, 2 or 3 axes.
        spacing: mm per axis; decides how many cells an anisotropic patch has through plane.
        generator: on the CPU.
        cells: per axis.
        ratio: share of the cells that are False.
        device: where the mask goes.
    """
    counts = grid_cells(shape, spacing, cells)
    removed = math.floor(ratio * math.prod(counts))
    kept = torch.ones(n, math.prod(counts), dtype=torch.bool)
    for row in kept:
        row[torch.randperm(len(row), generator=generator)[:removed]] = False
    mask = kept.view(n, 1, *counts)
    for axis, (count, size) in enumerate(zip(counts, shape, strict=True), start=2):
        borders = torch.tensor([size * index // count for index in range(count + 1)])
        mask = mask.repeat_interleave(borders.diff(), axis)
    return mask.to(device)


def cutmix_box(
    n: int,
    shape: Sequence[int],
    generator: torch.Generator,
    p: float = 0.5,
    volume: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    through_plane_free: bool = False,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """With probability p a sample has a box that is False; its share of the patch is uniform in `volume`.

    The in-plane aspect (in voxels) is uniform in `aspect`, as far as the box fits into the patch. In 3D the first side
    follows: with its own aspect (log-uniform) against the other two, or of any length that leaves them room. Source:
    the box of UniMatch (Yang et al., CVPR 2023) in 2D; the third side is ours.

    Args:
        n: samples, each with its own box.
        shape: the patch S, 2 or 3 axes.
        generator: on the CPU.
        p: probability of a box.
        volume: smallest and largest share of the patch's voxels; rounding to whole voxels apart.
        aspect: smallest and largest height / width.
        through_plane_free: for anisotropic patches; the box may span all slices whatever its sides in plane.
        device: where the mask goes.
    """
    mask = torch.ones(n, 1, *shape, dtype=torch.bool)
    for row in mask:
        drawn = torch.rand(4, generator=generator).tolist()
        share = volume[0] + (volume[1] - volume[0]) * drawn[1]
        sides: list[int] = []
        if len(shape) == 3:
            sides.append(_first_side(share, shape[0], drawn[2], None if through_plane_free else aspect))
            share = min(1.0, share * shape[0] / sides[0])
        sides += _plane_sides(share, shape[-2:], drawn[3], aspect)
        place = placed_box(sides, shape, generator)
        if drawn[0] < p:
            row[0][place] = False
    return mask.to(device)


def mix(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """a where the mask is True, b elsewhere; images, one-hot, integers and booleans [n, C, *S] alike."""
    return torch.where(mask, a, b)


def through_plane_axis(spacing: Sequence[float]) -> int | None:
    """The coarse axis of an anisotropic volume (more than three times the finest spacing); None: there is none."""
    if len(spacing) < 3 or max(spacing) <= ANISOTROPY * min(spacing):
        return None
    return max(range(len(spacing)), key=lambda axis: spacing[axis])


def half_size(n_labeled: int, n_unlabeled: int) -> int:
    """⌈max(B_l, B_u) / 2⌉, the size of the halves of both streams."""
    return (max(n_labeled, n_unlabeled) + 1) // 2


def halves(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The first n rows of x [B, …] and the next n; from the start again where x is short (B = 1: both the same)."""
    rows = torch.arange(2 * n, device=x.device) % len(x)
    return x[rows[:n]], x[rows[n:]]


def derangement(n: int, generator: torch.Generator) -> Tensor:
    """A random permutation [n] in which no row keeps its place; n = 1 gives [0]. Integers, on the CPU."""
    order = torch.randperm(n, generator=generator)
    partner = torch.empty(n, dtype=torch.long)
    partner[order] = order.roll(1)  # one random cycle through all rows
    return partner


def placed_box(sides: Sequence[int], shape: Sequence[int], generator: torch.Generator) -> Slices:
    """A box of these sides at a uniform place in the patch."""
    starts = [
        int(torch.randint(size - side + 1, (), generator=generator)) for side, size in zip(sides, shape, strict=True)
    ]
    return tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))


def _first_side(share: float, size: int, u: float, aspect: tuple[float, float] | None) -> int:
    """Voxels of the first axis that a box of this share of the volume takes; u in [0, 1) is the draw.

    Its length is at least `share`, or the two other sides could not make up for it.
    """
    if aspect is None:
        length = share + (1 - share) * u
    else:  # length = c · √(other two) and length · (other two) = share, where none is longer than the patch
        low, high = (min(max(value, share), share**-0.5) for value in aspect)
        length = ((low * (high / low) ** u) ** 2 * share) ** (1 / 3)  # long and flat boxes alike
    return min(size, max(round(length * size), math.ceil(share * size), 1))


def _plane_sides(share: float, shape: Sequence[int], u: float, aspect: tuple[float, float]) -> list[int]:
    """Height and width in voxels of a rectangle with this share of the plane; u in [0, 1) draws its aspect."""
    height, width = shape
    # with a larger aspect it would be higher than the plane, with a smaller one wider
    limits = share * height / width, height / (share * width)
    low, high = (min(max(value, limits[0]), limits[1]) for value in aspect)
    ratio = low + (high - low) * u
    rows = min(height, max(round(math.sqrt(share * height * width * ratio)), math.ceil(share * height), 1))
    columns = min(width, max(1, round(share * height * width / rows)))
    return [rows, columns]
