"""How unsure a prediction is, voxel by voxel: entropy of the mean probabilities, and disagreement of the folds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autossl.networks.prediction import Activation


def normalized_entropy(probabilities: Tensor, activation: Activation) -> Tensor:
    """Entropy over the outputs, 0 (certain) to 1 (nothing known); float32 in the shape without axis 0.

    Labels: -Σ p·ln p / ln K of the K labels' probabilities. Regions (sigmoid): the mean over the regions of their
    binary entropies divided by ln 2.

    Args:
        probabilities: [K, ...].
        activation: "sigmoid" for regions, else labels.
    """
    if activation == "sigmoid":
        return (_entropy_terms(probabilities) + _entropy_terms(1 - probabilities)).mean(0) / math.log(2)
    if len(probabilities) == 1:
        return torch.zeros_like(probabilities[0])
    return _entropy_terms(probabilities).sum(0) / math.log(len(probabilities))


def pairwise_disagreement(labels: Tensor) -> Tensor:
    """Probability that two different folds, drawn at random, label the voxel differently; 0 to 1, float32.

    With n_l of F folds for label l: 1 - Σ_l n_l·(n_l - 1) / (F·(F - 1)).

    Args:
        labels: [F, ...], at least two folds.

    Raises:
        ValueError: fewer than two folds.
    """
    n_folds = len(labels)
    if n_folds < 2:
        raise ValueError("disagreement needs at least two folds")
    differing = torch.zeros(labels.shape[1:], dtype=torch.float32, device=labels.device)
    for first in range(n_folds):
        for second in range(first + 1, n_folds):
            differing += labels[first] != labels[second]
    return differing / (n_folds * (n_folds - 1) / 2)


def _entropy_terms(probabilities: Tensor) -> Tensor:
    return torch.special.entr(probabilities.float().clamp(0, 1))
