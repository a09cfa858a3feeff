"""Lesion-wise F1: how many separate pieces of a class were found, whatever their size. Pure functions of arrays.

A lesion is a connected component (26 neighbors, 2D: 8). Predicted and reference lesions are paired one to one, the pair
with the largest IoU first, as long as the IoU is at least 0.1 (the overlap that the PI-CAI challenge asks for). Paired
ones are true positives, F1 = 2 TP / (2 TP + FP + FN). Differences to other definitions: where any common voxel counts,
one prediction may find several lesions and F1 is higher; with an IoU above 0.5 as in panoptic quality it is lower.

Both masks empty: NaN. One empty: 0. Ignored voxels are in no lesion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cc3d
import numpy as np
import numpy.typing as npt

from autossl.evaluation.class_masks import ClassMasks

MIN_IOU = 0.1
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LesionCounts:
    """Lesions found, found wrongly, missed."""

    true_positive: int
    false_positive: int
    false_negative: int

    @property
    def f1(self) -> float:
        """2 TP / (2 TP + FP + FN); NaN where there is no lesion on either side."""
        size = 2 * self.true_positive + self.false_positive + self.false_negative
        return 2 * self.true_positive / size if size else math.nan


def count_lesions(prediction: Mask, reference: Mask, min_iou: float = MIN_IOU) -> LesionCounts:
    """Pairs the components of two masks [z,y,x] (or [y,x]) of the same shape.

    Args:
        prediction: The predicted mask.
        reference: The reference.
        min_iou: From which IoU on, above 0, two lesions are one.
    """
    (predicted, n_predicted), (true, n_true) = (_components(mask) for mask in (prediction, reference))
    n_found = 0
    taken: tuple[set[int], set[int]] = (set(), set())
    for own, other, iou in _overlaps(predicted, true):
        if iou >= min_iou and own not in taken[0] and other not in taken[1]:
            taken[0].add(own)
            taken[1].add(other)
            n_found += 1
    return LesionCounts(n_found, n_predicted - n_found, n_true - n_found)


def lesion_metrics(masks: ClassMasks) -> dict[str, float]:
    """`lesion_f1` of a class, by the rules of this module."""
    counted = np.True_ if masks.ignored is None else ~masks.ignored
    return {"lesion_f1": count_lesions(masks.prediction & counted, masks.reference & counted).f1}


def _components(mask: Mask) -> tuple[npt.NDArray[np.integer], int]:
    if not mask.any():
        return np.zeros(mask.shape, dtype=np.uint32), 0
    return cc3d.connected_components(mask, connectivity=8 if mask.ndim == 2 else 26, return_N=True)


def _overlaps(predicted: npt.NDArray[np.integer], true: npt.NDArray[np.integer]) -> list[tuple[int, int, float]]:
    """Components that share a voxel and their IoU, largest first; equal ones in the order of their numbers."""
    common = (predicted > 0) & (true > 0)
    n = int(true.max(initial=0)) + 1
    # a pair as one number: sorting numbers is many times faster than sorting rows
    codes, shared = np.unique(predicted[common].astype(np.int64) * n + true[common], return_counts=True)
    sizes, true_sizes = (np.bincount(components.ravel()) for components in (predicted, true))
    overlaps = [
        (own, other, count / int(sizes[own] + true_sizes[other] - count))
        for (own, other), count in zip((divmod(int(code), n) for code in codes), shared.tolist(), strict=True)
    ]
    return sorted(overlaps, key=lambda overlap: (-overlap[2], overlap[0], overlap[1]))
