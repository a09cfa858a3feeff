"""Contrast between two networks' embeddings of the same voxel, by the outcome of what the two decide there."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from autossl.trainers.components.contrast import choose_voxels
from autossl.trainers.components.losses import connected_zero
from autossl.trainers.components.shapes import boundary_band

MAX_CLASSES = 8
"""That are contrasted in one step; where more are claimed they are drawn."""
BAND = 2.0
"""How far around the union of all foreground decisions half of the voxels is drawn, in voxels."""


def iuc_loss(
    e_a: Tensor, e_b: Tensor, mask_a: Tensor, mask_b: Tensor, tau: float = 0.1, scale: Tensor | None = None
) -> Tensor:
    """Intersection term + union term, averaged over the classes that any of the two networks claims anywhere.

    With s_u = e_a·e_b at voxel u, I = both networks claim it: ℓ1_u = -ln(exp(I·s/τ) / (Σ_w exp((1-I_w)·s_w/τ) +
    exp(I·s/τ))), and ℓ2 is the same with 1 - U in place of I, U = any of them claims it. A voxel that is masked out
    still counts exp(0) = 1. Where one network alone claims a voxel both terms push s down; elsewhere they all but
    balance, so what moves is the band in which the networks disagree.

    Source: He et al., ICME 2025 (intersection-union contrast), for one class; the mean over classes and the scale are
    ours.

    Args:
        e_a, e_b: embeddings of the same voxels by both networks, unit rows [n, D].
        mask_a, mask_b: which classes each of them claims there, boolean [n, K].
        tau: temperature.
        scale: [n], how many voxels each one stands for, in the sums and in the mean; None: itself.

    Returns:
        A scalar; a connected zero where no class is claimed.

    Raises:
        ValueError: τ is not positive.
    """
    if tau <= 0:
        raise ValueError(f"tau is {tau}: expected a positive temperature")
    union = mask_a | mask_b
    claimed = union.any(0)
    if not bool(claimed.any()):
        return connected_zero(e_a) + connected_zero(e_b)
    s = (e_a.float() * e_b.float()).sum(1, keepdim=True).clamp(-1, 1) / tau
    w = torch.ones_like(s) if scale is None else scale.to(s)[:, None]
    intersection, outside = (mask_a & mask_b)[:, claimed], ~union[:, claimed]
    return _one_sided(s, w, intersection) + _one_sided(s, w, outside)


def _one_sided(s: Tensor, w: Tensor, chosen: Tensor) -> Tensor:
    """-ln(own / (rest + own)) with own = exp(m·s), rest = Σ w·exp((1-m)·s): s, w [n, 1], m boolean [n, K]."""
    own = s * chosen
    rest = torch.logsumexp(s * ~chosen + w.log(), 0)
    return ((functional.softplus(rest - own) * w).sum(0) / w.sum()).mean()


def claims(z: Tensor, regions: bool = False) -> Tensor:
    """What is decided, boolean [N, F, *S] from logits [N, C, *S]: each foreground class or region; no gradient."""
    if regions:
        return z.detach() > 0
    labels = z.detach().argmax(1, keepdim=True)
    return torch.cat([labels == number for number in range(1, z.shape[1])], 1)


def drawn_classes(claimed: Tensor, generator: torch.Generator, at_most: int = MAX_CLASSES) -> Tensor:
    """Numbers of the claimed classes, int64 [K] from boolean [F]; where there are too many, some at random."""
    numbers = claimed.nonzero()[:, 0]
    if len(numbers) <= at_most:
        return numbers
    return numbers[torch.randperm(len(numbers), generator=generator)[:at_most].to(numbers.device)]


def contrast_voxels(
    foreground: Tensor, counted: Tensor, n: int, spacing: tuple[float, ...], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Up to n voxels, half of them in and around the foreground, and how many each one stands for.

    Where the foreground or the rest has less than half, the other fills up. All of them where there are no more than n:
    then each stands for itself.

    Args:
        foreground: boolean [N, 1, *S]: any network claims any class.
        counted: boolean [N, 1, *S]; others are never drawn.
        n: at most so many.
        spacing: mm per axis of S.
        generator: draws on its own device.

    Returns:
        Int64 [n] into N·|S|, for `rows_at`; and float32 [n].
    """
    near = foreground | boundary_band(foreground, BAND, spacing)
    alike = torch.zeros_like(counted, dtype=torch.uint8)
    positions = choose_voxels(alike, n, counted, generator, near)
    is_near = near.flatten()[positions]
    scale = torch.ones(len(positions), device=foreground.device)
    for drawn, stratum in ((is_near, near & counted), (~is_near, ~near & counted)):
        scale = torch.where(drawn, stratum.sum() / drawn.sum().clamp(min=1), scale)
    return positions, scale
