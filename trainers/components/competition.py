"""Networks that compete: who does better on the labeled patches, what the winner says, how alike views are answered.

Shapes: logits [N, C, *S]; targets [N, 1, *S] or regions [N, C, *S]; masks boolean [N, 1, *S].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from autossl.trainers.components.losses import connected_zero, masked_bce, masked_ce, one_hot, soft_dice
from autossl.trainers.components.pseudo import sharpen

SMALLEST_NORM = 1e-3
"""Logits that are shorter have no direction to speak of; it bounds the gradient of the cosine."""


@torch.no_grad()
def labeled_score(z: Tensor, target: Tensor, valid: Tensor, ce_share: float, regions: bool = False) -> Tensor:
    """ce_share·CE + (1 - ce_share)·(1 - Dice) of the labeled voxels, lower is better; no gradient.

    The Dice is the mean over the foreground classes (or regions) that the labels show; none: only the CE is left.
    """
    z = z.float()
    p, y = (z.sigmoid(), target) if regions else (z.softmax(1)[:, 1:], one_hot(target, z.shape[1])[:, 1:])
    present = ((y > 0) & valid).flatten(2).any(2).any(0)
    wrong = torch.where(present, 1 - soft_dice(p, y.float(), valid), 0).sum() / present.sum().clamp(min=1)
    cross_entropy = (masked_bce if regions else masked_ce)(z, target, valid)
    return ce_share * cross_entropy + (1 - ce_share) * wrong


@torch.no_grad()
def sharpened(z: Tensor, temperature: float, regions: bool = False) -> Tensor:
    """Probabilities of logits whose decisions are clearer than they were; constants."""
    z = z.float()
    return torch.sigmoid(z / temperature) if regions else sharpen(torch.log_softmax(z, 1), temperature)


def direction_distance(z_1: Tensor, z_2: Tensor, counted: Tensor, regions: bool = False) -> Tensor:
    """Mean over the counted voxels of 1 - the cosine of both logits along the classes, in [0, 2]; none: 0.

    Regions: between (p, 1 - p) of each, in [0, 1], since a single logit has no direction. The gradient flows through
    both sides.
    """
    if not bool(counted.any()):
        return connected_zero(z_1) + connected_zero(z_2)
    first, second = (torch.where(counted, z.float(), 1) for z in (z_1, z_2))
    if regions:
        first, second = (torch.stack([torch.sigmoid(z), torch.sigmoid(-z)], 1) for z in (first, second))
    distance = 1 - functional.cosine_similarity(first, second, 1, SMALLEST_NORM)
    distance = distance if regions else distance.unsqueeze(1)
    return torch.where(counted, distance, 0).sum() / (counted.sum() * distance.shape[1])
