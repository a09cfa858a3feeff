"""From logits in the preprocessed grid to label maps in the original one, plane by plane.

Logits are resampled linearly (nnU-Net v2's order 1; where the spacing is anisotropic the coarse axis takes the nearest
slice), the label is decided at once, and only label maps are kept at full size: memory is bounded by the volume, not
by the number of classes. Axes are in transposed order until the very end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from autossl.data.labels import LabelSchema
from autossl.data.probabilities import STEPS, quantize
from autossl.inference.predictor import Slab
from autossl.inference.uncertainty import normalized_entropy, pairwise_disagreement
from autossl.networks.prediction import Activation, probabilities_of

ELEMENTS_AT_ONCE = 1 << 23
"""Numbers of a block of resampled logits: 32 MB, and a few such blocks live at the same time."""


@dataclass(frozen=True)
class OriginalGrid:
    """Where a preprocessed case came from."""

    shape: tuple[int, int, int]
    """Transposed order, before the crop."""
    crop: tuple[slice, slice, slice]
    """The part of it that was kept."""
    transpose_backward: tuple[int, int, int]
    """Back to the oriented array's z,y,x."""
    coarse_axis: int | None = None
    """Axis that takes the nearest slice; None: all are interpolated."""

    @property
    def cropped_shape(self) -> tuple[int, int, int]:
        """Shape after the crop, before resampling."""
        z, y, x = (part.stop - part.start for part in self.crop)
        return z, y, x


@dataclass(frozen=True)
class Wanted:
    """What to restore beside the label map."""

    probabilities: bool = False
    uncertainty: bool = False


@dataclass(frozen=True)
class Restored:
    """Arrays of the original oriented image, z,y,x."""

    label_map: npt.NDArray[np.integer[Any]]
    probabilities: npt.NDArray[np.uint8] | None = None
    """`quantize`d [K,z,y,x] of the logits averaged over the folds; outside of the crop 1 for background (labels), 0
    (regions). `labels_of` them are the label map."""
    entropy: npt.NDArray[np.float32] | None = None
    """`normalized_entropy` of the folds' mean probabilities; 0 outside of the crop."""
    disagreement: npt.NDArray[np.float32] | None = None
    """`pairwise_disagreement` of the folds' own label maps; 0 outside of the crop; None with one fold."""


def restore(
    slabs: Iterable[Slab],
    shape: Sequence[int],
    grid: OriginalGrid,
    schema: LabelSchema,
    activation: Activation,
    wanted: Wanted | None = None,
) -> Restored:
    """Label map, and what else is wanted, of a stream of logits.

    Args:
        slabs: finished rows [F,K,n,y,x], ascending.
        shape: z,y,x of the preprocessed image that the slabs fill.
        grid: where to put the result.
        schema: which output is which label.
        activation: of the logits, `PredictionSpec.output_activation`.
        wanted: None: the label map only.
    """
    canvas = _Canvas(grid, schema, activation, wanted or Wanted())
    resampler = SlabResampler(shape, grid.cropped_shape, grid.coarse_axis)
    for slab in slabs:
        for start, logits in resampler.feed(slab):
            canvas.paint(start, logits)
    return canvas.result()


def decide_labels(logits: Tensor, schema: LabelSchema) -> Tensor:
    """Label values from logits [K, ...]: a running maximum over the labels, or regions merged in their order.

    Returns uint8, or int32 where a value needs it. Equal logits go to the first label; a region needs more than 0.
    """
    small = schema.dtype == np.uint8
    labels = torch.zeros(logits.shape[1:], dtype=torch.uint8 if small else torch.int32, device=logits.device)
    if schema.has_regions:
        for value, region in zip(schema.written_values, logits, strict=True):
            labels.masked_fill_(region > 0, value)
        return labels
    best = logits[0].clone()
    for value, candidate in zip(schema.written_values[1:], logits[1:], strict=True):
        labels.masked_fill_(candidate > best, value)
        torch.maximum(best, candidate, out=best)
    return labels


class SlabResampler:
    """Linear resampling of a stream of rows to another grid, as scikit-image's resize of order 1 in edge mode."""

    def __init__(self, shape: Sequence[int], target: Sequence[int], coarse_axis: int | None = None) -> None:
        self._plane = (target[1], target[2])
        self._same_plane = tuple(shape[1:]) == self._plane
        self._coarse_axis = coarse_axis
        self._nearest = {axis: nearest_slices(shape[axis], target[axis]) for axis in (1, 2) if axis == coarse_axis}
        if coarse_axis == 0:
            self._lower = nearest_slices(shape[0], target[0])
            self._upper, self._share = self._lower, np.zeros(target[0], dtype=np.float32)
        else:
            self._lower, self._upper, self._share = linear_taps(shape[0], target[0])
        self._next = 0
        self._held: Tensor | None = None
        self._held_start = 0

    def feed(self, slab: Slab) -> Iterator[tuple[int, Tensor]]:
        """Gives (first row, logits [F,K,n,y,x]) of the target rows that are decided; use each before the next."""
        n_folds, n_outputs, n_rows = slab.logits.shape[:3]
        logits = slab.logits.flatten(0, 1)
        largest_plane = max(int(np.prod(self._plane)), int(np.prod(logits.shape[2:])))
        at_once = max(1, ELEMENTS_AT_ONCE // (len(logits) * largest_plane))
        for first in range(0, n_rows, at_once):
            rows = self._resize_planes(logits[:, first : first + at_once])
            for start, block in self._blend_rows(slab.start + first, rows, at_once):
                yield start, block.unflatten(0, (n_folds, n_outputs))

    def _blend_rows(self, start: int, rows: Tensor, at_once: int) -> Iterator[tuple[int, Tensor]]:
        """Target rows that source rows up to the end of `rows` [G,n,y,x] decide."""
        known = start + rows.shape[1]
        if self._held is not None:
            rows, start = torch.cat([self._held, rows], 1), self._held_start
        ready = int(np.searchsorted(self._upper, known, side="left"))
        while self._next < ready:
            chosen = slice(self._next, min(self._next + at_once, ready))
            yield self._next, self._mixed(rows, start, chosen)
            self._next = chosen.stop
        first_needed = int(self._lower[self._next]) if self._next < len(self._lower) else known
        self._held = rows[:, first_needed - start :].clone() if first_needed < known else None
        self._held_start = first_needed

    def _mixed(self, rows: Tensor, start: int, chosen: slice) -> Tensor:
        lower, upper, share = self._lower[chosen], self._upper[chosen], self._share[chosen]
        if not share.any():
            if lower[-1] - lower[0] == len(lower) - 1:
                return rows[:, lower[0] - start : lower[-1] - start + 1]
            return rows[:, torch.from_numpy(lower - start).to(rows.device)]
        below = rows[:, torch.from_numpy(lower - start).to(rows.device)]
        above = rows[:, torch.from_numpy(upper - start).to(rows.device)]
        return below.lerp_(above, torch.from_numpy(share).to(rows.device).view(-1, 1, 1))

    def _resize_planes(self, planes: Tensor) -> Tensor:
        """[G,n,y,x] in the target's plane."""
        if self._same_plane:
            return planes
        size = [
            n if axis in self._nearest else m for axis, n, m in zip((1, 2), planes.shape[2:], self._plane, strict=True)
        ]
        resized = functional.interpolate(planes, size=size, mode="bilinear", align_corners=False)
        for axis, index in self._nearest.items():
            resized = resized.index_select(axis + 1, torch.from_numpy(index).to(resized.device))
        return resized


def linear_taps(old: int, new: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The two source rows of each target row, and the share of the second; areas aligned, edges repeated."""
    places = ((np.arange(new) + 0.5) * (old / new) - 0.5).clip(0, old - 1)
    lower = np.floor(places).astype(np.int64)
    return lower, np.minimum(lower + 1, old - 1), (places - lower).astype(np.float32)


def nearest_slices(old: int, new: int) -> npt.NDArray[np.int64]:
    """The source slice of each target slice along a coarse axis, with nnU-Net's (scipy's) rounding."""
    from scipy import ndimage  # slow to import, and few predictions need it

    places = old / new * (np.arange(new) + 0.5) - 0.5
    slices = ndimage.map_coordinates(np.arange(old, dtype=np.float64), places[None], order=0, mode="nearest")
    return slices.astype(np.int64)


class _Canvas:
    """The full-size results, painted row by row."""

    def __init__(self, grid: OriginalGrid, schema: LabelSchema, activation: Activation, wanted: Wanted) -> None:
        self._grid, self._schema, self._activation, self._wanted = grid, schema, activation, wanted
        self._labels = np.zeros(grid.shape, dtype=schema.dtype)
        self._probabilities: npt.NDArray[np.uint8] | None = None
        self._entropy = np.zeros(grid.shape, dtype=np.float32) if wanted.uncertainty else None
        self._disagreement: npt.NDArray[np.float32] | None = None
        if wanted.probabilities:
            self._probabilities = np.zeros((schema.n_outputs, *grid.shape), dtype=np.uint8)
            if not schema.has_regions:
                self._probabilities[0] = STEPS

    def paint(self, start: int, logits: Tensor) -> None:
        """Writes the rows from `start` on; logits [F,K,n,y,x] in the cropped original grid."""
        rows, *plane = self._grid.crop
        place = (slice(rows.start + start, rows.start + start + logits.shape[2]), *plane)
        mean = logits[0] if len(logits) == 1 else logits.mean(0)
        self._labels[place] = decide_labels(mean, self._schema).cpu().numpy()
        if self._probabilities is not None:
            probabilities = probabilities_of(mean, self._activation, 0).cpu().numpy()
            keep_largest = not self._schema.has_regions
            self._probabilities[(slice(None), *place)] = quantize(probabilities, keep_largest)
        if self._entropy is not None:
            total = sum(probabilities_of(fold, self._activation, 0) for fold in logits) / len(logits)
            self._entropy[place] = normalized_entropy(torch.as_tensor(total), self._activation).cpu().numpy()
            if len(logits) > 1:
                if self._disagreement is None:
                    self._disagreement = np.zeros(self._grid.shape, dtype=np.float32)
                labels = torch.stack([decide_labels(fold, self._schema) for fold in logits])
                self._disagreement[place] = pairwise_disagreement(labels).cpu().numpy()

    def result(self) -> Restored:
        """All arrays in the oriented image's order."""
        back = self._grid.transpose_backward

        def turned(array: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
            return None if array is None else array.transpose(back)

        probabilities = self._probabilities
        if probabilities is not None:
            probabilities = probabilities.transpose(0, *(axis + 1 for axis in back))
        return Restored(self._labels.transpose(back), probabilities, turned(self._entropy), turned(self._disagreement))
