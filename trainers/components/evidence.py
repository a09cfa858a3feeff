"""Logits as evidence for a Dirichlet distribution per voxel: beliefs, their fusion, and what is learned from them.

Shapes: logits, α and beliefs [N, C, *S]; uncertainties, weights and masks [N, 1, *S]. All of it is float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from autossl.networks.prediction import dirichlet_alpha

LARGEST_ALPHA = 1e4
"""α is bounded by this in the Fisher loss; beyond, the trigamma function says nothing in float32."""
SMALLEST_BRACKET = 1e-12
SMALLEST_NORM = 1e-8


class Opinion(NamedTuple):
    """Belief in each class and the uncertainty that is left; Σ belief + uncertainty = 1."""

    belief: Tensor
    """[N, C, *S]."""
    uncertainty: Tensor
    """[N, 1, *S]."""


class Dirichlet(NamedTuple):
    """Parameters of the distribution and what follows from them."""

    alpha: Tensor
    """[N, C, *S], at least 1."""
    strength: Tensor
    """α0 = Σ α, [N, 1, *S], at least C."""

    @property
    def log_p(self) -> Tensor:
        """ln of the expected probabilities α / α0: normalized, so losses of logits take it as logits."""
        return self.alpha.log() - self.strength.log()

    @property
    def opinion(self) -> Opinion:
        """Belief (α - 1) / α0 and uncertainty C / α0."""
        return Opinion((self.alpha - 1) / self.strength, self.alpha.shape[1] / self.strength)


def dirichlet(z: Tensor) -> Dirichlet:
    """From logits: evidence v = exp(z), α = v + 1. The activation that `PredictionSpec` calls "dirichlet"."""
    alpha = dirichlet_alpha(z)
    return Dirichlet(alpha, alpha.sum(1, keepdim=True))


# -------------------------------------------------------------------------------------------------------------- fusion


def fuse_beliefs(first: Opinion, second: Opinion, discount: float | None = None) -> Opinion:
    """b_c ∝ b¹_c·b²_c + δ·(b¹_c·u² + b²_c·u¹), u ∝ u¹·u², normalized so that Σ b + u = 1.

    Where both are sure of different classes nothing remains to normalize: b = 0, u = 1.
    Source: He et al., BIBM 2024 (class-aware evidential fusion).

    Args:
        first, second: opinions of two networks.
        discount: δ of the terms in which one network believes and the other does not know. None: 1 / (1 + C), the
            published discount; 1: Dempster's rule on single classes and the whole frame.
    """
    (b_1, u_1), (b_2, u_2) = first, second
    delta = 1 / (1 + b_1.shape[1]) if discount is None else discount
    belief = b_1 * b_2 + delta * (b_1 * u_2 + b_2 * u_1)
    uncertainty = u_1 * u_2
    norm = belief.sum(1, keepdim=True) + uncertainty
    conflict = norm < SMALLEST_NORM
    norm = norm.clamp(min=SMALLEST_NORM)
    return Opinion(torch.where(conflict, 0, belief / norm), torch.where(conflict, 1, uncertainty / norm))


def reliability(opinion: Opinion) -> Tensor:
    """exp(-u·H₂(b)) in (0, 1], H₂ the entropy of the beliefs in bits; 0 where there is no belief to rely on."""
    entropy = torch.special.entr(opinion.belief).sum(1, keepdim=True) / math.log(2)
    any_belief = opinion.belief.sum(1, keepdim=True) != 0
    return torch.exp(-opinion.uncertainty * entropy) * any_belief


# -------------------------------------------------------------------------------------------------------------- losses


def fisher_evidential(alpha: Tensor, onehot: Tensor, information_weight: float) -> Tensor:
    """ℓ = Σ_c [(y_c - α_c/α0)² + α_c·(α0 - α_c) / (α0²·(α0 + 1))]·ψ₁(α_c) - λ_I·ln|I(α)|, kept: [N, 1, *S].

    The expected squared error of Dirichlet probabilities, each class weighted by its Fisher information ψ₁ (trigamma),
    so that classes without evidence are not punished alike; |I| is the determinant of diag ψ₁(α) - ψ₁(α0)·11ᵀ.
    Source: Deng et al., Uncertainty Estimation by Fisher Information-based Evidential Deep Learning, ICML 2023, without
    its divergence from the uniform distribution.

    Args:
        alpha: [N, C, *S], at least 1.
        onehot: targets [N, C, *S].
        information_weight: λ_I; from about 0.1 on it outweighs the target and shrinks evidence.
    """
    alpha = alpha.clamp(max=LARGEST_ALPHA)
    strength = alpha.sum(1, keepdim=True)
    p = alpha / strength
    trigamma = torch.special.polygamma(1, alpha)
    variance = p * (1 - p) / (strength + 1)
    error = (((onehot - p).square() + variance) * trigamma).sum(1, keepdim=True)
    return error - information_weight * log_fisher_determinant(trigamma, strength) if information_weight else error


def log_fisher_determinant(trigamma: Tensor, strength: Tensor) -> Tensor:
    """ln|I(α)| = Σ_c ln ψ₁(α_c) + ln(1 - Σ_c ψ₁(α0) / ψ₁(α_c)), from ψ₁(α) [N, C, *S] and α0 [N, 1, *S]."""
    bracket = 1 - (torch.special.polygamma(1, strength) / trigamma).sum(1, keepdim=True)
    return trigamma.log().sum(1, keepdim=True) + bracket.clamp(min=SMALLEST_BRACKET).log()


# ---------------------------------------------------------------------------------------------------------- curriculum


@torch.no_grad()
def rank_weight(u: Tensor, r: float, xi: float, valid: Tensor) -> Tensor:
    """ω = 1 + Ξ·tanh(ψ·ζ), [N, 1, *S]: from easy (r = 0) to hard voxels (r = 1); invalid voxels get 0.

    ψ in (-1, 1) grows with the rank of the voxel's uncertainty among the valid ones of its own patch, ζ = 2r - 1. Equal
    uncertainties share their mean rank, so that a constant one gives ω = 1; the mean over a patch is 1.
    Source: He et al., BIBM 2024. Its text ranks in descending order, which would begin with the uncertain voxels,
    against its stated intention; the intention is implemented. Ranks count from ½, so that they are centered (ours).

    Args:
        u: uncertainties [N, 1, *S].
        r: progress in [0, 1].
        xi: Ξ; 0: all voxels count alike.
        valid: boolean [N, 1, *S].
    """
    weights = torch.zeros_like(u, dtype=torch.float32)
    for values, allowed, row in zip(u, valid, weights, strict=True):
        found = values[allowed]
        ranked = found.sort().values
        below = torch.searchsorted(ranked, found, right=False)
        not_above = torch.searchsorted(ranked, found, right=True)
        psi = (below + not_above) / max(1, len(found)) - 1
        row[allowed] = 1 + xi * torch.tanh(psi * (2 * r - 1))
    return weights
