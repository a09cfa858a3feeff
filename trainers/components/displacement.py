"""Regions that a network is not sure of, and better ones to put in their place.

Source: Xiao et al., Confidence-Aware Adaptive Displacement, 2025, arXiv:2502.00536 (largest low-confidence region
replacement); the match of the class distribution is that of Chi et al., Adaptive Bidirectional Displacement, CVPR 2024,
arXiv:2405.00378. From the component to a box, and the search of windows, are reconstructions of ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cc3d
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from autossl.trainers.components.certainty import prior_divergence
from autossl.trainers.components.masks import Slices, placed_box, through_plane_axis
from autossl.trainers.components.pseudo import pseudo_label

SMALLEST_SIDE = 4
"""Of a box, in voxels; through plane of an anisotropic volume one slice will do."""
STEPS_PER_SIDE = 4
"""Windows are tried at every quarter of their side."""


@dataclass(frozen=True)
class Displacement:
    """Where something is replaced and by what; both of the same size, as slices of S."""

    target: Slices
    source: Slices
    rank: int = 0
    """Of the source among the windows that were compared; 0: the most confident one."""


@dataclass(frozen=True)
class Judged:
    """What a network thinks of one patch; without gradient."""

    q: Tensor
    """Probabilities [C, *S]."""
    confidence: Tensor
    """[*S], 0 where nothing valid is."""


@dataclass(frozen=True)
class Decisions:
    """What a network thinks of N patches; without gradient."""

    labels: Tensor
    """As `pseudo_label` gives them."""
    q: Tensor
    """[N, C, *S]."""
    confidence: Tensor
    """[N, *S]; regions: their mean; 0 where nothing valid is."""
    doubt: Tensor
    """0; nan where the network is not finite, which hard labels hide."""

    @classmethod
    def of(cls, q: Tensor, valid: Tensor, regions: bool) -> Decisions:
        """From probabilities; valid is boolean [N, 1, *S]."""
        labels, confidence = pseudo_label(q, regions)
        counted = torch.where(valid, confidence.mean(1, keepdim=True), 0)[:, 0]
        return cls(labels, q, counted, 0 * confidence.mean())

    @property
    def patches(self) -> list[Judged]:
        """One by one."""
        return [Judged(q, confidence) for q, confidence in zip(self.q, self.confidence, strict=True)]


@dataclass(frozen=True)
class Limits:
    """What may be displaced."""

    threshold: float
    """Below it a voxel's confidence is low."""
    largest_sides: tuple[int, ...]
    smallest_sides: tuple[int, ...]
    """They win where they are longer than the largest."""
    spacing: tuple[float, ...]
    n_windows: int
    """So many of the most confident windows are compared by their classes."""
    regions: bool


def smallest_sides(shape: Sequence[int], spacing: Sequence[float]) -> tuple[int, ...]:
    """The least that a box must measure along each axis of S, in voxels."""
    flat = through_plane_axis(spacing)
    return tuple(1 if axis == flat else min(SMALLEST_SIDE, size) for axis, size in enumerate(shape))


def largest_component(low: Tensor, spacing: Sequence[float]) -> npt.NDArray[np.bool_]:
    """The largest connected part of a boolean map [*S]; voxels that share a corner are connected. Empty stays empty.

    Volumes are searched at half the resolution (except through plane), where a voxel is set if any of its parts is.
    """
    array: npt.NDArray[np.bool_]
    if low.ndim == 2:
        return _largest(low.cpu().numpy())
    flat = through_plane_axis(spacing)
    factors = [1 if axis == flat else 2 for axis in range(3)]
    coarse = functional.max_pool3d(low[None, None].float(), factors, ceil_mode=True)[0, 0] > 0
    array = _largest(coarse.cpu().numpy())
    for axis, factor in enumerate(factors):
        array = array.repeat(factor, axis)
    fine: npt.NDArray[np.bool_] = array[tuple(slice(size) for size in low.shape)] & low.cpu().numpy()
    return fine


def _largest(array: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    # numbers, not booleans: cc3d 4.1.1 connects boolean images over corners wrongly where a side is odd
    components = cc3d.connected_components(array.view(np.uint8), connectivity=8 if array.ndim == 2 else 26)
    sizes = np.bincount(components.ravel())
    if len(sizes) < 2:
        return np.zeros_like(array)
    found: npt.NDArray[np.bool_] = components == 1 + int(sizes[1:].argmax())
    return found


def low_confidence_box(
    low: Tensor, largest_sides: Sequence[int], smallest: Sequence[int], spacing: Sequence[float]
) -> Slices | None:
    """The bounding box of the largest low-confidence component, cut down around its centroid; None: too small.

    Args:
        low: boolean [*S], true where the confidence is low.
        largest_sides: no side is longer, unless `smallest` is.
        smallest: no side is shorter; a component with fewer voxels than such a box is left alone.
        spacing: mm per axis; decides how an anisotropic volume is searched.
    """
    component = largest_component(low, spacing)
    places = np.argwhere(component)
    if len(places) < max(1, int(np.prod(smallest))):
        return None
    box = []
    for axis, size in enumerate(low.shape):
        first, last = int(places[:, axis].min()), int(places[:, axis].max()) + 1
        side = min(size, max(smallest[axis], min(last - first, largest_sides[axis])))
        start = round(float(places[:, axis].mean() - (side - 1) / 2))
        # a shorter box stays within the component's, a longer one within the patch
        low_end, high_end = (first, last - side) if side <= last - first else (0, size - side)
        start = min(max(start, low_end), high_end)
        box.append(slice(start, start + side))
    return tuple(box)


def window_means(values: Tensor, sides: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """Means of values [*S] over all windows of these sides, at every quarter of a side: [*W], and the steps per axis.

    Window (i, j, …) starts at voxel (i·step, j·step, …).
    """
    steps = tuple(max(1, side // STEPS_PER_SIDE) for side in sides)
    for axis, (side, step) in enumerate(zip(sides, steps, strict=True)):  # a mean of means: one axis after the other
        values = values.unfold(axis, side, step).mean(-1)
    return values, steps


def best_windows(confidence: Tensor, sides: Sequence[int], n: int) -> list[Slices]:
    """Up to n windows of the highest mean confidence [*S] that do not overlap, the best first."""
    means, steps = window_means(confidence, sides)
    means = means.clone()
    reach = [(side - 1) // step for side, step in zip(sides, steps, strict=True)]  # nearer windows overlap
    found: list[Slices] = []
    while len(found) < n:
        place = [int(index) for index in np.unravel_index(int(means.argmax()), means.shape)]
        if not bool(torch.isfinite(means[tuple(place)])):
            break
        starts = [index * step for index, step in zip(place, steps, strict=True)]
        found.append(tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True)))
        near = tuple(slice(max(0, index - r), index + r + 1) for index, r in zip(place, reach, strict=True))
        means[near] = -torch.inf
    return found


def mean_probabilities(judged: Judged, box: Slices) -> Tensor:
    """Of the classes, over the voxels of a box: [C]."""
    return judged.q[(slice(None), *box)].flatten(1).mean(1)


def mean_confidence(judged: Judged, box: Slices) -> float:
    """Over the voxels of a box."""
    return float(judged.confidence[box].mean())


def find_displacement(mine: Judged, other: Judged, valid: Tensor, limits: Limits) -> Displacement | None:
    """The largest low-confidence region of one view, and what of the other view is to replace it.

    Of the most confident windows of that size in the other view, the one whose classes are the most like those of the
    region; None where there is no region, or nothing more confident.

    Args:
        mine: what is thought of the view that is to be changed.
        other: what is thought of the view that windows are taken from.
        valid: boolean [*S], of both views; other voxels are in no region, and count as confidence 0.
        limits: what counts as low, and how large a region may be.
    """
    low = (mine.confidence < limits.threshold) & valid
    target = low_confidence_box(low, limits.largest_sides, limits.smallest_sides, limits.spacing)
    if target is None:
        return None
    sides = [place.stop - place.start for place in target]
    windows = best_windows(other.confidence, sides, limits.n_windows)
    if not windows:
        return None
    wanted = mean_probabilities(mine, target)
    divergences = [
        float(prior_divergence(mean_probabilities(other, window), wanted, limits.regions)) for window in windows
    ]
    rank = int(np.argmin(divergences))
    better = mean_confidence(other, windows[rank]) > mean_confidence(mine, target)
    return Displacement(target, windows[rank], rank) if better else None


def moved_at_random(found: Displacement, shape: Sequence[int], generator: torch.Generator) -> Displacement:
    """A displacement of the same size, from any place to any place: what the search is to be compared with."""
    sides = [place.stop - place.start for place in found.target]
    return Displacement(placed_box(sides, shape, generator), placed_box(sides, shape, generator))


def find_displacements(
    mine: Decisions, other: Decisions, valid: Tensor, limits: Limits, random_places: torch.Generator | None = None
) -> list[Displacement | None]:
    """`find_displacement` for each patch; valid is boolean [N, 1, *S]. With a generator, `moved_at_random` after it."""
    found = [find_displacement(*three, limits) for three in zip(mine.patches, other.patches, valid[:, 0], strict=True)]
    if random_places is None:
        return found
    shape = valid.shape[2:]
    return [None if move is None else moved_at_random(move, shape, random_places) for move in found]


def what_moved(
    moves: Sequence[Displacement | None], mine: Decisions, other: Decisions, valid: Tensor, limits: Limits
) -> dict[str, float]:
    """Shares of patches and voxels that were displaced, the confidence that they won, how many voxels were low, of all
    and of what was replaced, and how often the classes chose another window than the confidence."""
    made = [(row, move) for row, move in enumerate(moves) if move is not None]
    won = [
        mean_confidence(other.patches[row], move.source) - mean_confidence(mine.patches[row], move.target)
        for row, move in made
    ]
    n_voxels = sum(math.prod(place.stop - place.start for place in move.target) for _, move in made)
    low = (mine.confidence < limits.threshold) & valid[:, 0]
    n_low = sum(int(low[row][move.target].sum()) for row, move in made)
    return {
        "displaced_share": len(made) / len(moves),
        "displaced_voxel_share": n_voxels / valid.numel(),
        "displaced_low_share": n_low / max(1, n_voxels),
        "chosen_by_class_share": sum(move.rank > 0 for _, move in made) / max(1, len(made)),
        "confidence_won": sum(won) / max(1, len(won)),
        "low_share": float(low.sum() / valid.sum().clamp(min=1)),
    }


def displaced(values: Tensor, other: Tensor, moves: Sequence[Displacement | None]) -> Tensor:
    """A copy of values [N, c, *S] in which each move has put a box of the other view [N, c, *S]; None: nothing."""
    result = values.clone()
    for mine, theirs, move in zip(result, other, moves, strict=True):
        if move is not None:
            mine[(slice(None), *move.target)] = theirs[(slice(None), *move.source)]
    return result
