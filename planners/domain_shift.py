"""Says with figures where the unlabeled cases differ from the labeled ones, since a teacher labels them as if alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

RATIO = 1.25
"""Of spacings and sizes: about the scaling that augmentation covers anyway (nnU-Net v2: 0.7 to 1.4)."""
OUTSIDE_SHARE = 0.1
"""Share of unlabeled cases beyond the labeled range (widened by `RATIO`) from which a note is made."""
SEPARATION = 0.25
"""|P(unlabeled > labeled) - 1/2| from which intensities count as different: 3 of 4 pairs point the same way."""
STANDARD_ERRORS = 2.5
"""The separation must also be this many standard errors (Mann-Whitney) from chance; 3 against 10 cases can be."""
MEDIAN, LOW, HIGH = 3, 1, 5
"""Positions of the quantiles 0.5, 0.05 and 0.95 in `intensity_quantiles`."""

Floats = npt.NDArray[np.float64]


class CaseNumbers(Protocol):
    """What is compared of a case."""

    @property
    def spacing_zyx_mm(self) -> tuple[float, float, float]:
        """Voxel size."""

    @property
    def shape_after_crop_zyx(self) -> tuple[int, int, int]:
        """Voxels."""

    @property
    def intensity_quantiles(self) -> tuple[tuple[float, ...], ...]:
        """Per channel."""


def domain_shift_notes(
    labeled: Sequence[CaseNumbers], unlabeled: Sequence[CaseNumbers], channel_names: Mapping[int, str]
) -> list[str]:
    """One sentence per difference in spacing, size and intensity; empty where the pools are alike or one is empty."""
    if not labeled or not unlabeled:
        return []
    notes = []
    spacing = [np.array([case.spacing_zyx_mm for case in pool]) for pool in (labeled, unlabeled)]
    voxels = [np.array([case.shape_after_crop_zyx for case in pool]) for pool in (labeled, unlabeled)]
    is_2d = all(np.all(shape[:, 0] == 1) for shape in voxels)
    for axis in range(1 if is_2d else 0, 3):
        name = "zyx"[axis]
        ours, theirs = spacing[0][:, axis], spacing[1][:, axis]
        notes += _length_notes(f"spacing along {name}", "mm", ours, theirs)
        notes += _length_notes(f"size along {name}", "mm", ours * voxels[0][:, axis], theirs * voxels[1][:, axis])
    for channel, channel_name in channel_names.items():
        quantiles = [np.array([case.intensity_quantiles[channel] for case in pool]) for pool in (labeled, unlabeled)]
        notes += _intensity_notes(f"channel {channel} ({channel_name})", *quantiles)
    return notes


def _length_notes(what: str, unit: str, labeled: Floats, unlabeled: Floats) -> list[str]:
    medians = float(np.median(labeled)), float(np.median(unlabeled))
    lowest, highest = float(labeled.min()), float(labeled.max())
    outside = int(np.count_nonzero((unlabeled < lowest / RATIO) | (unlabeled > highest * RATIO)))
    is_apart = max(medians) > RATIO * min(medians)
    if not is_apart and outside < OUTSIDE_SHARE * len(unlabeled):
        return []
    return [
        f"{what}: median {medians[0]:.4g} {unit} labeled, {medians[1]:.4g} {unit} unlabeled (factor "
        f"{medians[1] / medians[0]:.2f}); {outside} of {len(unlabeled)} unlabeled cases lie more than {RATIO:g} times "
        f"beyond the labeled range {lowest:.4g} to {highest:.4g} {unit}"
    ]


def _intensity_notes(what: str, labeled: Floats, unlabeled: Floats) -> list[str]:
    """Of medians, of spreads, and of skews; the last is what normalization by mean and deviation leaves."""
    notes = []
    for measure, explanation in (
        (_medians, "median intensity"),
        (_spreads, "spread of intensities (quantile 0.95 - 0.05)"),
        (_skews, "position of the median between the quantiles 0.05 and 0.95 (z-score normalization leaves it)"),
    ):
        ours, theirs = measure(labeled), measure(unlabeled)
        chance = probability_larger(ours, theirs)
        standard_error = math.sqrt((len(ours) + len(theirs) + 1) / (12 * len(ours) * len(theirs)))
        if abs(chance - 0.5) >= max(SEPARATION, STANDARD_ERRORS * standard_error):
            notes.append(
                f"{what}, {explanation}: {np.median(ours):.4g} labeled, {np.median(theirs):.4g} unlabeled (median over "
                f"cases); an unlabeled case has the larger value with probability {chance:.2f}"
            )
    return notes


def probability_larger(labeled: Floats, unlabeled: Floats) -> float:
    """P(unlabeled > labeled) of a random pair, ties count half (Mann-Whitney's U over the number of pairs)."""
    ordered = np.sort(labeled)
    below = np.searchsorted(ordered, unlabeled, side="left")
    up_to = np.searchsorted(ordered, unlabeled, side="right")
    return float((below + up_to).mean() / (2 * len(labeled)))


def _medians(quantiles: Floats) -> Floats:
    return quantiles[:, MEDIAN]


def _spreads(quantiles: Floats) -> Floats:
    return quantiles[:, HIGH] - quantiles[:, LOW]


def _skews(quantiles: Floats) -> Floats:
    spread = _spreads(quantiles)
    safe = np.where(spread > 0, spread, 1)
    return np.where(spread > 0, (quantiles[:, MEDIAN] - quantiles[:, LOW]) / safe, 0.5)
