"""Calibration: whether voxels that get a class with probability p belong to it in p of the cases. Pure functions.

The expected calibration error (ECE; Guo et al., ICML 2017) of a class sorts voxels into 15 bins of equal width by their
probability of the class, and is the mean over the voxels of |share that belongs to the class - mean probability| of
their bin. 0 is perfect. It is taken over the voxels in the box around both of the class's masks (and a voxel more):
far away from a class everybody is right and sure, and a whole volume would dilute every error to nothing. So figures of
other boxes do not compare, and a class that is empty in prediction and reference has none (NaN). Ignored voxels count
nowhere.

Each class is taken by itself, one against the rest; with labels, classical ECE looks at the largest probability only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autossl.data.labels import LabelSchema
from autossl.evaluation.class_masks import Box

BINS = 15
"""Stored probabilities are bytes, 255 steps: 15 bins hold 17 steps each."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reliability:
    """Voxels by their probability; what several slabs or cases have adds up with `+`."""

    counts: FloatArray
    """[bins] voxels."""
    probability_sums: FloatArray
    """[bins] of these voxels."""
    hits: FloatArray
    """[bins] of these voxels, those that belong to the class."""

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(
            self.counts + other.counts, self.probability_sums + other.probability_sums, self.hits + other.hits
        )

    @property
    def error(self) -> float:
        """The expected calibration error, 0 to 1; NaN without voxels."""
        total = self.counts.sum()
        return float(np.abs(self.hits - self.probability_sums).sum() / total) if total else math.nan


def reliability(
    probabilities: npt.NDArray[np.floating], inside: npt.NDArray[np.bool_], n_bins: int = BINS
) -> Reliability:
    """Sorts voxels into bins of equal width.

    Args:
        probabilities: Of one class, 0 to 1, any shape.
        inside: Whether the voxel belongs to the class, the same shape.
        n_bins: Their number; the last one includes 1.

    Raises:
        ValueError: The shapes differ.
    """
    if probabilities.shape != inside.shape:
        raise ValueError(f"probabilities of shape {probabilities.shape}, the reference has {inside.shape}")
    flat = probabilities.ravel().astype(np.float64)
    # a byte's probability on the edge of two bins is a rounding error below it
    bins = np.clip((flat * n_bins + 1e-6).astype(np.intp), 0, n_bins - 1)
    return Reliability(
        counts=np.bincount(bins, minlength=n_bins).astype(np.float64),
        probability_sums=np.bincount(bins, weights=flat, minlength=n_bins).astype(np.float64),
        hits=np.bincount(bins, weights=inside.ravel(), minlength=n_bins).astype(np.float64),
    )


def nothing_seen(n_bins: int = BINS) -> Reliability:
    """Of no voxel: what a sum starts from."""
    return Reliability(np.zeros(n_bins), np.zeros(n_bins), np.zeros(n_bins))


def calibration_per_class(
    slabs: Iterable[tuple[int, npt.NDArray[np.floating]]],
    reference: npt.NDArray[np.integer],
    schema: LabelSchema,
    boxes: Mapping[str, Box],
) -> dict[str, float]:
    """Expected calibration error of each class or region; NaN where its box is empty.

    Args:
        slabs: First slice and probabilities [K,n,y,x] of the outputs of the schema; each slice once.
        reference: Label map [z,y,x].
        schema: What the values mean.
        boxes: Class → the box of its voxels, as `class_masks` gives it.
    """
    first_output = 0 if schema.has_regions else 1
    seen = {name: nothing_seen() for name in boxes}
    for start, probabilities in slabs:
        stop = start + probabilities.shape[1]
        for number, (name, values) in enumerate(schema.foreground.items(), start=first_output):
            rows, *plane = boxes[name]
            rows = slice(max(rows.start, start), min(rows.stop, stop))
            if rows.start >= rows.stop:
                continue
            true = reference[(rows, *plane)]
            counted = np.full(true.shape, True) if schema.ignore_label is None else true != schema.ignore_label
            own_rows = probabilities[number, rows.start - start : rows.stop - start]
            own = own_rows[(slice(None), *plane)]
            seen[name] += reliability(own[counted], np.isin(true, values)[counted])
    return {name: found.error for name, found in seen.items()}
