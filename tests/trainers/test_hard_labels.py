"""Losses of hard pseudo-labels, of mixed images, and entropies, against hand values."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autossl.trainers.components.losses import (
    SupervisedLoss,
    at_level,
    entropy,
    hard_label_ce,
    hard_label_dice,
    hard_label_loss,
    kl,
    masked_ce,
    normalized_entropy,
    region_mix_loss,
)
from autossl.trainers.components.pseudo import sharpen


def logits_for(probabilities: list[float], size: int = 4) -> Tensor:
    """Logits [1, C, size, size] whose softmax is the given distribution everywhere."""
    return torch.tensor(probabilities).log().view(1, -1, 1, 1).expand(1, -1, size, size).clone()


def random_case(seed: int = 0, n_classes: int = 3, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [2, C, size, size], labels and 0..1 weights [2, 1, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2, n_classes, size, size, generator=generator)
    target = torch.randint(0, n_classes, (2, 1, size, size), generator=generator)
    return z, target, torch.rand(2, 1, size, size, generator=generator)


def test_cross_entropy_hand_values() -> None:
    z = logits_for([0.25, 0.75])
    target = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    target[..., 0] = 1
    assert hard_label_ce(z, target).item() == pytest.approx((12 * math.log(4) + 4 * math.log(4 / 3)) / 16)
    w = torch.zeros(1, 1, 4, 4)
    w[..., 0], w[..., 1] = 1.0, 0.5
    weighted = 4 * math.log(4 / 3) + 4 * 0.5 * math.log(4)
    assert hard_label_ce(z, target, w).item() == pytest.approx(weighted / 6)
    everything = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    assert hard_label_ce(z, target, w, everything).item() == pytest.approx(weighted / 16)
    assert hard_label_ce(z, target, None, w).item() == pytest.approx(16 / 6 * hard_label_ce(z, target).item())


def test_region_cross_entropy_hand_values() -> None:
    p = torch.tensor([0.25, 0.5]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    z = torch.logit(p)
    target = torch.zeros(1, 2, 2, 2)
    target[:, 1] = 1
    expected = (math.log(4 / 3) + math.log(2)) / 2
    assert hard_label_ce(z, target, regions=True).item() == pytest.approx(expected)
    assert hard_label_ce(z, target, torch.ones(1, 1, 2, 2), regions=True).item() == pytest.approx(expected)
    first = torch.zeros(1, 2, 2, 2)
    first[:, 0] = 1
    assert hard_label_ce(z, target, first, regions=True).item() == pytest.approx(math.log(4 / 3)), "weights per region"
    one_valid = torch.ones(1, 1, 2, 2)
    assert hard_label_ce(z, target, first, one_valid, regions=True).item() == pytest.approx(math.log(4 / 3) / 2)


def test_dice_hand_values() -> None:
    target = torch.tensor([[[[0, 0, 1, 1]]]])
    p = torch.tensor([[[[1.0, 0.5, 0.5, 0.0]], [[0.0, 0.5, 0.5, 1.0]]]])
    z = p.clamp(min=1e-30).log()
    assert hard_label_dice(z, target).item() == pytest.approx(1 - 0.75, rel=1e-4)
    assert hard_label_dice(z, target, square=True).item() == pytest.approx(1 - 3 / 3.5, rel=1e-4)
    right = torch.tensor([[[[0.0, 0.0, 1.0, 1.0]]]])  # both 0.5 + 1, sums 1.5 + 2
    assert hard_label_dice(z, target, right).item() == pytest.approx(1 - 3 / 3.5, rel=1e-4)
    regions = torch.cat([target, torch.zeros_like(target)], 1).float()
    half = torch.zeros(1, 2, 1, 4)  # sigmoid one half: 2·1/(2+2) and 0
    assert hard_label_dice(half, regions, regions=True).item() == pytest.approx(1 - (0.5 + 0) / 2, rel=1e-4)


def test_dice_over_the_batch_or_per_sample() -> None:
    target = torch.tensor([[[[1, 1, 1, 1]]], [[[1, 0, 0, 0]]]])
    z = torch.tensor([0.0, -40.0]).view(1, 2, 1, 1).repeat(2, 1, 1, 4)
    z[0, 1], z[1, 1, 0, 1] = 40.0, 40.0
    assert hard_label_dice(z, target).item() == pytest.approx(1 - 0.8, rel=1e-4)
    assert hard_label_dice(z, target, batch_dice=False).item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_it_is_the_supervised_loss_with_pseudo_labels_for_labels(regions: bool, batch_dice: bool) -> None:
    z, target, _ = random_case()
    if regions:
        target = (target > torch.tensor([0, 1, 1]).view(1, 3, 1, 1)).float()
    levels = [z, torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)]
    valid = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    valid[..., :3] = False
    supervised = SupervisedLoss(regions=regions, batch_dice=batch_dice, has_ignore=True)(levels, target, valid)
    mine = hard_label_loss(levels, target, valid, regions=regions, batch_dice=batch_dice)
    assert mine.item() == pytest.approx(supervised.item(), rel=1e-6)


def test_levels_are_weighted_and_the_lowest_is_left_out() -> None:
    z, target, w = random_case()
    half, lowest = torch.randn(2, 3, 4, 4), torch.full((2, 3, 2, 2), float("nan"), requires_grad=True)
    at_half = masked_ce(half, at_level(target, (4, 4)), at_level(w, (4, 4)))
    value = hard_label_ce([z, half, lowest], target, w)
    assert value.item() == pytest.approx((2 * masked_ce(z, target, w).item() + at_half.item()) / 3, rel=1e-6)


Masked = Callable[[Tensor, Tensor, Tensor], Tensor]
MASKED_LOSSES: dict[str, Masked] = {
    "ce": lambda z, y, w: hard_label_ce(z, y, w),
    "ce with count": lambda z, y, w: hard_label_ce(z, y, w, torch.ones_like(w)),
    "dice": lambda z, y, w: hard_label_dice(z, y, w),
    "dice per sample": lambda z, y, w: hard_label_dice(z, y, w, batch_dice=False),
    "both": lambda z, y, w: hard_label_loss(z, y, w),
    "mix": lambda z, y, w: sum(region_mix_loss(z, w > 2, y, y, valid_out=w > 0, valid_in=w > 0), torch.zeros(())),
}


@pytest.mark.parametrize("name", MASKED_LOSSES)
@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1.0])
def test_all_masked_gives_zero_with_a_graph(name: str, bad: float) -> None:
    z = torch.full((1, 3, 4, 4), bad, requires_grad=True)
    target = torch.zeros(1, 1, 4, 4, dtype=torch.long)
    value = MASKED_LOSSES[name](z, target, torch.zeros(1, 1, 4, 4))
    assert value.item() == 0
    value.backward()
    assert z.grad is not None
    assert not z.grad.any()


@pytest.mark.parametrize("name", MASKED_LOSSES)
def test_a_masked_voxel_reaches_neither_value_nor_gradient(name: str) -> None:
    z, target, _ = random_case()
    w = torch.ones(2, 1, 8, 8)
    w[..., :3] = 0
    before = MASKED_LOSSES[name](z, target, w)
    z[..., :3] = float("inf")
    target[..., :3] = 2
    z.requires_grad_()
    value = MASKED_LOSSES[name](z, target, w)
    assert value.item() == pytest.approx(before.item(), rel=1e-6)
    value.backward()
    assert z.grad is not None
    assert not z.grad[..., :3].any()
    assert torch.isfinite(z.grad).all()
    assert z.grad[..., 3:].any()


def box(size: int = 8) -> Tensor:
    """Mask [1, 1, size, size], false inside a box in the middle."""
    mask = torch.ones(1, 1, size, size, dtype=torch.bool)
    mask[..., 2:6, 1:5] = False
    return mask


def test_uniform_logits_of_a_mixture() -> None:
    z = torch.zeros(2, 4, 8, 8)
    y_out, y_in = torch.randint(0, 4, (2, 1, 8, 8)), torch.randint(0, 4, (2, 1, 8, 8))
    mask = box().expand(2, -1, -1, -1)
    target = torch.where(mask, y_out, y_in)
    outer, inner = region_mix_loss(z, mask, y_out, y_in)
    dice = [hard_label_dice(z, target, w).item() for w in (mask, ~mask)]
    cross_entropy = 0.5 * outer.item() + inner.item() - 0.5 * (0.5 * dice[0] + dice[1])
    assert cross_entropy == pytest.approx(0.5 * 1.5 * math.log(4), rel=1e-5) == pytest.approx(1.0397, rel=1e-4)


def test_each_part_has_its_own_target_and_size() -> None:
    z, y_out, _ = random_case()
    y_in = random_case(1)[1]
    mask = box().expand(2, -1, -1, -1)
    outer, inner = region_mix_loss(z, mask, y_out, y_in)
    assert outer.item() == pytest.approx(0.5 * hard_label_loss(z, y_out, mask).item(), rel=1e-6)
    assert inner.item() == pytest.approx(0.5 * hard_label_loss(z, y_in, ~mask).item(), rel=1e-6)


def test_ignored_voxels_of_either_image_leave_the_mixture() -> None:
    z, y_out, _ = random_case()
    y_in = random_case(1)[1]
    mask = box().expand(2, -1, -1, -1)
    valid_out, valid_in = torch.rand(2, 1, 8, 8) > 0.3, torch.rand(2, 1, 8, 8) > 0.3
    before = region_mix_loss(z, mask, y_out, y_in, valid_out=valid_out, valid_in=valid_in)
    dropped = torch.where(mask, ~valid_out, ~valid_in)
    z, y_out, y_in = torch.where(dropped, z + 50, z), y_out.masked_fill(dropped, 0), y_in.masked_fill(dropped, 0)
    after = region_mix_loss(z, mask, y_out, y_in, valid_out=valid_out, valid_in=valid_in)
    assert [v.item() for v in after] == pytest.approx([v.item() for v in before], rel=1e-6)


def test_perfect_logits_of_a_mixture_cost_nothing() -> None:
    _, y_out, _ = random_case()
    y_in = random_case(1)[1]
    mask = box().expand(2, -1, -1, -1)
    z = 30.0 * torch.zeros(2, 3, 8, 8).scatter_(1, torch.where(mask, y_out, y_in), 1.0)
    assert sum(v.item() for v in region_mix_loss(z, mask, y_out, y_in)) < 1e-4


def test_a_part_that_vanishes_at_a_low_level_costs_nothing_there() -> None:
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 0, 0] = False  # gone at 4 x 4
    z = [torch.zeros(1, 2, s, s, requires_grad=True) for s in (8, 4, 2)]
    y = torch.zeros(1, 1, 8, 8, dtype=torch.long)
    _, inner = region_mix_loss(z, mask, y, y)
    inner.backward()
    assert z[0].grad is not None
    assert z[0].grad.any()
    assert z[1].grad is not None, "the graph is kept"
    assert not z[1].grad.any()


def test_region_sets_mix_as_channels() -> None:
    y_out, y_in = (torch.rand(1, 2, 8, 8) > 0.5).float(), (torch.rand(1, 2, 8, 8) > 0.5).float()
    mask = box()
    perfect = 40 * torch.where(mask, y_out, y_in) - 20
    assert sum(v.item() for v in region_mix_loss(perfect, mask, y_out, y_in, regions=True)) < 1e-4
    assert region_mix_loss(-perfect, mask, y_out, y_in, regions=True)[1].item() > 5


def test_kl_hand_values() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl(p.log(), q.log()).item() == pytest.approx(expected, rel=1e-5)
    assert kl(p.log(), p.log()).item() == 0
    certain = torch.tensor([[0.0, float("-inf")]], requires_grad=True)
    value = kl(certain, q.log())
    assert value.item() == pytest.approx(math.log(4))
    value.sum().backward()
    assert certain.grad is not None
    assert torch.isfinite(certain.grad).all()
    assert kl(torch.randn(2, 3, 4, 5).log_softmax(1), torch.randn(2, 3, 4, 5).log_softmax(1)).shape == (2, 1, 4, 5)


def test_entropy_hand_values() -> None:
    p = torch.tensor([0.9, 0.1]).view(1, 2, 1, 1)
    expected = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert entropy(p).item() == pytest.approx(expected, rel=1e-4)
    assert entropy(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)).item() == pytest.approx(0, abs=2e-6)
    assert entropy(p, regions=True).item() == pytest.approx(expected, rel=1e-4), "both regions: the same binary entropy"


@pytest.mark.parametrize("n_classes", [2, 3, 7])
def test_normalized_entropy_is_one_for_uniform_and_zero_for_certain(n_classes: int) -> None:
    uniform = torch.full((1, n_classes, 2, 2), 3.0)
    assert normalized_entropy(uniform).flatten().tolist() == pytest.approx([1.0] * 4)
    certain = uniform.clone()
    certain[:, 0] = 1000
    assert normalized_entropy(certain).abs().max() == 0


def test_normalized_entropy_hand_values() -> None:
    assert normalized_entropy(logits_for([0.9, 0.1], 1)).item() == pytest.approx(0.46900, abs=1e-5)
    two_of_three = torch.tensor([0.0, 0.0, -200.0]).view(1, 3, 1, 1)
    assert normalized_entropy(two_of_three).item() == pytest.approx(0.63093, abs=1e-5)
    assert normalized_entropy(torch.logit(torch.tensor([0.9])).view(1, 1, 1, 1), regions=True).item() == pytest.approx(
        0.46900, abs=1e-5
    )
    halves = torch.tensor([0.0, 80.0]).view(1, 2, 1, 1)  # one uncertain region, one certain
    assert normalized_entropy(halves, regions=True).item() == pytest.approx(0.5)


@pytest.mark.parametrize("regions", [False, True])
def test_normalized_entropy_of_half_precision_logits_is_finite(regions: bool) -> None:
    z = torch.tensor([30.0, -30.0, 30.0], dtype=torch.float16).view(1, 3, 1, 1).requires_grad_()
    value = normalized_entropy(z, regions)
    assert value.dtype == torch.float32
    value.sum().backward()
    assert z.grad is not None
    assert torch.isfinite(value).all()
    assert torch.isfinite(z.grad).all()


def test_sharpen_hand_values() -> None:
    log_p = torch.tensor([[0.6, 0.4]]).log()
    assert sharpen(log_p).flatten().tolist() == pytest.approx([0.98295, 0.01705], abs=1e-5)
    three = sharpen(torch.tensor([[0.40, 0.35, 0.25]]).log()).flatten().tolist()
    assert three == pytest.approx([0.7861, 0.2068, 0.0071], abs=1e-4)
    uniform = torch.full((1, 4, 2, 2), 0.25)
    assert torch.equal(sharpen(uniform.log()), uniform)
    assert sharpen(torch.tensor([[0.6, 0.4]]).log(), 1.0).flatten().tolist() == pytest.approx([0.6, 0.4])
