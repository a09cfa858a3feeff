"""Losses against hand values, and their behavior on masked, empty and non-finite input."""

from __future__ import annotations

import math

import pytest
import torch

from autossl.trainers.components.losses import (
    SupervisedLoss,
    at_level,
    connected_zero,
    deep_supervision_weights,
    masked_bce,
    masked_ce,
    probability_mse,
    soft_dice,
)


def logits_for(probabilities: list[float], n: int = 1, size: int = 4) -> torch.Tensor:
    """Logits [n, C, size, size] whose softmax is the given distribution everywhere."""
    log_p = torch.tensor(probabilities).log().view(1, -1, 1, 1)
    return log_p.expand(n, -1, size, size).clone().requires_grad_()


def test_masked_ce_is_the_mean_over_weighted_voxels() -> None:
    z = logits_for([0.25, 0.75])
    target = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    target[..., 0] = 1
    assert masked_ce(z, target).item() == pytest.approx((12 * math.log(4) + 4 * math.log(4 / 3)) / 16)
    w = torch.zeros(1, 1, 4, 4)
    w[..., 0] = 2.0
    w[0, 0, 0, 1] = 4.0
    expected = (4 * 2 * math.log(4 / 3) + 4 * math.log(4)) / 12
    assert masked_ce(z, target, w).item() == pytest.approx(expected, rel=1e-6)


def test_all_masked_gives_zero_with_a_graph_even_for_infinite_logits() -> None:
    z = torch.full((1, 2, 4, 4), float("inf"), requires_grad=True)
    nothing = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    target = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    loss = SupervisedLoss(regions=False, batch_dice=False, has_ignore=True)
    for value in (masked_ce(z, target, nothing), connected_zero(z), loss([z], target, nothing)):
        assert value.item() == 0
        value.backward()
        assert z.grad is not None
        assert not z.grad.any()


def test_an_infinite_voxel_outside_the_mask_does_no_harm() -> None:
    z = logits_for([0.5, 0.5]).detach()
    z[0, 0, 0, 0] = float("inf")
    target = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    w = torch.ones(1, 1, 4, 4)
    w[0, 0, 0, 0] = 0
    assert masked_ce(z, target, w).item() == pytest.approx(math.log(2))
    p = torch.softmax(z, 1)
    assert torch.isnan(p).any()
    assert soft_dice(p, target, w)[0].item() == pytest.approx(2 * 7.5 / (7.5 + 15), rel=1e-4)
    assert probability_mse(p, torch.zeros_like(p), w).item() == pytest.approx(0.25)


def test_a_target_that_is_not_finite_outside_the_mask_reaches_no_gradient() -> None:
    p = torch.full((1, 2, 1, 2), 0.5, requires_grad=True)
    q = torch.tensor([[[[1.0, math.nan]], [[0.0, math.inf]]]])
    loss = probability_mse(p, q, torch.tensor([[[[1.0, 0.0]]]]))
    loss.backward()
    assert loss.item() == pytest.approx(0.25)
    assert p.grad is not None
    assert p.grad.flatten().tolist() == pytest.approx([-0.5, 0, 0.5, 0])


def test_soft_dice_hand_values() -> None:
    target = torch.tensor([[[[0, 0, 1, 1]]]])
    p = torch.tensor([[[[1.0, 0.5, 0.5, 0.0]], [[0.0, 0.5, 0.5, 1.0]]]])
    # class 1: both = 0.5 + 1, sums 2 + 2
    assert soft_dice(p, target).tolist() == pytest.approx([0.75, 0.75], rel=1e-4)
    # squares: class 1 sum of squares 0.25 + 0.25 + 1
    assert soft_dice(p, target, square=True)[1].item() == pytest.approx(3 / 3.5, rel=1e-4)
    absent = torch.zeros(1, 1, 1, 4, dtype=torch.long)
    certain = torch.tensor([[[[1.0] * 4], [[0.0] * 4]]])
    assert soft_dice(certain, absent)[1].item() == pytest.approx(1.0), "absent and not predicted costs nothing"


def test_soft_dice_per_sample_differs_from_batch_dice() -> None:
    target = torch.tensor([[[[1, 1, 1, 1]]], [[[1, 0, 0, 0]]]])
    p = torch.zeros(2, 2, 1, 4)
    p[0, 1], p[1, 1] = 1.0, torch.tensor([0.0, 1.0, 0.0, 0.0])
    p[:, 0] = 1 - p[:, 1]
    assert soft_dice(p, target, classes=[1]).item() == pytest.approx(8 / 10, rel=1e-4)
    assert soft_dice(p, target, classes=[1], per_sample=True).flatten().tolist() == pytest.approx([1, 0], abs=1e-4)


def test_probability_mse_closed_form() -> None:
    p = torch.full((2, 2, 3, 3), 0.5)
    q = torch.stack([torch.ones(2, 3, 3), torch.zeros(2, 3, 3)], 1)
    assert probability_mse(p, q).item() == 0.25
    assert probability_mse(q, q).item() == 0
    w = torch.zeros(2, 1, 3, 3)
    w[0, 0, 0, 0] = 3.0
    assert probability_mse(p, q, w).item() == pytest.approx(0.25)


def test_level_weights_are_halved_and_the_lowest_is_left_out() -> None:
    assert deep_supervision_weights(1) == [1.0]
    assert deep_supervision_weights(4) == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0])


def test_supervised_loss_is_the_weighted_sum_of_its_levels() -> None:
    loss = SupervisedLoss(regions=False, batch_dice=True, has_ignore=False)
    target = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    target[..., 2:] = 1
    full, half, lowest = (logits_for([0.25, 0.75], size=s) for s in (4, 2, 1))
    valid = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    cross_entropy = 0.5 * math.log(4) + 0.5 * math.log(4 / 3)
    dice = 2 * 0.75 * 0.5 / (0.75 + 0.5)
    one_level = cross_entropy + 1 - dice
    assert loss([full, half, lowest], target, valid).item() == pytest.approx(one_level, rel=1e-4)
    loss([full, half, lowest], target, valid).backward()
    assert lowest.grad is None, "the lowest level carries no weight"


def test_ignored_voxels_change_nothing() -> None:
    loss = SupervisedLoss(regions=False, batch_dice=True, has_ignore=True)
    torch.manual_seed(0)
    z = torch.randn(1, 3, 8, 8)
    target = torch.randint(0, 3, (1, 1, 8, 8))
    valid = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    valid[..., :3] = False
    before = loss([z], target, valid)
    z[..., :3] += 100 * torch.randn(1, 3, 8, 3)
    target[..., :3] = 0
    assert loss([z], target, valid).item() == pytest.approx(before.item(), rel=1e-6)
    assert loss([z], target, torch.ones_like(valid)).item() != pytest.approx(before.item(), rel=1e-2)


def test_region_loss_hand_value() -> None:
    loss = SupervisedLoss(regions=True, batch_dice=True, has_ignore=False)
    z = torch.zeros(1, 2, 2, 2)
    target = torch.zeros(1, 2, 2, 2)
    target[0, 0] = 1
    # probability one half everywhere: BCE ln 2; Dice 2·2/(2+4) and 0
    value = loss([z], target, torch.ones(1, 1, 2, 2, dtype=torch.bool))
    assert value.item() == pytest.approx(math.log(2) + 1 - (2 / 3 + 0) / 2, rel=1e-4)
    half = torch.zeros(1, 1, 2, 2)
    half[..., 0] = 1
    assert masked_bce(z, target, half).item() == pytest.approx(math.log(2))


def test_at_level_picks_neighbors_and_keeps_the_type() -> None:
    target = torch.arange(16).view(1, 1, 4, 4)
    small = at_level(target, (2, 2))
    assert small.dtype == torch.long
    assert small.flatten().tolist() == [5, 7, 13, 15]
    assert at_level(target, (4, 4)) is target
