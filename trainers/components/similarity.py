"""Similarity among the deep features of unlabeled images: propagated labels, and whether two places belong together.

The positions of a deep feature map, of all images of a batch in a row, are m tokens. Each has a unit embedding e, the
teacher's mean probabilities q over the voxels below it, and a decision.
Source: the feature similarity module of FSMIFNet (Long et al. 2025), of which the outline alone is public; propagation
along similarities as in CorrMatch (Sun et al., CVPR 2024, arXiv:2306.04300). Thresholds and sampling are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from autossl.trainers.components.losses import EPS, connected_zero
from autossl.trainers.components.pseudo import sharpen
from autossl.trainers.components.soft_targets import pooled_target

KEY_CONFIDENCE, CONFIDENT = 0.6, 0.8
"""Tokens that labels are propagated from, and those that relations and overruling labels are believed of."""
FEWEST_KEYS, MOST_KEYS, KEYS_PER_CLASS = 16, 4096, 64
"""With fewer confident tokens all are keys. No class has more keys than the rarest one or, where that is more, 64."""
MOST_PAIRS = 2048
ROWS_AT_ONCE = 1024


def pooled_tokens(p: Tensor, valid: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Means of p [B, C, *S] over the valid voxels below each position of a grid `size`.

    Returns:
        Float32 [m, C], zeros where no voxel is valid; and boolean [m]: at least half of the voxels are valid.
    """
    mean, share = pooled_target(p, valid, size)
    return as_tokens(mean), as_tokens(share)[:, 0] >= 0.5


def as_tokens(f: Tensor) -> Tensor:
    """[B, c, *S] as [B·|S|, c], image by image."""
    return f.flatten(2).transpose(1, 2).flatten(0, 1)


class Decisions(NamedTuple):
    """What q [m, C] says of each token."""

    labels: Tensor
    """Int64 [m]: the class; regions: a number for the set of regions."""
    confidence: Tensor
    """Float32 [m]: the probability of the class; regions: of the least certain region's decision."""

    @classmethod
    def of(cls, q: Tensor, regions: bool = False) -> Decisions:
        """From probabilities, without gradient."""
        q = q.detach()
        if not regions:
            confidence, labels = q.max(1)
            return cls(labels, confidence)
        place_values = 2 ** torch.arange(q.shape[1], device=q.device)
        return cls(((q > 0.5) * place_values).sum(1), torch.maximum(q, 1 - q).amin(1))


def key_tokens(decisions: Decisions, valid: Tensor, generator: torch.Generator) -> Tensor:
    """Positions [k] of the tokens that labels are propagated from: confident ones, at most 4096, classes alike.

    Were all of them keys, then by its mere number the background would speak for every structure until embeddings
    differ much (hippocampus 2d nano, from a trained network: for 40 steps no token of a structure kept its label; with
    classes alike two thirds did).

    Args:
        decisions: of m tokens.
        valid: boolean [m]; others are never keys.
        generator: on the CPU.
    """
    keys = (valid & (decisions.confidence >= KEY_CONFIDENCE)).nonzero()[:, 0]
    if len(keys) < FEWEST_KEYS:
        keys = valid.nonzero()[:, 0]
    if len(keys) == 0:
        return keys
    keys = keys[torch.randperm(len(keys), generator=generator).to(keys.device)]
    keys = keys[torch.argsort(decisions.labels[keys], stable=True)]
    sizes = torch.unique_consecutive(decisions.labels[keys], return_counts=True)[1]
    rank = torch.arange(len(keys), device=keys.device) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    kept = rank < sizes.amin().clamp(min=KEYS_PER_CLASS)
    in_turn = torch.argsort(rank[kept], stable=True)  # class by class, so that the end that is cut off is fair as well
    return keys[kept][in_turn][:MOST_KEYS]


@torch.no_grad()
def affinity(e: Tensor, keys: Tensor, rows: Tensor, tau: float) -> Tensor:
    """softmax over the keys of e_i·e_j / τ without j = i: float32 [r, k] of the rows [r] among m tokens e [m, D]."""
    with torch.autocast(e.device.type, enabled=False):
        similarity = e[rows].float() @ e[keys].float().T / tau
        itself = rows[:, None] == keys[None]
        return torch.softmax(similarity.masked_fill(itself, torch.finfo(torch.float32).min), 1)


@torch.no_grad()
def propagate(e: Tensor, q: Tensor, keys: Tensor, tau: float) -> Tensor:
    """π = A·q, the keys' probabilities as the similarities of each token weigh them: float32 [m, C], no gradient."""
    with torch.autocast(e.device.type, enabled=False):
        rows = torch.arange(len(e), device=e.device).split(ROWS_AT_ONCE)
        return torch.cat([affinity(e, keys, chunk, tau) @ q[keys].float() for chunk in rows])


def propagation_loss(
    p: Tensor, propagated: Tensor, q: Tensor, valid: Tensor, regions: bool = False
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of p with the propagated labels, squared and normalized again, and the share of tokens in it.

    A token counts where the teacher decides as the propagation does, or where the propagation is confident; regions
    are judged one by one. None counts: 0 with a graph. Not finite where the propagated labels are not.

    Args:
        p: the student's probabilities [m, C], with gradient.
        propagated: π [m, C].
        q: the teacher's probabilities [m, C].
        valid: boolean [m].
        regions: the channels are regions.
    """
    propagated, p = propagated.float(), p.float()
    log_target, log_other = (propagated + EPS).log(), (1 - propagated + EPS).log()
    if regions:
        target = torch.sigmoid(2 * (log_target - log_other))
        values = -(target * (p + EPS).log() + (1 - target) * (1 - p + EPS).log())
        sure = torch.maximum(propagated, 1 - propagated) >= CONFIDENT
        counted = (((propagated > 0.5) == (q > 0.5)) | sure) & valid[:, None]
    else:
        values = -(sharpen(log_target, 0.5) * (p + EPS).log()).sum(1, keepdim=True)
        confidence, labels = propagated.max(1)
        counted = (((labels == q.argmax(1)) | (confidence >= CONFIDENT)) & valid)[:, None]
    share = counted.sum() / (valid.sum() * counted.shape[1]).clamp(min=1)
    unsound = 0 * propagated.mean()
    if not bool(counted.any()):
        return connected_zero(p) + unsound, share
    return values[counted].mean() + unsound, share


def relation_pairs(labels: Tensor, believed: Tensor, generator: torch.Generator) -> Tensor:
    """Up to 2048 pairs [n, 2] of believed tokens, half of one class and half of two, as far as both exist.

    The first token's class is drawn first, so that rare classes come as often as common ones; with replacement.

    Args:
        labels: int64 [m].
        believed: boolean [m]; others are in no pair.
        generator: on the CPU.
    """
    found = believed.nonzero()[:, 0]
    order = torch.argsort(labels[found], stable=True)
    found = found[order]
    sizes = torch.unique_consecutive(labels[found], return_counts=True)[1]
    if len(sizes) == 0:
        return found.new_zeros((0, 2))
    starts, half = sizes.cumsum(0) - sizes, MOST_PAIRS // 2
    drawn = torch.rand(6, half, generator=generator, dtype=torch.float64).to(labels.device)
    n_classes = len(sizes)

    def one_of(u: Tensor, n: Tensor | int) -> Tensor:
        return (u * n).long()

    a = one_of(drawn[0], n_classes)
    first = one_of(drawn[1], sizes[a])
    second = (first + 1 + one_of(drawn[2], sizes[a] - 1)) % sizes[a]
    alike = torch.stack([starts[a] + first, starts[a] + second], 1)[sizes[a] > 1]
    if n_classes == 1:
        return found[alike]
    b = one_of(drawn[3], n_classes)
    other = (b + 1 + one_of(drawn[4], n_classes - 1)) % n_classes
    first = one_of(drawn[1], sizes[b])
    different = torch.stack([starts[b] + first, starts[other] + one_of(drawn[5], sizes[other])], 1)
    return found[torch.cat([alike, different])]


def relation_loss(e: Tensor, labels: Tensor, pairs: Tensor) -> Tensor:
    """Mean binary cross-entropy of (1 + e_i·e_j) / 2 with "the same label" over the pairs; none: 0 with a graph.

    Args:
        e: unit embeddings [m, D], with gradient.
        labels: int64 [m].
        pairs: [n, 2].
    """
    if len(pairs) == 0:
        return connected_zero(e)
    i, j = pairs.unbind(1)
    with torch.autocast(e.device.type, enabled=False):
        similarity = ((1 + (e[i].float() * e[j].float()).sum(1)) / 2).clamp(1e-6, 1 - 1e-6)
        return functional.binary_cross_entropy(similarity, (labels[i] == labels[j]).float())
