"""Closed forms of entropy and disagreement."""

from __future__ import annotations

import math

import pytest
import torch

from autossl.inference.uncertainty import normalized_entropy, pairwise_disagreement


def test_entropy_runs_from_certain_to_uniform() -> None:
    probabilities = torch.tensor([[1.0, 0.25, 0.5], [0.0, 0.25, 0.5], [0.0, 0.25, 0.0], [0.0, 0.25, 0.0]])
    assert normalized_entropy(probabilities, "softmax").tolist() == pytest.approx([0, 1, 0.5])


def test_region_entropy_is_the_mean_of_the_binary_ones() -> None:
    probabilities = torch.tensor([[0.5, 1.0], [0.5, 0.5], [0.9, 0.0]])
    ninth = -(0.9 * math.log2(0.9) + 0.1 * math.log2(0.1))
    assert normalized_entropy(probabilities, "sigmoid").tolist() == pytest.approx([(2 + ninth) / 3, 1 / 3])


def test_disagreement_is_the_share_of_pairs_that_differ() -> None:
    labels = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 3], [0, 1, 4]])
    assert pairwise_disagreement(labels).tolist() == pytest.approx([0, 6 / 10, 1])
    with pytest.raises(ValueError, match="two folds"):
        pairwise_disagreement(labels[:1])
