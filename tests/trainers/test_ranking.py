"""The ranked list loss: closed forms, who acts, and what it does to embeddings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autossl.trainers.components.contrast import Rows
from autossl.trainers.components.ranking import RankedListLoss


def at_distance(*distances: float) -> Tensor:
    """Unit vectors so far from (1, 0)."""
    angles = torch.tensor([2 * math.asin(d / 2) for d in distances])
    return torch.stack([angles.cos(), angles.sin()], 1)


ANCHOR = Rows(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))


def loss_of(distances: tuple[float, ...], labels: tuple[int, ...], **limits: float) -> float:
    return RankedListLoss(**limits)(ANCHOR, Rows(at_distance(*distances), torch.tensor(labels))).losses.item()


@pytest.mark.parametrize(
    ("distances", "labels", "expected"),
    [
        ((1.0,), (1,), 0.2),
        ((0.7,), (1,), 0.0),
        ((1.0, 1.4, 0.3), (1, 1, 1), 0.4),  # the mean over those that are too far
        ((0.2, 1.0), (0, 0), 0.99973),
        ((1.2001, 1.9), (0, 2), 0.0),
        ((0.2, 1.0, 1.0), (0, 0, 1), 0.99973 + 0.2),
        ((), (), 0.0),
    ],
)
def test_closed_forms(distances: tuple[float, ...], labels: tuple[int, ...], expected: float) -> None:
    assert loss_of(distances, labels) == pytest.approx(expected / 2, abs=1e-5)


def test_nearest_negatives_count_most() -> None:
    rows = Rows(at_distance(0.2, 1.0).requires_grad_(), torch.tensor([0, 0]))
    RankedListLoss()(ANCHOR, rows).losses.sum().backward()
    assert rows.e.grad is not None
    near, far = rows.e.grad.norm(dim=1).tolist()
    assert far / near == pytest.approx(0.00034 / 0.99966 * 0.2 / 1.0, rel=0.03)  # ∂d/∂e is 1/d long
    assert loss_of((0.2, 1.0), (0, 0), sharpness=0.0) == pytest.approx((1.0 + 0.2) / 2 / 2, abs=1e-5)


def test_limits_are_the_given_ones() -> None:
    assert loss_of((1.0,), (1,), boundary=1.0, margin=0.5) == pytest.approx(0.25, abs=1e-5)
    assert loss_of((0.9,), (0,), boundary=1.0) == pytest.approx(0.05, abs=1e-5)


def test_pairs_that_do_not_count() -> None:
    candidates = Rows(torch.cat([ANCHOR.e, at_distance(1.0, 0.2)]), torch.tensor([1, 1, 0]))
    counted = torch.tensor([[False, True, False]])
    ranked = RankedListLoss()(ANCHOR, candidates, counted)
    assert ranked.losses.item() == pytest.approx(0.1, abs=1e-5)
    assert ranked.acting.tolist() == [[False, True, False]]


def test_equal_and_opposite_rows_have_finite_gradients() -> None:
    e = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    rows = Rows(e, torch.tensor([0, 1, 1]))
    RankedListLoss()(rows, rows, ~torch.eye(3, dtype=torch.bool)).losses.sum().backward()
    assert e.grad is not None
    assert e.grad.isfinite().all()


def test_rows_that_are_not_finite_are_not_hidden() -> None:
    rows = Rows(torch.tensor([[1.0, 0.0], [math.nan, 0.0]]), torch.tensor([1, 0]))
    assert RankedListLoss()(ANCHOR, rows).losses.isnan().all()


def test_half_precision_is_computed_in_single() -> None:
    rows = Rows(at_distance(0.2, 1.0).half(), torch.tensor([0, 1]))
    with torch.autocast("cpu", torch.bfloat16):
        ranked = RankedListLoss()(ANCHOR, rows)
    assert ranked.losses.dtype == torch.float32


def test_two_classes_are_told_apart_in_training() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = nn.Parameter(torch.randn(40, 16, generator=generator))
    labels = torch.arange(40) % 2
    optimizer = torch.optim.Adam([weights], 0.05)
    loss, counted = RankedListLoss(), ~torch.eye(40, dtype=torch.bool)

    def distances() -> tuple[float, float]:
        e = functional.normalize(weights.detach(), dim=1)
        d = torch.cdist(e, e)
        same = labels[:, None] == labels
        return float(d[same & counted].mean()), float(d[~same].mean())

    assert distances()[0] > 1.2
    for _ in range(150):
        rows = Rows(functional.normalize(weights, dim=1), labels)
        optimizer.zero_grad()
        loss(rows, rows, counted).losses.mean().backward()
        optimizer.step()
    within, between = distances()
    assert within < 0.8
    assert between > 1.2
