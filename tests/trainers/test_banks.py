"""Class banks and class moments."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autossl.trainers.components.banks import ClassBank, ClassMoments


def numbered(*values: float) -> Tensor:
    """Rows [n, 2] that can be told apart."""
    return torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, 2).clone()


def first_column(rows: Tensor) -> list[float]:
    return list(rows[:, 0].tolist())


def reloaded(module: nn.Module, empty: nn.Module) -> None:
    """Through a tensors-only file into `empty`."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    empty.load_state_dict(torch.load(file, weights_only=True))


# --------------------------------------------------------------------------------------------------------------- bank


def test_the_oldest_rows_leave_first() -> None:
    bank = ClassBank(n_classes=2, dim=2, size=3)
    bank.push(numbered(1, 2, 10), torch.tensor([0, 0, 1]))
    bank.push(numbered(3, 4), torch.tensor([0, 0]))
    assert first_column(bank.sample(0).rows) == [2, 3, 4]
    assert first_column(bank.sample(0, 2).rows) == [3, 4]
    assert first_column(bank.sample(1).rows) == [10]
    assert bank.count.tolist() == [3, 1]


def test_more_rows_than_there_is_room() -> None:
    bank = ClassBank(n_classes=1, dim=2, size=3)
    bank.push(numbered(0), torch.tensor([0]))
    bank.push(numbered(1, 2, 3, 4, 5), torch.zeros(5, dtype=torch.long))
    assert first_column(bank.sample(0).rows) == [3, 4, 5]
    bank.push(numbered(6), torch.tensor([0]))
    assert first_column(bank.sample(0).rows) == [4, 5, 6]


def test_an_empty_class_gives_no_rows() -> None:
    bank = ClassBank(n_classes=2, dim=2, size=3, n_labels=1)
    bank.push(numbered(1), torch.tensor([0]), torch.tensor([[7]]))
    rows, classes, labels = bank.sample(1, 5)
    assert (rows.shape, classes.shape, labels.shape) == ((0, 2), (0,), (0, 1))
    assert ClassBank(2, 4, 3).everything().rows.shape == (0, 4)


def test_labels_stay_with_their_rows() -> None:
    bank = ClassBank(n_classes=2, dim=2, size=2, n_labels=2)
    classes = torch.tensor([1, 0, 1, 1])
    bank.push(numbered(1, 2, 3, 4), classes, torch.tensor([[1, 10], [2, 20], [3, 30], [4, 2**62]]))
    everything = bank.everything()
    assert first_column(everything.rows) == [2, 4, 3] or first_column(everything.rows) == [2, 3, 4]
    assert everything.labels[:, 0].tolist() == [int(v) for v in first_column(everything.rows)]
    assert everything.classes.tolist() == [0, 1, 1]
    assert bank.sample(1).labels.tolist() == [[3, 30], [4, 2**62]]


def test_labels_are_given_where_the_bank_keeps_them() -> None:
    with pytest.raises(ValueError, match="labels missing: the bank keeps 2"):
        ClassBank(1, 2, 3, n_labels=2).push(numbered(1), torch.tensor([0]))
    with pytest.raises(ValueError, match="labels given: the bank keeps 0"):
        ClassBank(1, 2, 3).push(numbered(1), torch.tensor([0]), torch.tensor([[1]]))


def test_random_samples_are_distinct_and_seeded() -> None:
    bank = ClassBank(n_classes=1, dim=2, size=50)
    bank.push(numbered(*range(50)), torch.zeros(50, dtype=torch.long))
    first, again, other = (
        first_column(bank.sample(0, 10, torch.Generator().manual_seed(seed)).rows) for seed in (0, 0, 1)
    )
    assert len(set(first)) == 10
    assert first == again != other


def test_rows_are_detached_copies() -> None:
    bank = ClassBank(n_classes=1, dim=2, size=2)
    e = numbered(1, 2).requires_grad_(True)
    bank.push(e, torch.tensor([0, 0]))
    kept, all_kept = bank.sample(0).rows, bank.everything().rows
    assert not kept.requires_grad
    bank.push(numbered(3, 4), torch.tensor([0, 0]))
    assert first_column(kept) == first_column(all_kept) == [1, 2]


def test_rows_that_are_not_finite_stay_out() -> None:
    bank = ClassBank(n_classes=2, dim=2, size=3)
    bank.push(numbered(1, float("nan"), float("inf")), torch.tensor([0, 0, 1]))
    assert bank.count.tolist() == [1, 0]


def test_the_bank_is_buffers_and_survives_a_checkpoint() -> None:
    bank, other = (ClassBank(n_classes=2, dim=2, size=3, n_labels=1) for _ in range(2))
    assert not list(bank.parameters())
    for start in (0, 4):
        bank.push(numbered(*range(start, start + 4)), torch.tensor([0, 1, 0, 0]), torch.arange(4)[:, None])
    reloaded(bank, other)
    for one in (bank, other):
        one.push(numbered(8), torch.tensor([0]), torch.tensor([[5]]))
    assert torch.equal(bank.sample(0).rows, other.sample(0).rows)
    assert torch.equal(bank.everything().labels, other.everything().labels)


# ------------------------------------------------------------------------------------------------------------ moments


def stream(seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Features [n, 3] in unequal batches; class 1 misses from some, class 2 from all."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (5, 1, 30, 12)
    f = [torch.randn(n, 3, generator=generator) * torch.tensor([1.0, 2.0, 0.5]) + 4 for n in sizes]
    classes = [torch.randint(2, (n,), generator=generator) for n in sizes]
    classes[1][:] = 0
    return f, classes


@pytest.mark.parametrize("kind", ["full", "diag", "none"])
def test_exact_counting_equals_the_moments_of_everything(kind: str) -> None:
    moments = ClassMoments(3, 3, cov=kind, decay=None)  # type: ignore[arg-type]
    f, classes = stream()
    for rows, mine in zip(f, classes, strict=True):
        moments.update(rows, mine)
    for value in (0, 1):
        expected = torch.cat(f)[torch.cat(classes) == value].double().numpy()
        covariance = np.cov(expected.T, bias=True)
        np.testing.assert_allclose(moments.mean[value], expected.mean(0), rtol=1e-5)
        if kind == "full":
            np.testing.assert_allclose(moments.cov[value], covariance, atol=1e-5)
        elif kind == "diag":
            np.testing.assert_allclose(moments.cov[value], np.diag(covariance), atol=1e-5)
        assert moments.count[value] == len(expected)
    assert moments.count[2] == 0
    assert not moments.mean[2].any()


def test_decay_in_one_dimension() -> None:
    moments = ClassMoments(1, 1, decay=0.75)
    zeros = torch.zeros(2, dtype=torch.long)
    moments.update(torch.tensor([[1.0], [3.0]]), zeros)
    assert (moments.mean.item(), moments.cov.item()) == (2.0, 1.0), "the first observation initializes"
    moments.update(torch.tensor([[6.0], [6.0]]), zeros)
    assert moments.mean.item() == pytest.approx(0.75 * 2 + 0.25 * 6)
    assert moments.cov.item() == pytest.approx(0.75 * 1 + 0.25 * 0 + 0.75 * 0.25 * 16)
    assert moments.count.item() == 4


def test_the_pooled_covariance_is_that_of_the_mixture() -> None:
    """Equal batches and m = 1/2: the same as counting."""
    halves = ClassMoments(1, 3, decay=0.5)
    exact = ClassMoments(1, 3, decay=None)
    f = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0))
    for moments in (halves, exact):
        for rows in f:
            moments.update(rows, torch.zeros(20, dtype=torch.long))
    torch.testing.assert_close(halves.cov, exact.cov)
    torch.testing.assert_close(halves.cov, halves.cov.mT)
    assert (torch.linalg.eigvalsh(halves.cov) > 0).all()


def test_moments_hold_no_gradient_and_skip_what_is_not_finite() -> None:
    moments = ClassMoments(2, 3)
    f = torch.ones(3, 3, requires_grad=True)
    spoiled = f * torch.tensor([[1.0], [float("nan")], [float("inf")]])
    moments.update(spoiled, torch.tensor([0, 0, 1]))
    assert moments.count.tolist() == [1, 0]
    assert not any(value.requires_grad for value in (moments.mean, moments.cov))
    assert torch.isfinite(moments.mean).all()


def test_moments_are_float32_under_autocast() -> None:
    f = 100 + torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    plain, cast = ClassMoments(1, 3), ClassMoments(1, 3)
    plain.update(f, torch.zeros(50, dtype=torch.long))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast.update(f, torch.zeros(50, dtype=torch.long))
    assert torch.equal(plain.cov, cast.cov)


def test_moments_survive_a_checkpoint() -> None:
    moments, other = ClassMoments(2, 3), ClassMoments(2, 3)
    f, classes = stream()
    moments.update(f[2], classes[2])
    reloaded(moments, other)
    for one in (moments, other):
        one.update(f[3], classes[3])
    assert torch.equal(moments.mean, other.mean)
    assert torch.equal(moments.cov, other.cov)
