"""Dice and Kullback-Leibler divergence against soft targets, with each patch's part of the loss kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autossl.trainers.components.losses import EPS, deep_supervision_weights

PRESENT = 1e-3
"""A class whose Σp² + ΣY² is not above this is neither predicted nor wanted and has no Dice."""


def soft_target_loss(
    z: Sequence[Tensor], target: Tensor, valid: Tensor, n_first: int | None = None, regions: bool = False
) -> tuple[Tensor, Tensor]:
    """Dice + KL(target ‖ p) of the whole batch, as the parts of its first patches and of the others.

    Dice is 1 - mean over the classes of 2·Σ p·Y / (Σ p² + Σ Y²), sums over batch and space, the background among the
    classes. KL is Y·(ln Y - ln p), for regions that of each channel's two outcomes, averaged over voxels and channels.
    Levels of deep supervision have the weights of the supervised loss; targets are average-pooled to them.

    The patches of a batch share their Dice, so that it is no sum over patches. Its gradient is: each part has the
    gradient that reaches its own patches, and of the value its share of the voxels. Together they are the loss.

    Args:
        z: logits [N, C, *S_level], full resolution first.
        target: probabilities [N, C, *S], no gradient.
        valid: boolean [N, 1, *S]; what stands at other voxels does not matter.
        n_first: patches of the first part; None: all.
        regions: z are logits of sigmoids.
    """
    n_first = len(target) if n_first is None else n_first
    mine = torch.arange(len(target), device=target.device) < n_first
    first = second = torch.zeros((), device=target.device)
    for weight, level in zip(deep_supervision_weights(len(z)), z, strict=True):
        if weight > 0:
            y, w = pooled_target(target, valid, level.shape[2:])
            parts = _at_one_level(level, y, w, mine, regions)
            first, second = first + weight * parts[0], second + weight * parts[1]
    return first, second


def pooled_target(target: Tensor, valid: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Soft targets averaged over the valid voxels of each cell, and the share of those, float32 [N, 1, *shape]."""
    w = valid.float()
    y = torch.where(valid, target.float(), 0)
    if tuple(y.shape[2:]) != tuple(shape):
        pool: Any = functional.adaptive_avg_pool2d if y.ndim == 4 else functional.adaptive_avg_pool3d
        y, w = pool(y, tuple(shape)), pool(w, tuple(shape))
        y = (y / w.clamp(min=EPS)).clamp(max=1)  # rounding may lift it above
    return y, w


def _at_one_level(z: Tensor, y: Tensor, w: Tensor, mine: Tensor, regions: bool) -> tuple[Tensor, Tensor]:
    """Parts of the patches that are `mine` [N] and of the others."""
    z = torch.where(w > 0, z.float(), 0)
    if regions:
        p, log_p, log_not_p = torch.sigmoid(z), functional.logsigmoid(z), functional.logsigmoid(-z)
        divergence = torch.xlogy(y, y) - y * log_p + torch.xlogy(1 - y, 1 - y) - (1 - y) * log_not_p
    else:
        log_p = torch.log_softmax(z, 1)
        p = log_p.exp()
        divergence = torch.xlogy(y, y) - y * log_p
    space = tuple(range(2, z.ndim))
    voxels = w.sum((1, *space))
    total = voxels.sum().clamp(min=EPS)
    kl = (w * divergence).sum((1, *space)) / (z.shape[1] * total)
    both, below = (w * p * y).sum(space), (w * (p * p + y * y)).sum(space)

    def part(rows: Tensor) -> Tensor:
        row = rows[:, None]
        dice = _dice(torch.where(row, both, both.detach()), torch.where(row, below, below.detach()))
        share = voxels[rows].sum() / total
        return kl[rows].sum() + dice - (1 - share) * dice.detach()

    return part(mine), part(~mine)


def _dice(both: Tensor, below: Tensor) -> Tensor:
    """Of sums [N, C] per patch and class; 0 where no class is there. What is not finite stays so."""
    both, below = both.sum(0), below.sum(0)
    absent = below <= PRESENT
    dice = torch.where(absent, 0, 1 - 2 * both / below.clamp(min=EPS))
    return dice.sum() / (~absent).sum().clamp(min=1)
