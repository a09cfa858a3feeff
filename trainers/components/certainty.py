"""How certain predictions are, voxel by voxel and on average."""

from __future__ import annotations

import torch
from torch import Tensor

from autossl.trainers.components.losses import EPS, kl, normalized_entropy


def uncertainty(z: Tensor, regions: bool, max_squares: bool) -> Tensor:
    """0 (certain) to 1 (uniform) for logits [N, C, *S]: softmax [N, 1, *S]; regions [N, C, *S], each for itself.

    Args:
        z: logits, float32.
        regions: they are logits of sigmoids.
        max_squares: (1 - Σ p²)·C / (C - 1) instead of the entropy; its gradient stays bounded near certainty.
    """
    if regions:
        if max_squares:
            p = torch.sigmoid(z)
            return 4 * p * (1 - p)
        return normalized_entropy(z.flatten(0, 1).unsqueeze(1), regions=True).reshape(z.shape)
    if max_squares:
        n_classes = z.shape[1]
        return (1 - torch.softmax(z, 1).square().sum(1, keepdim=True)) * n_classes / (n_classes - 1)
    return normalized_entropy(z)


def class_balanced_mean(values: Tensor, z: Tensor, valid: Tensor, regions: bool) -> Tensor:
    """Mean of `values` within each predicted class, then over the classes that are predicted; none: 0.

    Classes are the argmax of z; for regions, the inside and the outside of each.
    """
    if regions:
        inside = z > 0
        sides = [(channel, side) for channel in range(z.shape[1]) for side in (inside, ~inside)]
        groups = [(values[:, [channel]], valid & side[:, [channel]]) for channel, side in sides]
    else:
        labels = z.argmax(1, keepdim=True)
        groups = [(values, valid & (labels == number)) for number in range(z.shape[1])]
    counts = torch.stack([members.sum() for _, members in groups])
    sums = torch.stack([torch.where(members, value, 0).sum() for value, members in groups])
    return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


def prior_divergence(mean: Tensor, shares: Tensor, regions: bool) -> Tensor:
    """KL(mean ‖ shares) of class shares [C]; regions: the mean of the binary divergences."""
    if regions:
        mean, shares = torch.stack([mean, 1 - mean], 1), torch.stack([shares, 1 - shares], 1)
    else:
        mean, shares = mean.unsqueeze(0), shares.unsqueeze(0)
    return kl((mean + EPS).log(), (shares + EPS).log()).mean()
