"""Losses that methods share. Probabilities and logs are float32, averages are over valid voxels only.

Shapes: logits and probabilities [N, C, *S]; integer targets [N, 1, *S]; soft or region targets [N, C, *S];
weights and masks [N, 1, *S]. Dice losses are 1 - Dice, so a perfect prediction costs 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-6


def connected_zero(z: Tensor) -> Tensor:
    """A zero that keeps the graph, also where z holds inf or nan (plain z * 0 would be nan)."""
    return (torch.nan_to_num(z) * 0).sum()


def one_hot(target: Tensor, n_classes: int) -> Tensor:
    """Float32 [N, C, *S] from integers [N, 1, *S]; made without gradient."""
    shape = (target.shape[0], n_classes, *target.shape[2:])
    return torch.zeros(shape, device=target.device).scatter_(1, target.long(), 1.0)


def masked_ce(z: Tensor, target: Tensor, w: Tensor | None = None) -> Tensor:
    """Σ w·CE / max(Σ w, 1e-6) over voxels; no weights: the plain mean. All weights zero: 0 with a graph."""
    if w is not None and not bool((w > 0).any()):
        return connected_zero(z)
    voxels = functional.cross_entropy(z.float(), target[:, 0].long(), reduction="none" if w is not None else "mean")
    if w is None:
        return voxels
    weights = w[:, 0].float()
    return (torch.where(weights > 0, voxels, 0) * weights).sum() / weights.sum().clamp(min=EPS)


def masked_bce(z: Tensor, target: Tensor, w: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of region logits, averaged over valid voxels and regions."""
    if w is None:
        return functional.binary_cross_entropy_with_logits(z.float(), target.float())
    if not bool((w > 0).any()):
        return connected_zero(z)
    voxels = functional.binary_cross_entropy_with_logits(z.float(), target.float(), reduction="none")
    weights = w.float()
    return (torch.where(weights > 0, voxels, 0) * weights).sum() / (weights.sum() * z.shape[1]).clamp(min=EPS)


def soft_dice(
    p: Tensor,
    target: Tensor,
    w: Tensor | None = None,
    *,
    classes: Sequence[int] | None = None,
    square: bool = False,
    eps: float = 1e-5,
    per_sample: bool = False,
) -> Tensor:
    """Dice per class, (2·Σ w·p·y + eps) / (Σ w·p + Σ w·y + eps): [C'], or [N, C'] where `per_sample`.

    Args:
        p: probabilities.
        target: integers, or soft targets of p's shape.
        w: weights; None: all voxels count alike.
        classes: the channels to report; None: all.
        square: sums of squares below (V-Net's form).
    """
    p = p.float()
    integer_target = target.shape[1] == 1 and not target.is_floating_point()
    y = one_hot(target, p.shape[1]) if integer_target else target.float()
    if classes is not None:
        p, y = p[:, list(classes)], y[:, list(classes)]
    axes = tuple(range(2, p.ndim)) if per_sample else (0, *range(2, p.ndim))
    below_p, below_y = (p * p, y * y) if square else (p, y)
    if w is not None:
        weights = w.float()
        # where, not a product alone: an invalid voxel may hold inf or nan
        both = torch.where(weights > 0, p * y, 0) * weights
        below_p = torch.where(weights > 0, below_p, 0) * weights
        below_y = below_y * weights
    else:
        both = p * y
    return (2 * both.sum(axes) + eps) / (below_p.sum(axes) + below_y.sum(axes) + eps)


def probability_mse(p: Tensor, q: Tensor, w: Tensor | None = None) -> Tensor:
    """Σ_v w_v Σ_c (p - q)² / (C · max(Σ w, 1e-6)): the mean over valid voxels and all classes. No detach inside."""
    squares = (p.float() - q.float()).square()
    if w is None:
        return squares.mean()
    weights = w.float()
    kept = torch.where(weights > 0, squares, 0) * weights
    return kept.sum() / (p.shape[1] * weights.sum().clamp(min=EPS))


def deep_supervision_weights(n_levels: int) -> list[float]:
    """∝ 1, ½, ¼, … with the lowest level 0 where there is more than one, normalized to sum 1 (nnU-Net)."""
    weights = [0.5**level for level in range(n_levels)]
    if n_levels > 1:
        weights[-1] = 0.0
    return [weight / sum(weights) for weight in weights]


def at_level(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Targets, masks or weights at a deep-supervision level's spatial shape, by nearest neighbor."""
    if tuple(values.shape[2:]) == tuple(shape):
        return values
    scaled = functional.interpolate(values.float(), size=tuple(shape), mode="nearest-exact")
    return scaled.to(values.dtype)


class SupervisedLoss:
    """L_sup: Dice + cross-entropy at each deep-supervision level, ignore-aware, for labels or regions.

    Softmax: cross-entropy over all classes, Dice over the foreground. Regions: binary cross-entropy and Dice over
    all regions. With `batch_dice` the Dice sums run over the batch, else per sample.
    """

    def __init__(self, *, regions: bool, batch_dice: bool, has_ignore: bool) -> None:
        self.regions = regions
        self.batch_dice = batch_dice
        self.has_ignore = has_ignore

    def at_one_level(self, z: Tensor, target: Tensor, w: Tensor | None) -> Tensor:
        """Dice + CE of one level; all of the same resolution."""
        if w is not None and not bool((w > 0).any()):
            return connected_zero(z)
        p = torch.sigmoid(z.float()) if self.regions else torch.softmax(z.float(), 1)
        classes = None if self.regions else range(1, z.shape[1])
        dice = soft_dice(p, target, w, classes=classes, per_sample=not self.batch_dice)
        cross_entropy = masked_bce(z, target, w) if self.regions else masked_ce(z, target, w)
        return cross_entropy + 1 - dice.mean()

    def __call__(self, z: Sequence[Tensor], target: Tensor, valid: Tensor) -> Tensor:
        """Weighted sum over levels. z[0] is full resolution; target and valid are full resolution and scaled here."""
        weights = deep_supervision_weights(len(z))
        w = valid if self.has_ignore else None
        total = torch.zeros((), device=z[0].device)
        for weight, level in zip(weights, z, strict=True):
            if weight > 0:
                shape = level.shape[2:]
                level_w = None if w is None else at_level(w, shape)
                total = total + weight * self.at_one_level(level, at_level(target, shape), level_w)
        return total
