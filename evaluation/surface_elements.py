"""The surface of a mask as small elements, each with a place and an area in mm² (2D: a length in mm).

Around every corner that 2x2x2 voxels share (2D: 2x2 pixels), the voxels' centers make a cell. A cell with voxels of
both kinds holds one element: the piece of surface that runs through the middles of the cell's edges between a voxel
inside and a voxel outside (Lorensen and Cline, SIGGRAPH 1987). Its place is the corner itself; its area depends on
which of the eight are inside, and on the spacing, so it is computed once per spacing for all 256 patterns.

Where the pattern leaves a choice: voxels of the rarer kind that touch only diagonally are kept apart (a pattern and its
complement have the same area); an outline that is not flat is cut into triangles so that these have the largest area
on cubic voxels, which is the cut with the fewest different planes. These are the choices of DeepMind's
surface-distance, found by comparing areas: those of all 256 patterns agree with its table for any spacing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations, product

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Corner = tuple[int, int, int]
Edge = frozenset[Corner]
Triangle = tuple[int, int, int]

CORNERS: tuple[Corner, ...] = tuple((z, y, x) for z, y, x in product((0, 1), repeat=3))
"""Corner number n is bit n of a pattern."""


def cell_patterns(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Which voxels around each shared corner are inside; outside the array nothing is.

    Args:
        mask: [z,y,x] or [y,x].

    Returns:
        One longer than the mask along each axis; bit 4z + 2y + x (2D: 2y + x) is the voxel at that side of the corner.
    """
    patterns = np.pad(mask.view(np.uint8), 1)
    for number, axis in enumerate(reversed(range(mask.ndim))):
        ends: list[slice] = [slice(None)] * mask.ndim
        starts = ends.copy()
        ends[axis], starts[axis] = slice(1, None), slice(None, -1)
        patterns = patterns[tuple(starts)] | (patterns[tuple(ends)] << 2**number)
    return patterns


def element_sizes(spacing_mm: Sequence[float]) -> FloatArray:
    """Size of the surface element of each pattern: area in mm² [256] for three spacings, length in mm [16] for two."""
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    vectors = _unit_lengths() if len(spacing) == 2 else _unit_areas()
    # what an axis has is stretched by the spacing (lengths), or by those of the two others (areas)
    factors = spacing if len(spacing) == 2 else np.prod(spacing) / spacing
    sizes: FloatArray = np.linalg.norm(vectors * factors, axis=2).sum(1)
    return sizes


@lru_cache(maxsize=1)
def _unit_lengths() -> FloatArray:
    """Per pattern of 2x2 pixels up to two pieces of outline, as vectors y,x; [16, 2, 2]."""
    vectors = np.zeros((16, 2, 2))
    for pattern in range(1, 15):
        inside = np.array([[pattern >> (2 * y + x) & 1 for x in (0, 1)] for y in (0, 1)], dtype=bool)
        if inside.sum() == 2 and (inside.all(1).any() or inside.all(0).any()):  # two neighbors: a straight piece
            vectors[pattern, 0] = (0.0, 1.0) if inside.all(1).any() else (1.0, 0.0)
        else:  # one cut-off corner, or two where the pair is diagonal
            vectors[pattern, : 2 if inside.sum() == 2 else 1] = 0.5
    return vectors


@lru_cache(maxsize=1)
def _unit_areas() -> FloatArray:
    """Per pattern of 2x2x2 voxels up to four triangles, as vectors of their area across z,y,x; [256, 4, 3]."""
    vectors = np.zeros((256, 4, 3))
    for pattern in range(1, 255):
        inside = {corner for bit, corner in enumerate(CORNERS) if pattern >> bit & 1}
        if len(inside) <= 4:
            areas = np.concatenate([_largest_cut(outline) for outline in _outlines(inside)])
            vectors[pattern, : len(areas)] = vectors[255 - pattern, : len(areas)] = areas
    return vectors


def _outlines(inside: set[Corner]) -> Iterator[FloatArray]:
    """Closed outlines of the pieces that separate the given corners of a unit cell from the others; points [n, 3]."""
    links: dict[Edge, list[Edge]] = {}
    for axis, side in product(range(3), (0, 1)):
        face = [corner for corner in CORNERS if corner[axis] == side]
        cut = [
            frozenset(pair)
            for pair in combinations(face, 2)
            if sum(a != b for a, b in zip(*pair, strict=True)) == 1 and len(inside & set(pair)) == 1
        ]
        diagonal = len(cut) == 4
        pairs = [[edge for edge in cut if corner in edge] for corner in inside & set(face)] if diagonal else [cut]
        for pair in pairs:
            if pair:
                links.setdefault(pair[0], []).append(pair[1])
                links.setdefault(pair[1], []).append(pair[0])
    left = sorted(links, key=sorted)
    while left:
        path = [left[0], links[left[0]][0]]
        while (following := next(edge for edge in links[path[-1]] if edge != path[-2])) != path[0]:
            path.append(following)
        left = [edge for edge in left if edge not in path]
        yield np.array([np.mean(sorted(edge), axis=0) for edge in path])


def _largest_cut(outline: FloatArray) -> FloatArray:
    """Area vectors [n, 3] of the triangles of the cut of an outline that has the largest area on cubic voxels."""
    first, second, third = np.moveaxis(outline[np.array(list(_cuts(0, len(outline) - 1)))], 2, 0)
    areas: FloatArray = np.cross(second - first, third - first) / 2
    return areas[np.linalg.norm(areas, axis=2).sum(1).round(9).argmax()]


def _cuts(first: int, last: int) -> Iterator[list[Triangle]]:
    """All ways to cut the polygon of the points first..last into triangles."""
    if last - first < 2:
        yield []
    for middle in range(first + 1, last):
        for before, after in product(_cuts(first, middle), list(_cuts(middle, last))):
            yield [*before, (first, middle, last), *after]
