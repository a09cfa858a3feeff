"""One contrastive loss for all methods, and the voxels whose embeddings enter it.

Rows are L2-normalized embeddings [n, D] with integer labels [n]; bank rows are further candidates without gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from autossl.trainers.components.losses import EPS, connected_zero

PairWeight = Tensor | Callable[[Tensor], Tensor]


class Rows(NamedTuple):
    """Embeddings and what they are."""

    e: Tensor
    """[n, D], unit norm."""
    labels: Tensor
    """Int64 [n]."""
    known: Tensor | None = None
    """Boolean [n]; a row whose label is not known is nobody's positive, but everybody's negative. None: all are."""


class PairLosses(NamedTuple):
    """ℓ of every pair of an anchor with a candidate; candidates are the n rows themselves, then the m bank rows."""

    values: Tensor
    """ℓ_ij, float32 [n, n + m]; finite, and meaningless on the diagonal."""
    positive: Tensor
    """Boolean [n, n + m]: j is a positive of i."""
    rows: Rows
    """The anchors."""

    @property
    def anchors(self) -> Tensor:
        """Boolean [n]: which rows have a positive and so count."""
        return self.positive.any(1)


def pair_losses(rows: Rows, tau: float, bank: Rows | None = None) -> PairLosses:
    """ℓ_ij = -log(exp(e_i·e_j / τ) / Σ_{a ∈ A(i)} exp(e_i·e_a / τ)), A(i) = all rows and bank rows except i itself.

    Source: Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, eq. 2 (the sum outside the logarithm). Float32
    also under autocast; the row maximum is subtracted before exp. No gradient reaches the bank.

    Raises:
        ValueError: τ is not positive.
    """
    _check_temperature(tau)
    n = len(rows.labels)
    with torch.autocast(rows.e.device.type, enabled=False):
        e = rows.e.float()
        candidates, labels, known = e, rows.labels, _known(rows)
        if bank is not None:
            candidates = torch.cat([e, bank.e.detach().float()])
            labels, known = torch.cat([labels, bank.labels]), torch.cat([known, _known(bank)])
        similarity = e @ candidates.T / tau
        itself = torch.eye(n, len(labels), dtype=torch.bool, device=e.device)
        # the smallest number, not -inf: a single row without a bank stays finite, and so does its gradient
        others = similarity.masked_fill(itself, torch.finfo(torch.float32).min)
        highest = (
            others.detach().amax(1, keepdim=True) if len(labels) else 0.0
        )  # before the difference, or ℓ is rounded
        values = torch.logsumexp(others - highest, 1, keepdim=True) - (similarity - highest)
    positive = (rows.labels[:, None] == labels) & known[:n, None] & known & ~itself
    return PairLosses(values, positive, rows)


def mean_over_anchors(
    pairs: PairLosses, pair_weight: PairWeight | None = None, class_weights: Tensor | None = None
) -> Tensor:
    """Mean over anchors with a positive of (1 / |P(i)|)·Σ_{j ∈ P(i)} w_ij·ℓ_ij; no such anchor: a connected zero.

    Args:
        pairs: as `pair_losses` gives them.
        pair_weight: w_ij [n, n + m], or a function of the detached ℓ that gives it; a constant for the gradient.
        class_weights: [C]; the mean is then taken per class (the anchor's label, 0..C-1) first, and over the classes
            that have anchors afterwards, with these weights. None: over all anchors alike.
    """
    anchors = pairs.anchors
    if not bool(anchors.any()):
        return connected_zero(pairs.rows.e.float())
    values = pairs.values[anchors]
    positive = pairs.positive[anchors]
    w = positive.float()
    if pair_weight is not None:
        given = pair_weight(pairs.values.detach()) if callable(pair_weight) else pair_weight
        w = torch.where(positive, given.detach().float()[anchors], 0)
    per_anchor = torch.where(positive, values * w, 0).sum(1) / positive.sum(1)
    return _mean(per_anchor, pairs.rows.labels[anchors], class_weights)


def mean_of_pairs(pairs: PairLosses, values: Tensor) -> Tensor:
    """Mean of values [n, n + m] over the positive pairs, without gradient; 0 where there are none."""
    chosen = torch.where(pairs.positive, values.detach().float(), 0)
    return chosen.sum() / pairs.positive.sum().clamp(min=1)


def sup_con(
    e: Tensor, labels: Tensor, tau: float, bank: Rows | None = None, class_weights: Tensor | None = None
) -> Tensor:
    """The contrastive loss of rows [n, D] with labels [n]: `mean_over_anchors` of `pair_losses`, all pairs alike.

    Labels are what makes two rows a pair: classes (supervised contrast), the index of the sample (SimCLR), or any
    other kinship. Where labels may be unknown or pairs count unequally, call the two parts.

    The mean of ℓ over an anchor's positives is log Σ_a exp(e_i·e_a / τ) - e_i·(mean of its positives) / τ, so that
    one matrix of pairs is passed over instead of a dozen.

    Raises:
        ValueError: τ is not positive.
    """
    _check_temperature(tau)
    with torch.autocast(e.device.type, enabled=False):
        e = e.float()
        candidates, all_labels = e, labels
        if bank is not None:
            candidates, all_labels = torch.cat([e, bank.e.detach().float()]), torch.cat([labels, bank.labels])
        classes, index = torch.unique(all_labels, return_inverse=True)
        index = index[: len(labels)]
        sizes = (all_labels == classes[:, None]).float()
        n_positives = sizes.sum(1)[index] - 1  # but itself
        anchors = n_positives > 0
        if not bool(anchors.any()):
            return connected_zero(e)
        similarity = (e / tau) @ candidates.T
        similarity.fill_diagonal_(torch.finfo(torch.float32).min)
        positives = ((sizes @ candidates)[index] - e)[anchors] / n_positives[anchors, None]
        per_anchor = torch.logsumexp(similarity, 1)[anchors] - (e[anchors] * positives).sum(1) / tau
    return _mean(per_anchor, labels[anchors], class_weights)


def self_paced_weights(values: Tensor, gamma: float, mode: Literal["linear", "hard"] = "linear") -> Tensor:
    """w in [0, 1] that minimizes w·ℓ + R(w), for each ℓ; without gradient. Pairs that are still hard count less.

    Linear: R = γ·(w²/2 - w), so w = max(1 - ℓ/γ, 0). Hard: R = -γ·w, so w = 1 where ℓ ≤ γ, else 0.
    Source: Peng et al., Self-Paced Contrastive Learning, NeurIPS 2021, arXiv:2107.13741.

    Raises:
        ValueError: γ is not positive.
    """
    if gamma <= 0:
        raise ValueError(f"gamma is {gamma}: expected a positive tolerance")
    values = values.detach()
    return (values <= gamma).to(values) if mode == "hard" else (1 - values / gamma).clamp(min=0)


def has_negatives(rows: Rows, bank: Rows | None = None) -> bool:
    """Whether the labels differ at all. Where they do not, the loss only spreads similarity evenly: leave it out."""
    labels = rows.labels if bank is None else torch.cat([rows.labels, bank.labels])
    return bool((labels != labels[:1]).any())


def _mean(per_anchor: Tensor, labels: Tensor, class_weights: Tensor | None) -> Tensor:
    """Of values [n] of anchors with labels [n]; with weights [C], of the means of the classes that have anchors."""
    if class_weights is None:
        return per_anchor.mean()
    members = torch.nn.functional.one_hot(labels, len(class_weights)).float()
    sizes = members.sum(0)
    # no matrix product: autocast would take it in half precision
    per_class = (per_anchor[:, None] * members).sum(0) / sizes.clamp(min=1)
    weights = torch.where(sizes > 0, class_weights.to(per_class), 0)
    return (weights * per_class).sum() / weights.sum().clamp(min=EPS)


def _check_temperature(tau: float) -> None:
    if tau <= 0:
        raise ValueError(f"tau is {tau}: expected a positive temperature")


def _known(rows: Rows) -> Tensor:
    return torch.ones_like(rows.labels, dtype=torch.bool) if rows.known is None else rows.known


# ------------------------------------------------------------------------------------------------------------- voxels


def choose_voxels(
    labels: Tensor, per_class: int, valid: Tensor, generator: torch.Generator, hard_band: Tensor | None = None
) -> Tensor:
    """Positions of up to `per_class` voxels of each class that is present, classes ascending.

    Args:
        labels: integers [N, 1, *S].
        per_class: at most so many of each class, without replacement.
        valid: boolean [N, 1, *S]; others are never drawn.
        generator: draws on its own device.
        hard_band: boolean [N, 1, *S]; half of each class's voxels come from it and half from elsewhere, and where one
            of them is short the other fills up.

    Returns:
        Int64 [n] into N·|S|, for `rows_at`.
    """
    flat, allowed = labels.flatten(), valid.flatten()
    chosen = []
    for value in torch.unique(flat[allowed]).tolist():
        found = (allowed & (flat == value)).nonzero()[:, 0]
        if hard_band is None:
            chosen.append(_some(found, per_class, generator))
            continue
        is_hard = hard_band.flatten()[found]
        hard, easy = found[is_hard], found[~is_hard]
        n_hard = min(len(hard), max(per_class - per_class // 2, per_class - len(easy)))
        chosen += [_some(hard, n_hard, generator), _some(easy, per_class - n_hard, generator)]
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.long, device=flat.device)


def rows_at(f: Tensor, positions: Tensor) -> Tensor:
    """Vectors [n, c] of a map [N, c, *S] at positions into N·|S|; the gradient flows back into the map."""
    voxels = f.flatten(2)
    n_voxels = voxels.shape[2]
    return voxels[positions // n_voxels, :, positions % n_voxels]


def sample_voxels(
    f: Tensor,
    labels: Tensor,
    per_class: int,
    valid: Tensor,
    generator: torch.Generator,
    hard_band: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Class-balanced vectors [n, c] of a map [N, c, *S], and their labels int64 [n]; arguments as `choose_voxels`.

    For the same voxels of two maps use `choose_voxels` and `rows_at`.
    """
    positions = choose_voxels(labels, per_class, valid, generator, hard_band)
    return rows_at(f, positions), labels.flatten()[positions].long()


def _some(found: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n of the entries [m] in random order, or all of them."""
    if n >= len(found):
        return found
    device = generator.device
    if len(found) <= 8 * n:
        return found[torch.randperm(len(found), generator=generator, device=device)[:n].to(found.device)]
    # Few of very many: shuffling all of them would cost more than the loss.
    drawn = torch.empty(0, dtype=torch.long, device=device)
    while len(drawn) < n:
        more = torch.randint(len(found), (2 * n,), generator=generator, device=device)
        drawn = torch.unique(torch.cat([drawn, more]))
    shuffled = drawn[torch.randperm(len(drawn), generator=generator, device=device)[:n]]
    return found[shuffled.to(found.device)]
