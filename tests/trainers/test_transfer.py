"""The closed-form bound of the expected cross-entropy under shifted, spread features."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from autossl.trainers.components.transfer import class_balanced_ce, transferable_logits


def task(n: int = 40, n_classes: int = 3, dim: int = 5, seed: int = 0) -> tuple[Tensor, ...]:
    """Features, weights, bias, classes, shifts and covariances."""
    draw = torch.Generator().manual_seed(seed)
    f, w = torch.randn(n, dim, generator=draw), torch.randn(n_classes, dim, generator=draw)
    bias, y = torch.randn(n_classes, generator=draw), torch.randint(n_classes, (n,), generator=draw)
    shift, root = torch.randn(n_classes, dim, generator=draw), torch.randn(n_classes, dim, dim, generator=draw)
    return f, w, bias, y, shift, root @ root.mT / dim


def test_without_strength_or_without_moments_nothing_changes() -> None:
    f, w, bias, y, shift, cov = task()
    z = functional.linear(f, w, bias)
    assert torch.equal(transferable_logits(z, w, y, shift, cov, 0.0), z)
    assert torch.equal(transferable_logits(z, w, y, 0 * shift, 0 * cov, 0.7), z)


def test_closed_form_by_hand() -> None:
    w, f = torch.eye(2), torch.tensor([[1.0, 0.0]])
    shift = torch.tensor([[0.0, 1.0], [9.0, 9.0]])  # class 1 is asked by nobody
    y = torch.tensor([0])
    for cov in (torch.stack([torch.eye(2), 9 * torch.eye(2)]), torch.tensor([[1.0, 1.0], [9.0, 9.0]])):
        z = transferable_logits(f @ w.T, w, y, shift, cov, 0.5)
        assert torch.equal(z, torch.tensor([[1.0, 1.0]]))
        assert functional.cross_entropy(z, y).item() == pytest.approx(math.log(2))
    assert functional.cross_entropy(f @ w.T, y).item() == pytest.approx(0.3133, abs=1e-4)


def test_voxel_by_voxel_as_the_formula_says() -> None:
    f, w, bias, y, shift, cov = task()
    s, z = 0.3, functional.linear(f, w, bias)
    found = transferable_logits(z, w, y, shift, cov, s)
    for i, label in enumerate(y.tolist()):
        for c in range(len(w)):
            apart = w[c] - w[label]
            expected = z[i, c] + s * apart @ shift[label] + s / 2 * apart @ cov[label] @ apart
            assert found[i, c].item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("kind", ["full", "diag"])
def test_the_own_logit_stays_and_the_spread_raises_the_others(kind: Literal["full", "diag"]) -> None:
    f, w, bias, y, shift, cov = task()
    spread = cov if kind == "full" else cov.diagonal(dim1=1, dim2=2)
    z = functional.linear(f, w, bias)
    own = functional.one_hot(y, len(w)).bool()
    assert torch.equal(transferable_logits(z, w, y, shift, spread, 0.5)[own], z[own])
    by_spread = transferable_logits(z, w, y, 0 * shift, spread, 0.5) - z
    assert bool((by_spread[~own] > 0).all())
    diagonal = torch.diag_embed(cov.diagonal(dim1=1, dim2=2))
    assert kind == "full" or torch.allclose(by_spread, transferable_logits(z, w, y, 0 * shift, diagonal, 0.5) - z)


def test_the_mean_over_drawn_features_stays_below_the_bound_which_tightens() -> None:
    f, w, bias, _, shift, cov = task(n=1)
    y, draw = torch.tensor([1]), torch.Generator().manual_seed(1)
    root = torch.linalg.cholesky(cov[1])
    noise = torch.randn(100_000, f.shape[1], generator=draw)
    gaps = []
    for s in (0.5, 0.1, 0.02):
        bound = functional.cross_entropy(
            transferable_logits(functional.linear(f, w, bias), w, y, shift, cov, s), y
        ).item()
        drawn = f + s * shift[1] + math.sqrt(s) * noise @ root.T
        mean = functional.cross_entropy(functional.linear(drawn, w, bias), y.expand(len(drawn))).item()
        assert mean <= bound
        gaps.append(bound - mean)
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.05


def test_one_vector_added_to_all_weights_changes_no_loss() -> None:
    f, w, bias, y, shift, cov = task()
    more = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    losses = []
    for weight in (w, w + more):
        z = transferable_logits(functional.linear(f, weight, bias), weight, y, shift, cov, 0.25)
        losses.append(class_balanced_ce(z, y).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_both_the_logits_and_the_correction_pull_at_the_weights() -> None:
    f, w, bias, y, shift, cov = task()
    w.requires_grad_()
    z = functional.linear(f, w, bias)
    at_weights = {"inputs": w, "retain_graph": True}
    through_correction = transferable_logits(z.detach(), w, y, shift, cov, 0.25)
    (found,) = torch.autograd.grad(class_balanced_ce(through_correction, y), **at_weights)
    assert bool((found != 0).any())
    (plain,) = torch.autograd.grad(
        class_balanced_ce(transferable_logits(z, w.detach(), y, shift, cov, 0.25), y), **at_weights
    )
    (both,) = torch.autograd.grad(class_balanced_ce(transferable_logits(z, w, y, shift, cov, 0.25), y), **at_weights)
    assert torch.allclose(both, plain + found, atol=1e-6)


def test_float32_also_under_autocast() -> None:
    f, w, bias, y, shift, cov = task()
    z = functional.linear(f, w, bias)
    with torch.autocast("cpu", torch.bfloat16):
        found = transferable_logits(z, w, y, shift, cov, 0.25)
    assert torch.equal(found, transferable_logits(z, w, y, shift, cov, 0.25))


def test_classes_count_alike_however_many_rows_they_have() -> None:
    z = torch.tensor([[0.0, 0.0, 0.0]] * 3 + [[0.0, 50.0, 0.0]], requires_grad=True)
    y = torch.tensor([0, 0, 0, 1])
    assert class_balanced_ce(z, y).item() == pytest.approx(math.log(3) / 2), "class 2 is not there"
    nothing = class_balanced_ce(z[:0], y[:0])
    assert nothing.item() == 0
    assert nothing.requires_grad
