"""Which pseudo-labels of whole cases are worth training on: rules on histograms, volumes and overlaps, no files.

Confidences are levels 0..255, probability × 255, rounded; level 0 marks a voxel that lost its label. A *decision* is
what a confidence belongs to: the class that won (softmax), or a region's inside or outside (regions). Arrays are whole
cases [z, y, x], with K maps in front where there are several: K is 1 (softmax) or the number of regions.
Sources: thresholds per class so that the same share of each survives (Zou et al., CBST, ECCV 2018), stability of a case
over the checkpoints of a training (Yang et al., ST++, CVPR 2022, with Dice for their mean IoU); volumes, missing
classes and all numbers are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from autossl.data.labels import LabelSchema
from autossl.trainers.components.pseudo import keep_largest

LEVELS = 256
TOP = LEVELS - 1
EXPECTED_PRESENCE = 0.95
"""A class that so many labeled cases show must not be missing."""
VOLUME_MARGIN = (0.5, 2.0)
"""Times the smallest and the largest labeled volume: what a pseudo-label's volume must lie between."""
FALLBACK_SHARE = 0.2
"""Share of the cases that is used where the rules reject all of them."""

LabelMap = npt.NDArray[np.uint8]
Levels = npt.NDArray[np.uint8]
Classes = Mapping[str, tuple[int, ...]]
"""Foreground class or region → label values."""


# -------------------------------------------------------------------------------------------------------- confidences


class Decisions:
    """Numbers the decisions of a label schema: classes with the background, or two per region."""

    def __init__(self, schema: LabelSchema) -> None:
        if schema.has_regions:
            self.names = tuple(f"{side}{name}" for name in schema.foreground for side in ("not ", ""))
        else:
            self.names = ("background", *schema.foreground)
        self.n_outcomes = 2 if schema.has_regions else schema.n_outputs
        """Outcomes that one confidence is spread over."""
        self.n_maps = len(schema.foreground) if schema.has_regions else 1
        self._table = np.zeros((self.n_maps, LEVELS), dtype=np.uint8)
        for index, values in enumerate(schema.foreground.values()):
            if schema.has_regions:
                self._table[index] = 2 * index
                self._table[index, list(values)] = 2 * index + 1
            else:
                self._table[0, list(values)] = index + 1

    def of(self, label: LabelMap) -> npt.NDArray[np.uint8]:
        """The decision of each voxel in each map, [K, *label.shape], from label values."""
        return self._table[:, label]


def confidence_histogram(decisions: npt.NDArray[np.uint8], confidences: Levels, n: int) -> npt.NDArray[np.int64]:
    """Voxels per decision and confidence level, [n, 256]; level 0 is left empty.

    Args:
        decisions: [K, z, y, x].
        confidences: of the same shape.
        n: number of decisions.
    """
    counts = np.zeros(n * LEVELS, dtype=np.int64)
    planes = (-1, *decisions.shape[-2:])
    for decision, confidence in zip(decisions.reshape(planes), confidences.reshape(planes), strict=True):
        cell = decision.astype(np.int64) * LEVELS + confidence
        counts += np.bincount(cell.ravel(), minlength=n * LEVELS)
    table = counts.reshape(n, LEVELS)
    table[:, 0] = 0
    return table


def class_thresholds(
    histogram: npt.NDArray[np.int64], kept_share: float, smallest: float = 0.5
) -> npt.NDArray[np.int64]:
    """Per decision the highest level at which at least `kept_share` of its voxels survive, but never below `smallest`.

    Args:
        histogram: [D, 256], summed over all cases.
        kept_share: 0..1.
        smallest: probability.
    """
    floor = math.ceil(smallest * TOP - 1e-9)
    survivors = np.flip(np.cumsum(np.flip(histogram, 1), 1), 1)
    wanted = kept_share * histogram.sum(1, keepdims=True) - 1e-9
    reached = (survivors >= wanted).sum(1) - 1  # survivors fall with the level
    levels = np.where(histogram.sum(1) > 0, np.maximum(reached, floor), floor)
    return levels.astype(np.int64)


def kept_confidence(
    decisions: npt.NDArray[np.uint8], confidences: Levels, thresholds: npt.NDArray[np.integer]
) -> Levels:
    """The smallest confidence of a voxel over its maps; 0 where any of them is below its decision's threshold.

    Args:
        decisions: [K, z, y, x].
        confidences: of the same shape.
        thresholds: level per decision, [D].
    """
    kept = (confidences >= thresholds.astype(np.uint8)[decisions]).all(0) & (confidences > 0).all(0)
    return np.where(kept, confidences.min(0), 0).astype(np.uint8)


def soft_confidence(confidences: Levels, n_outcomes: int) -> Levels:
    """((κ - 1/C) / (1 - 1/C))² of the smallest confidence κ over the maps [K, z, y, x], as levels; 0 below chance."""
    chance = 1 / n_outcomes
    above = np.clip((np.arange(LEVELS) / TOP - chance) / (1 - chance), 0, 1)
    table = np.round(above**2 * TOP).astype(np.uint8)
    return table[confidences.min(0)]


# ---------------------------------------------------------------------------------------------------------- label maps


def foreground_dice(first: LabelMap, second: LabelMap, classes: Classes) -> float:
    """Mean Dice over the classes (or regions) between two label maps; a class that both lack counts 1."""
    pairs = np.zeros(LEVELS * LEVELS, dtype=np.int64)
    planes = (-1, *first.shape[-2:])
    for mine, theirs in zip(first.reshape(planes), second.reshape(planes), strict=True):
        pairs += np.bincount((mine.astype(np.int64) * LEVELS + theirs).ravel(), minlength=pairs.size)
    table = pairs.reshape(LEVELS, LEVELS)
    scores = []
    for values in classes.values():
        chosen = list(values)
        sizes = int(table[chosen].sum() + table[:, chosen].sum())
        scores.append(2 * int(table[np.ix_(chosen, chosen)].sum()) / sizes if sizes else 1.0)
    return float(np.mean(scores))


def without_islands(label: LabelMap, schema: LabelSchema, single: Sequence[int]) -> LabelMap:
    """Only the largest component of each single-component class; whole cases, so the border spares nothing.

    Args:
        label: values as the schema writes them.
        schema: regions are cleaned one by one and written again in their order.
        single: values that the single-component classes (or regions) are written with.
    """
    if not single:
        return label
    if not schema.has_regions:
        whole = torch.from_numpy(label)[None, None]
        return keep_largest(whole, list(single), spare_border=False)[0, 0].numpy()
    masks = list(schema.class_masks(label).values())
    for index, value in enumerate(schema.written_values):
        if value in single:
            region = torch.from_numpy(masks[index].astype(np.float32))[None, None]
            masks[index] = keep_largest(region, [0], spare_border=False)[0, 0].numpy() > 0.5
    return schema.merge_outputs(masks).astype(np.uint8)


def class_volumes(label: LabelMap, classes: Classes, voxel_volume: float) -> dict[str, float]:
    """Volume of each class (or region) in the unit of `voxel_volume`."""
    counts = np.bincount(label.ravel(), minlength=LEVELS)
    return {name: float(counts[list(values)].sum()) * voxel_volume for name, values in classes.items()}


# ---------------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Expected:
    """What the labeled training cases of the fold say of a class."""

    presence: float
    """Share of the cases that show it."""
    smallest: float | None
    """Volume where it is present; None: no case shows it."""
    largest: float | None


def oddities(volumes: Mapping[str, float], expected: Mapping[str, Expected]) -> list[str]:
    """Why a pseudo-label is not plausible, one sentence per class; empty where nothing is odd."""
    found = []
    low, high = VOLUME_MARGIN
    for name, volume in volumes.items():
        known = expected[name]
        if volume == 0:
            if known.presence >= EXPECTED_PRESENCE:
                found.append(f"{name} is missing, {known.presence:.0%} of the labeled cases show it")
            continue
        if known.smallest is None or known.largest is None:
            continue
        at_least, at_most = low * known.smallest, high * known.largest
        if not at_least <= volume <= at_most:
            found.append(f"{name} has volume {volume:.4g}, expected {at_least:.4g} to {at_most:.4g}")
    return found


def never_predicted(volumes: Sequence[Mapping[str, float]], expected: Mapping[str, Expected]) -> list[str]:
    """Classes that labeled cases show and no pseudo-label does: that a case lacks them says nothing."""
    return [
        name
        for name, known in expected.items()
        if known.presence > 0 and all(case_volumes[name] == 0 for case_volumes in volumes)
    ]


@dataclass(frozen=True)
class Selection:
    """Which cases are used."""

    accepted: tuple[str, ...]
    """In the order of the cases given."""
    reasons: dict[str, list[str]]
    """Per case why it is rejected; for a case of the fallback, why it was rejected at first."""
    fallback: bool
    """All cases were rejected, and the most stable ones that show any foreground are used all the same."""


def select_cases(
    stability: Mapping[str, float],
    odd: Mapping[str, Sequence[str]],
    reliable_share: float,
    has_foreground: Mapping[str, bool],
) -> Selection:
    """The most stable cases of which nothing is odd; ties are broken by name.

    Args:
        stability: case → 0..1.
        odd: case → sentences of `oddities`.
        reliable_share: share of the cases that is stable enough, rounded up.
        has_foreground: case → whether its pseudo-label shows anything.
    """
    ranked = sorted(stability, key=lambda case: (-stability[case], case))
    stable = set(ranked[: math.ceil(reliable_share * len(ranked) - 1e-9)])
    reasons = {case: list(odd.get(case, ())) for case in stability}
    for case in stability:
        if case not in stable:
            reasons[case].append(f"not among the most stable {reliable_share:.0%} of the cases")
    accepted = tuple(case for case in stability if not reasons[case])
    if accepted or not ranked:
        return Selection(accepted, reasons, fallback=False)
    # An empty map was rejected because a class is missing: learning from it would only make the student as empty.
    shown = [case for case in ranked if has_foreground[case]][: math.ceil(FALLBACK_SHARE * len(ranked) - 1e-9)]
    return Selection(tuple(case for case in stability if case in shown), reasons, fallback=bool(shown))
