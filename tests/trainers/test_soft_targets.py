"""Dice + KL against soft targets: closed forms, and the parts of a batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autossl.trainers.components.losses import deep_supervision_weights, one_hot
from autossl.trainers.components.soft_targets import pooled_target, soft_target_loss

EVERYWHERE = torch.ones(2, 1, 4, 4, dtype=torch.bool)


def halves_of_two_classes(n: int = 2) -> Tensor:
    labels = torch.zeros(n, 1, 4, 4, dtype=torch.long)
    labels[:, :, :2] = 1
    return one_hot(labels, 2)


def parts(
    z: Tensor, y: Tensor, n_first: int | None = None, valid: Tensor | None = None, regions: bool = False
) -> Tensor:
    return torch.stack(soft_target_loss([z], y, EVERYWHERE if valid is None else valid, n_first, regions))


def by_hand(z: Tensor, y: Tensor) -> Tensor:
    """The loss of the whole batch, written down again."""
    p = z.softmax(1)
    axes = (0, *range(2, z.ndim))
    dice = 2 * (p * y).sum(axes) / ((p * p).sum(axes) + (y * y).sum(axes)).clamp(min=1e-6)
    kl = torch.where(y > 0, y * (y.clamp(min=1e-30).log() - z.log_softmax(1)), 0)
    return 1 - dice.mean() + kl.mean()


def test_perfect_predictions_cost_nothing() -> None:
    y = halves_of_two_classes()
    assert parts(200 * y, y).sum().item() == pytest.approx(0, abs=1e-6)


def test_an_even_guess_on_two_balanced_classes() -> None:
    """Dice 1 - 2·0.5 / (0.5 + 1) = 1/3; KL ½·ln 2, the mean over both channels."""
    y = halves_of_two_classes()
    assert parts(torch.zeros_like(y), y).sum().item() == pytest.approx(1 / 3 + 0.5 * math.log(2), rel=1e-6)


def test_a_soft_target_that_is_met_costs_no_divergence() -> None:
    z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    y = z.softmax(1)
    assert parts(z, y).sum().item() == pytest.approx(0, abs=1e-6), "and Dice is 1: 2Σp² / 2Σp²"
    regions = parts(z, z.sigmoid(), regions=True)
    assert regions.sum().item() == pytest.approx(0, abs=1e-6)


def test_regions_pay_binary_divergence_and_dice_per_channel() -> None:
    y = halves_of_two_classes()[:, :1].repeat(1, 2, 1, 1)
    assert parts(torch.zeros_like(y), y, regions=True).sum().item() == pytest.approx(1 / 3 + math.log(2), rel=1e-6)


@pytest.mark.parametrize("n_first", [0, 1, 2])
def test_the_parts_are_the_loss_and_each_has_the_gradient_of_its_own_patches(n_first: int) -> None:
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(2, 3, 4, 4, generator=draw, requires_grad=True)
    y = torch.randn(2, 3, 4, 4, generator=draw).softmax(1)
    whole = by_hand(z, y)
    expected = torch.autograd.grad(whole, z)[0]
    first, second = soft_target_loss([z], y, EVERYWHERE, n_first)
    assert (first + second).item() == pytest.approx(whole.item(), rel=1e-5)
    found = [torch.autograd.grad(part, z, retain_graph=True)[0] for part in (first, second)]
    assert (found[0][n_first:] == 0).all()
    assert (found[1][:n_first] == 0).all()
    torch.testing.assert_close(found[0] + found[1], expected)


def test_values_are_shared_by_voxels() -> None:
    y, z = halves_of_two_classes(), torch.zeros(2, 2, 4, 4)
    valid = EVERYWHERE.clone()
    valid[1, :, :, 2:] = False
    first, second = parts(z, y, 1, valid)
    assert first.item() == pytest.approx(2 * second.item(), rel=1e-5), "16 voxels and 8"


def test_classes_that_are_absent_have_no_dice() -> None:
    y = torch.cat([halves_of_two_classes(), torch.zeros(2, 1, 4, 4)], 1)
    z = torch.zeros_like(y)
    z[:, 2] = -40
    assert parts(z, y).sum().item() == pytest.approx(1 / 3 + math.log(2) / 3, rel=1e-5)


def test_what_stands_at_invalid_voxels_does_not_matter() -> None:
    draw = torch.Generator().manual_seed(2)
    z, y = torch.randn(2, 3, 4, 4, generator=draw), torch.randn(2, 3, 4, 4, generator=draw).softmax(1)
    valid = torch.rand(2, 1, 4, 4, generator=draw) > 0.3
    coarse = torch.randn(2, 3, 2, 2, generator=draw)
    expected = torch.stack(soft_target_loss([z, coarse, coarse], y, valid, 1))
    for nonsense in (7.0, float("nan"), float("inf")):
        odd_z, odd_y = torch.where(valid, z, nonsense), torch.where(valid, y, nonsense)
        assert torch.equal(torch.stack(soft_target_loss([odd_z, coarse, coarse], odd_y, valid, 1)), expected)
    nothing = soft_target_loss([z.requires_grad_()], y, torch.zeros_like(valid), 1)
    assert [part.item() for part in nothing] == [0, 0]
    nothing[0].backward()


def test_what_is_not_finite_at_a_valid_voxel_is_seen() -> None:
    y, z = halves_of_two_classes(), torch.zeros(2, 2, 4, 4)
    z[0, 0, 0, 0] = float("nan")
    assert not torch.isfinite(parts(z, y)).any()


def test_targets_are_pooled_to_each_level_over_valid_voxels() -> None:
    y = halves_of_two_classes(1)
    valid = EVERYWHERE[:1].clone()
    pooled, w = pooled_target(y, valid, (1, 2))
    assert torch.equal(pooled, torch.full((1, 2, 1, 2), 0.5))
    assert torch.equal(w, torch.ones(1, 1, 1, 2))
    valid[:, :, :2, :2] = False
    pooled, w = pooled_target(y, valid, (1, 2))
    assert pooled[0, :, 0].tolist() == [[1.0, 0.5], [0.0, 0.5]], "what is valid sums to 1"
    assert w[0, 0].tolist() == [[0.5, 1.0]]
    draw = torch.Generator().manual_seed(3)
    z = [torch.randn(2, 2, edge, edge, generator=draw) for edge in (4, 2, 1)]
    y = torch.randn(2, 2, 4, 4, generator=draw).softmax(1)
    whole = sum(
        weight * by_hand(level, torch.nn.functional.avg_pool2d(y, 4 // level.shape[2]))
        for weight, level in zip(deep_supervision_weights(3), z, strict=True)
    )
    assert sum(soft_target_loss(z, y, EVERYWHERE, 1)).item() == pytest.approx(whole.item(), rel=1e-5)
