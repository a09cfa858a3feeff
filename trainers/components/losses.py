"""Losses that methods share. Probabilities and logs are float32, averages are over valid voxels only.

Shapes: logits and probabilities [N, C, *S]; integer targets [N, 1, *S]; soft or region targets [N, C, *S];
weights and masks [N, 1, *S]. Dice losses are 1 - Dice, so a perfect prediction costs 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
    difference = p.float() - q.float()
    if w is None:
        return difference.square().mean()
    weights = w.float()
    # masked before it is squared: behind a square, what is not finite would reach the gradient
    kept = torch.where(weights > 0, difference, 0).square() * weights
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


# -------------------------------------------------------------------------------------------------- hard pseudo-labels

Levels = Tensor | Sequence[Tensor]
"""Logits of one resolution, or of all deep-supervision levels, full resolution first."""


def hard_label_ce(
    z: Levels, target: Tensor, w: Tensor | None = None, count: Tensor | None = None, regions: bool = False
) -> Tensor:
    """Σ w·CE / max(Σ count, 1e-6), summed over the levels with the weights of L_sup; no weights: the plain mean.

    Everything is given at full resolution and brought to each level by nearest neighbor. Nothing to average: 0 with
    a graph; voxels of weight 0 get no gradient, whatever z holds there.

    Args:
        z: logits.
        target: class numbers [N, 1, *S]; regions: 0/1 [N, C, *S], and CE is binary.
        w: weights [N, 1, *S], 0 where a voxel does not act; regions also [N, C, *S].
        count: what is divided by, such as all valid voxels where w is a confidence gate; None: w.
        regions: z are logits of sigmoids.
    """

    def one_level(z: Tensor, target: Tensor, w: Tensor | None, count: Tensor | None) -> Tensor:
        return _hard_ce(z, target, w, count, regions)

    return _over_levels(one_level, z, target, w, count)


def hard_label_dice(
    z: Levels,
    target: Tensor,
    w: Tensor | None = None,
    regions: bool = False,
    square: bool = False,
    batch_dice: bool = True,
) -> Tensor:
    """1 - mean soft Dice over the foreground (regions: all of them), summed over the levels like `hard_label_ce`.

    A class that is neither in the target nor predicted costs nothing, so that no weight at all gives 0.

    Args:
        z, target, w, regions: as in `hard_label_ce`.
        square: sums of squares below.
        batch_dice: sums over the batch; else per sample, then the mean.
    """

    def one_level(z: Tensor, target: Tensor, w: Tensor | None, _: Tensor | None) -> Tensor:
        z = _acting(z, w)
        p = torch.sigmoid(z.float()) if regions else torch.softmax(z.float(), 1)
        classes = None if regions else range(1, z.shape[1])
        return 1 - soft_dice(p, target, w, classes=classes, square=square, per_sample=not batch_dice).mean()

    return _over_levels(one_level, z, target, w, None)


def hard_label_loss(
    z: Levels,
    target: Tensor,
    w: Tensor | None = None,
    count: Tensor | None = None,
    regions: bool = False,
    square: bool = False,
    batch_dice: bool = True,
) -> Tensor:
    """`hard_label_ce` + `hard_label_dice`; `count` concerns the cross-entropy alone."""
    cross_entropy = hard_label_ce(z, target, w, count, regions)
    return cross_entropy + hard_label_dice(z, target, w, regions, square, batch_dice)


def region_mix_loss(
    z: Levels,
    mask: Tensor,
    y_out: Tensor,
    y_in: Tensor,
    *,
    valid_out: Tensor | None = None,
    valid_in: Tensor | None = None,
    regions: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss of a mixed image as its two parts: ½·(Dice + CE) where the mask is true, the same where it is not.

    Each part is normalized by its own size, so that weights given to them compare the parts and not their volumes.
    The loss of Bai et al., CVPR 2023 is a weighted sum; here the parts stay apart, because one comes from true labels.

    Args:
        z: logits of the mixed image.
        mask: boolean [N, 1, *S], true outside the box.
        y_out, y_in: targets of the two source images, whole; they are cut by the mask here.
        valid_out, valid_in: boolean [N, 1, *S] of the source images; None: all voxels.
        regions: z are logits of sigmoids.
    """
    target = torch.where(mask, y_out, y_in)
    outside = mask if valid_out is None else mask & valid_out
    inside = ~mask if valid_in is None else ~mask & valid_in
    outer = hard_label_loss(z, target, outside, regions=regions)
    inner = hard_label_loss(z, target, inside, regions=regions)
    return 0.5 * outer, 0.5 * inner


def _over_levels(
    one_level: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor],
    z: Levels,
    target: Tensor,
    w: Tensor | None,
    count: Tensor | None,
) -> Tensor:
    """Σ level weight · one_level(z, target, w, count at the level); levels of weight 0 are not computed."""
    levels = [z] if isinstance(z, Tensor) else list(z)
    total = torch.zeros((), device=levels[0].device)
    for weight, level in zip(deep_supervision_weights(len(levels)), levels, strict=True):
        if weight > 0:
            shape = level.shape[2:]
            level_w, level_count = (None if values is None else at_level(values, shape) for values in (w, count))
            total = total + weight * one_level(level, at_level(target, shape), level_w, level_count)
    return total


def _acting(z: Tensor, w: Tensor | None) -> Tensor:
    """z, with 0 where the weight is 0: what stands there cannot reach a value or a gradient, inf and nan included."""
    return z if w is None else torch.where(w > 0, z, 0)


def _hard_ce(z: Tensor, target: Tensor, w: Tensor | None, count: Tensor | None, regions: bool) -> Tensor:
    z = _acting(z, w).float()
    if regions:
        voxels = functional.binary_cross_entropy_with_logits(z, target.float(), reduction="none")
    else:
        voxels = functional.cross_entropy(z, target[:, 0].long(), reduction="none").unsqueeze(1)
    divisor = w if count is None else count
    if divisor is None:
        return voxels.mean()
    total = voxels.sum() if w is None else (voxels * w.float()).sum()
    return total / divisor.float().expand_as(voxels).sum().clamp(min=EPS)


# ------------------------------------------------------------------------------------------- entropies and divergences


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_c p·(ln p - ln q) over axis 1, kept: [N, 1, *S] from log-probabilities [N, C, *S].

    From logs, so that small probabilities stay exact; p = 0 contributes 0. Gradients flow through both sides.
    """
    log_p, log_q = log_p.float(), log_q.float()
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0)).sum(1, keepdim=True)


def entropy(p: Tensor, regions: bool = False) -> Tensor:
    """-Σ_c p·ln(p + 1e-6), in nats, [N, 1, *S]; regions: the mean over regions of the binary entropy."""
    p = p.float()
    if regions:
        return -(p * (p + EPS).log() + (1 - p) * (1 - p + EPS).log()).mean(1, keepdim=True)
    return -(p * (p + EPS).log()).sum(1, keepdim=True)


def normalized_entropy(z: Tensor, regions: bool = False) -> Tensor:
    """Entropy of softmax(z) divided by ln C: 0 (certain) to 1 (uniform) for any number of classes, [N, 1, *S].

    By log_softmax, exact also where probabilities underflow. Regions: mean binary entropy divided by ln 2.
    """
    z = z.float()
    if regions:
        log_in, log_out = functional.logsigmoid(z), functional.logsigmoid(-z)
        return -(log_in.exp() * log_in + log_out.exp() * log_out).mean(1, keepdim=True) / math.log(2)
    log_p = functional.log_softmax(z, 1)
    return -(log_p.exp() * log_p).sum(1, keepdim=True) / math.log(z.shape[1])
