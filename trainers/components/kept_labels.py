"""The supervised loss on pseudo-labels of which only some voxels are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from autossl.trainers.components.losses import (
    EPS,
    at_level,
    connected_zero,
    deep_supervision_weights,
    one_hot,
    soft_dice,
)

FEWEST_VOXELS = 50
"""Kept voxels of a class that a patch must hold before the Dice of that class says anything."""


def kept_label_loss(
    z: Sequence[Tensor], target: Tensor, kept: Tensor, weights: Tensor | None = None, *, regions: bool = False
) -> Tensor:
    """Dice + cross-entropy over kept voxels at every level, with the weights of deep supervision.

    Dice is per patch and leaves out the classes (regions) of which the patch holds fewer than 50 kept voxels. Patch
    weights scale what a patch adds, not what the sum is divided by: half everywhere is half the loss. Nothing kept:
    0 with a graph. With all voxels kept and enough of every class this is the supervised loss without batch Dice.

    Args:
        z: logits [N, C, *S_i], full resolution first.
        target: int64 [N, 1, *S], or float 0/1 [N, C, *S] for regions.
        kept: weight of each voxel [N, 1, *S], 0: ignored.
        weights: of the patches, [N]; None: 1 each.
        regions: sigmoid instead of softmax.
    """
    kept = kept.float()
    weights = torch.ones(len(target), device=kept.device) if weights is None else weights
    judged = judged_classes(target, kept, z[0].shape[1], regions)
    total = torch.zeros((), device=z[0].device)
    for share, level in zip(deep_supervision_weights(len(z)), z, strict=True):
        if share > 0:
            y, w = at_level(target, level.shape[2:]), at_level(kept, level.shape[2:])
            total = total + share * (_cross_entropy(level, y, w, weights) + _dice(level, y, w, judged, weights))
    return total


def judged_classes(target: Tensor, kept: Tensor, n_outputs: int, regions: bool = False) -> Tensor:
    """Which classes of a patch the Dice counts, at full resolution: boolean [N, F] without background (regions: C)."""
    y = target.float() if regions else one_hot(target, n_outputs)[:, 1:]
    return (y * kept).flatten(2).sum(2) >= FEWEST_VOXELS


def _cross_entropy(z: Tensor, target: Tensor, w: Tensor, weights: Tensor) -> Tensor:
    if not bool((w > 0).any()):
        return connected_zero(z)
    if target.is_floating_point():
        voxels = functional.binary_cross_entropy_with_logits(z.float(), target, reduction="none").mean(1)
    else:
        voxels = functional.cross_entropy(z.float(), target[:, 0], reduction="none")
    w = w[:, 0]
    patches = (torch.where(w > 0, voxels, 0) * w).flatten(1).sum(1)
    return (weights * patches).sum() / w.sum().clamp(min=EPS)


def _dice(z: Tensor, target: Tensor, w: Tensor, judged: Tensor, weights: Tensor) -> Tensor:
    if not bool(judged.any()):
        return connected_zero(z)
    regions = target.is_floating_point()
    p = torch.sigmoid(z.float()) if regions else torch.softmax(z.float(), 1)
    classes = None if regions else range(1, z.shape[1])
    lost = 1 - soft_dice(p, target, w, classes=classes, per_sample=True)
    return (torch.where(judged, lost, 0) * weights[:, None]).sum() / judged.sum()
