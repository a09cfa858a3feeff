"""Contrast of predicted areas: patches are told apart by what is predicted in them, and views of one patch must agree.

Source: Zhang et al., Medical Image Analysis 83 (2023), Semi-CML, in publicly hosted code: soft Dice as similarity, no
temperature, one foreground class. Several classes, the rules for empty maps and rare classes, and tiles are ours.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from autossl.trainers.components.losses import connected_zero

Similarity = Literal["dice", "cos"]
EPS = 1e-6
SURE, SMALLEST_AREA = 0.5, 1.0
"""A pair shows something where one of its maps adds up to so many voxels, of those likelier foreground than not. The
small probabilities of a patch without foreground add up to more, and their Dice does not tell how small they are."""
SMALLEST_CLASS_AREA = 10.0
"""Of several classes those count that cover more voxels, both maps together, in two patches or more."""


class AreaContrast(NamedTuple):
    """The loss and what it acted on."""

    loss: Tensor
    row_share: Tensor | float
    """Share of the pairs that took part."""
    class_share: Tensor | float
    """Share of the classes that took part."""


def area_similarity(maps: Tensor, kind: Similarity = "dice") -> Tensor:
    """Similarity of all pairs of maps, [R, R, F] from foreground probabilities [R, F, *S]; symmetric, in [0, 1].

    dice: (2·Σ a·b + ε) / (Σ a² + Σ b² + ε); two empty maps give 1. cos: Σ a·b / (|a|·|b|).
    """
    rows = maps.float().flatten(2).transpose(0, 1)  # [F, R, V]
    both = (rows @ rows.transpose(1, 2)).permute(1, 2, 0)
    squares = rows.square().sum(2).T  # [R, F]
    if kind == "dice":
        return (2 * both + EPS) / (squares[:, None] + squares + EPS)
    norms = squares.clamp(min=EPS).sqrt()
    return both / (norms[:, None] * norms)


def pairs_that_show_something(q_1: Tensor, q_2: Tensor) -> Tensor:
    """Boolean [n], of foreground probabilities [n, F, *S]. What is not finite shows: a loss must tell of it."""
    q = torch.stack([q_1, q_2]).detach().float().flatten(2)
    return ~(torch.where(q <= SURE, 0, q).sum(2) < SMALLEST_AREA).all(0)


def area_similarity_contrast(q_1: Tensor, q_2: Tensor, kind: Similarity = "dice") -> AreaContrast:
    """-log(exp(sim(i, i')) / Σ_{j ≠ i} exp(sim(i, j))), averaged over the 2n rows i; i' is the same patch's other map.

    No temperature; the similarity is averaged over the classes. Gradients flow through both sides. Float32.

    Args:
        q_1: foreground probabilities [n, F, *S] of n patches, 0 where a voxel does not count.
        q_2: those of the other side, of the same patches.

    Returns:
        The loss; where fewer than two patches show something there is nothing to contrast: a connected zero.
    """
    with torch.autocast(q_1.device.type, enabled=False):
        q_1, q_2 = q_1.float(), q_2.float()
        area = (q_1.detach() + q_2.detach()).flatten(2).sum(2)  # [n, F]
        kept = pairs_that_show_something(q_1, q_2)
        classes = ~((area[kept] <= SMALLEST_CLASS_AREA).sum(0) > int(kept.sum()) - 2)
        if q_1.shape[1] == 1:
            classes = torch.ones_like(classes)
        if int(kept.sum()) < 2 or not bool(classes.any()):
            return AreaContrast(connected_zero(q_1) + connected_zero(q_2), 0.0, 0.0)
        similarity = area_similarity(torch.cat([q_1[kept], q_2[kept]])[:, classes], kind).mean(2)
        n = len(similarity) // 2
        itself = torch.eye(2 * n, dtype=torch.bool, device=similarity.device)
        partner = torch.arange(2 * n, device=similarity.device).roll(n)
        loss = functional.cross_entropy(similarity.masked_fill(itself, float("-inf")), partner)
    return AreaContrast(loss, kept.float().mean(), classes.float().mean())


def halves_of_axes(maps: Tensor) -> Tensor:
    """Cuts maps [N, F, *S] in half along every axis: [N·2^d, F, *S/2]. Odd axes get a plane of zeros first."""
    size = maps.shape[2:]
    padding = [n for edge in reversed(size) for n in (0, edge % 2)]
    cut = functional.pad(maps, padding)
    for axis in range(2, maps.ndim):
        cut = torch.cat(cut.chunk(2, axis))
    return cut
