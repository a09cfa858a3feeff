"""The contrastive loss and the sampling of voxels: closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autossl.trainers.components.contrast import (
    Rows,
    choose_voxels,
    has_negatives,
    mean_over_anchors,
    pair_losses,
    rows_at,
    sample_voxels,
    sup_con,
)


def two_classes() -> tuple[Tensor, Tensor]:
    """Two orthogonal classes with two identical rows each."""
    return torch.eye(2)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])


def random_rows(n: int = 7, dim: int = 5, n_classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    e = torch.nn.functional.normalize(torch.randn(n, dim, generator=generator), dim=1)
    return e, torch.randint(n_classes, (n,), generator=generator)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize(
    ("tau", "value"), [(1.0, math.log(math.e + 2) - 1), (0.07, math.log1p(2 * math.exp(-1 / 0.07)))]
)
def test_two_orthogonal_classes(tau: float, value: float) -> None:
    e, labels = two_classes()
    pairs = pair_losses(Rows(e, labels), tau)
    assert pairs.positive.sum() == 4
    assert pairs.values[pairs.positive].tolist() == pytest.approx([value] * 4, abs=2e-7)
    assert sup_con(e, labels, tau).item() == pytest.approx(value, abs=1e-6)  # float32 near 1 / 0.07


def test_a_high_temperature_counts_the_candidates() -> None:
    e, labels = two_classes()
    assert sup_con(e, labels, 1e6).item() == pytest.approx(math.log(3), abs=1e-5)
    bank = Rows(*random_rows(5, 2))
    assert sup_con(e, labels, 1e6, bank).item() == pytest.approx(math.log(8), abs=1e-5)


def test_equals_the_formula_written_out() -> None:
    e, labels = random_rows()
    bank, bank_labels = random_rows(4, seed=1)
    candidates, all_labels = torch.cat([e, bank]), torch.cat([labels, bank_labels])
    anchors = []
    for i in range(len(e)):
        others = [j for j in range(len(candidates)) if j != i]
        denominator = sum(math.exp(float(e[i] @ candidates[a]) / 0.2) for a in others)
        terms = [
            -math.log(math.exp(float(e[i] @ candidates[j]) / 0.2) / denominator)
            for j in others
            if all_labels[j] == labels[i]
        ]
        if terms:
            anchors.append(sum(terms) / len(terms))
    found = sup_con(e, labels, 0.2, Rows(bank, bank_labels))
    assert found.item() == pytest.approx(sum(anchors) / len(anchors), rel=1e-5)


@pytest.mark.parametrize("with_bank", [False, True])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 2.0, 1.0])])
def test_equals_the_mean_over_all_pairs(with_bank: bool, weights: Tensor | None) -> None:
    e, labels = random_rows(40, 6, 3)
    labels[0] = 3  # no other row, but one of the bank
    bank = Rows(*random_rows(25, 6, 4, seed=1)) if with_bank else None
    e.requires_grad_(True)
    expected = mean_over_anchors(pair_losses(Rows(e, labels), 0.1, bank), class_weights=weights)
    found = sup_con(e, labels, 0.1, bank, weights)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found, e)[0], torch.autograd.grad(expected, e)[0])


def test_order_of_rows_does_not_matter() -> None:
    e, labels = random_rows()
    order = torch.randperm(len(e), generator=generator())
    assert sup_con(e[order], labels[order], 0.1).item() == pytest.approx(sup_con(e, labels, 0.1).item(), rel=1e-6)
    renamed = torch.tensor([5, 0, 9])[labels]
    assert sup_con(e, renamed, 0.1).item() == pytest.approx(sup_con(e, labels, 0.1).item(), rel=1e-6)


def test_no_gradient_into_the_bank() -> None:
    e, labels = random_rows()
    bank, bank_labels = random_rows(4, seed=1)
    e.requires_grad_(True)
    bank.requires_grad_(True)
    sup_con(e, labels, 0.1, Rows(bank, bank_labels)).backward()
    assert bank.grad is None
    assert e.grad is not None
    assert e.grad.abs().sum() > 0


def test_anchors_without_a_positive_are_left_out_but_stay_negatives() -> None:
    e, _ = two_classes()
    alone = torch.cat([e, torch.tensor([[-1.0, 0.0]])])
    found = sup_con(alone, torch.tensor([0, 0, 1, 1, 2]), 1.0)
    to_first = math.log(math.e + 2 + math.exp(-1)) - 1
    to_second = math.log(math.e + 3) - 1
    assert found.item() == pytest.approx((to_first + to_second) / 2, rel=1e-6)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_without_positives_it_is_a_connected_zero(n: int) -> None:
    e = torch.eye(3)[:n].requires_grad_(True)
    loss = sup_con(e, torch.arange(n), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert e.grad is not None
    assert torch.equal(e.grad, torch.zeros(n, 3))


def test_without_positives_not_even_nan_spreads() -> None:
    e = torch.full((2, 3), math.nan, requires_grad=True)
    sup_con(e, torch.arange(2), 0.1).backward()
    assert e.grad is not None
    assert torch.equal(e.grad, torch.zeros(2, 3))


def test_a_small_temperature_stays_finite() -> None:
    e, labels = two_classes()
    e.requires_grad_(True)
    loss = sup_con(-e + 2 * e.detach(), labels.flip(0)[[0, 2, 1, 3]], 1e-3)
    loss.backward()
    assert loss.item() == pytest.approx(1000, rel=0.01)
    assert e.grad is not None
    assert torch.isfinite(e.grad).all()


def test_float32_under_autocast() -> None:
    e, labels = random_rows()
    exact = sup_con(e, labels, 0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sup_con(e, labels, 0.01)
    assert found.dtype == torch.float32
    assert torch.equal(found, exact)


def test_temperature_is_checked() -> None:
    with pytest.raises(ValueError, match="tau is 0: expected a positive"):
        sup_con(*two_classes(), 0)


# ------------------------------------------------------------------------------------------------------------ weights


def test_pair_weights_are_constants() -> None:
    e, labels = random_rows()
    e.requires_grad_(True)

    def weight(values: Tensor) -> Tensor:
        return (1 - values / 4).clamp(min=0)

    pairs = pair_losses(Rows(e, labels), 0.2)
    w = weight(pairs.values.detach()) * pairs.positive
    by_hand = ((w * pairs.values).sum(1)[pairs.anchors] / pairs.positive.sum(1)[pairs.anchors]).mean()
    (expected,) = torch.autograd.grad(by_hand, e)
    with_graph = weight(pair_losses(Rows(e, labels), 0.2).values)
    for given in (weight, w, with_graph):
        found = mean_over_anchors(pair_losses(Rows(e, labels), 0.2), given)
        assert found.item() == pytest.approx(by_hand.item(), rel=1e-6)
        torch.testing.assert_close(torch.autograd.grad(found, e)[0], expected)


def test_class_means_first() -> None:
    e, labels = random_rows(9)
    pairs = pair_losses(Rows(e, labels), 0.5)
    per_class = []
    for value in range(3):
        mine = labels == value
        anchors = [pairs.values[i][pairs.positive[i]].mean() for i in mine.nonzero()[:, 0] if pairs.positive[i].any()]
        per_class.append(torch.stack(anchors).mean().item())
    weights = torch.tensor([0.5, 1.0, 1.0, 1.0])  # class 3 is absent
    expected = (0.5 * per_class[0] + per_class[1] + per_class[2]) / 2.5
    assert sup_con(e, labels, 0.5, class_weights=weights).item() == pytest.approx(expected, rel=1e-6)
    assert len(set((labels.bincount()).tolist())) > 1, "sizes differ, else the test shows nothing"


def test_an_unknown_label_is_a_negative_only() -> None:
    e, labels = two_classes()
    known = torch.tensor([True, True, True, False])
    pairs = pair_losses(Rows(e, labels, known), 1.0)
    assert pairs.anchors.tolist() == [True, True, False, False]
    assert mean_over_anchors(pairs).item() == pytest.approx(math.log(math.e + 2) - 1)
    bank = Rows(e, labels, torch.zeros(4, dtype=torch.bool))
    assert pair_losses(Rows(e, labels), 1.0, bank).positive.sum() == 4
    own = pair_losses(Rows(e, labels, torch.zeros(4, dtype=torch.bool)), 1.0, Rows(e, labels))
    assert not own.anchors.any()


def test_has_negatives() -> None:
    e, labels = two_classes()
    assert has_negatives(Rows(e, labels))
    assert not has_negatives(Rows(e[:2], labels[:2]))
    assert has_negatives(Rows(e[:2], labels[:2]), Rows(e[2:], labels[2:]))
    assert not has_negatives(Rows(e[:0], labels[:0]))


# ------------------------------------------------------------------------------------------------------------- voxels


def map_and_labels() -> tuple[Tensor, Tensor, Tensor]:
    """A map whose first channel is the position of each voxel; labels in stripes; a quarter invalid."""
    n_voxels = 2 * 16 * 16
    f = torch.stack([torch.arange(n_voxels), torch.arange(n_voxels) % 7]).float().reshape(2, 2, 16, 16).transpose(0, 1)
    labels = (torch.arange(16) // 6).expand(2, 1, 16, 16)
    valid = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    valid[:, :, :8, :8] = False
    return f, labels, valid


@pytest.mark.parametrize("per_class", [1, 20, 100, 10_000])
def test_voxels_are_balanced_valid_and_distinct(per_class: int) -> None:
    f, labels, valid = map_and_labels()
    rows, found = sample_voxels(f, labels, per_class, valid, generator())
    positions = rows[:, 0].long()
    assert rows.shape == (len(found), 2)
    assert len(set(positions.tolist())) == len(positions)
    assert valid.flatten()[positions].all()
    assert torch.equal(labels.flatten()[positions], found)
    assert torch.equal(rows[:, 1].long(), positions % 7)
    available = labels.flatten()[valid.flatten()].bincount()
    assert found.bincount().tolist() == available.clamp(max=per_class).tolist()


def test_draws_follow_the_generator() -> None:
    _, labels, valid = map_and_labels()
    first, again = (choose_voxels(labels, 10, valid, generator()) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, choose_voxels(labels, 10, valid, generator(1)))


@pytest.mark.parametrize("per_class", [3, 30])  # of 64: both ways of drawing
def test_every_voxel_has_the_same_chance(per_class: int) -> None:
    labels, valid = torch.zeros(1, 1, 8, 8, dtype=torch.long), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    source = generator()
    hits = sum(choose_voxels(labels, per_class, valid, source).bincount(minlength=64) for _ in range(2000))
    expected = 2000 * per_class / 64
    assert isinstance(hits, Tensor)
    assert hits.min() > 0.6 * expected
    assert hits.max() < 1.5 * expected


@pytest.mark.parametrize(("n_hard", "share"), [(40, 10), (4, 4), (250, 16), (256, 20)])
def test_half_comes_from_the_hard_band(n_hard: int, share: int) -> None:
    """20 of 256 voxels: half and half, unless one side is short."""
    labels = torch.zeros(1, 1, 16, 16, dtype=torch.long)
    valid, band = torch.ones(1, 1, 16, 16, dtype=torch.bool), torch.zeros(256, dtype=torch.bool)
    band[:n_hard] = True
    positions = choose_voxels(labels, 20, valid, generator(), band.reshape(labels.shape))
    assert len(set(positions.tolist())) == 20
    if n_hard == 250:
        share = 14  # 6 easy ones
    assert int((positions < n_hard).sum()) == share


def test_nothing_valid_gives_nothing_with_a_graph() -> None:
    f, labels, valid = map_and_labels()
    f = f.clone().requires_grad_(True)
    rows, found = sample_voxels(f, labels, 5, torch.zeros_like(valid), generator())
    assert rows.shape == (0, 2)
    assert found.shape == (0,)
    sup_con(rows, found, 0.1).backward()
    assert f.grad is not None
    assert not f.grad.any()


def test_the_gradient_reaches_the_voxels_that_were_drawn() -> None:
    f = torch.randn(2, 3, 4, 4, 4, generator=generator(), requires_grad=True)
    positions = torch.tensor([5, 64 + 9])
    rows_at(f, positions).sum().backward()
    assert f.grad is not None
    assert f.grad.sum() == 6
    assert torch.equal(rows_at(f, positions)[1], f[1, :, 0, 2, 1])
