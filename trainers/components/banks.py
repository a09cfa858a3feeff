"""What methods remember about features between steps. Buffers only, so both belong into `Parts.memory`."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn


class StoredRows(NamedTuple):
    """Copies of rows of a bank: they stay as they are when the bank moves on."""

    rows: Tensor
    """Float32 [n, dim], without gradient."""
    classes: Tensor
    """Int64 [n]."""
    labels: Tensor
    """Int64 [n, n_labels]: what was pushed along with the rows."""


class ClassBank(nn.Module):
    """A ring of the newest rows of each class: first in, first out.

    Args:
        n_classes: classes, 0..n_classes-1.
        dim: length of a row.
        size: rows per class.
        n_labels: integers that are kept with each row.
    """

    rows: Tensor
    labels: Tensor
    pushed: Tensor

    def __init__(self, n_classes: int, dim: int, size: int, n_labels: int = 0) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("rows", torch.zeros(n_classes, size, dim))
        self.register_buffer("labels", torch.zeros(n_classes, size, n_labels, dtype=torch.long))
        self.register_buffer("pushed", torch.zeros(n_classes, dtype=torch.long))

    @property
    def count(self) -> Tensor:
        """Rows that are there, int64 [n_classes]."""
        return self.pushed.clamp(max=self.size)

    @torch.no_grad()
    def push(self, e: Tensor, classes: Tensor, labels: Tensor | None = None) -> None:
        """Takes in rows [n, dim] of classes [n], detached and in order; rows that are not finite are left out.

        Raises:
            ValueError: labels [n, n_labels] are missing, or given to a bank that keeps none.
        """
        n_labels = self.labels.shape[2]
        if (labels is None) != (n_labels == 0):
            raise ValueError(f"labels {'missing' if labels is None else 'given'}: the bank keeps {n_labels} per row")
        finite = torch.isfinite(e).all(1)
        for value in torch.unique(classes[finite]).tolist():
            mine = (finite & (classes == value)).nonzero()[:, 0]
            ages = int(self.pushed[value]) + torch.arange(len(mine), device=mine.device)
            mine, slots = mine[-self.size :], ages[-self.size :] % self.size
            self.rows[value, slots] = e[mine].to(self.rows)
            if labels is not None:
                self.labels[value, slots] = labels[mine].to(self.labels)
            self.pushed[value] = ages[-1] + 1

    def sample(self, c: int, n: int | None = None, generator: torch.Generator | None = None) -> StoredRows:
        """Up to n rows of class c: drawn without replacement with a generator, else the newest, oldest of them first.

        An empty class gives rows [0, dim]; n=None gives all.
        """
        there = int(self.count[c])
        n = there if n is None else min(n, there)
        device = self.rows.device
        slots = (int(self.pushed[c]) - there + torch.arange(there, device=device)) % self.size
        if generator is None:
            slots = slots[there - n :]
        else:
            order = torch.randperm(there, generator=generator, device=generator.device)[:n]
            slots = slots[order.to(device)]
        classes = torch.full((n,), c, dtype=torch.long, device=device)
        return StoredRows(self.rows[c, slots], classes, self.labels[c, slots])

    def everything(self) -> StoredRows:
        """All rows of all classes, classes ascending."""
        filled = torch.arange(self.size, device=self.rows.device) < self.count[:, None]
        return StoredRows(self.rows[filled], filled.nonzero()[:, 0], self.labels[filled])


class ClassMoments(nn.Module):
    """Running mean and covariance (divided by n, not n - 1) of the features of each class.

    The moments of a batch (μ_B, Σ_B) are pooled with those so far: with m = `decay`,
    μ ← m·μ + (1-m)·μ_B and Σ ← m·Σ + (1-m)·Σ_B + m·(1-m)·(μ_B-μ)(μ_B-μ)ᵀ, which is the mixture of both exactly. The
    first observation of a class initializes it.

    Args:
        n_classes: classes, 0..n_classes-1.
        dim: features.
        cov: "full" [C, A, A], "diag" [C, A], or "none" [C, 0] for the mean alone.
        decay: m; None: exact counting, m = n so far / (n so far + n of the batch), so that the result equals the
            moments of everything seen.
    """

    mean: Tensor
    cov: Tensor
    count: Tensor

    def __init__(
        self, n_classes: int, dim: int, cov: Literal["full", "diag", "none"] = "full", decay: float | None = 0.99
    ) -> None:
        super().__init__()
        self.kind = cov
        self.decay = decay
        shape = {"full": (n_classes, dim, dim), "diag": (n_classes, dim), "none": (n_classes, 0)}[cov]
        self.register_buffer("mean", torch.zeros(n_classes, dim))
        self.register_buffer("cov", torch.zeros(shape))
        self.register_buffer("count", torch.zeros(n_classes, dtype=torch.long))

    @torch.no_grad()
    def update(self, f: Tensor, classes: Tensor) -> None:
        """Takes in features [n, A] of classes [n], detached; rows that are not finite are left out."""
        with torch.autocast(f.device.type, enabled=False):
            finite = torch.isfinite(f).all(1)
            for value in torch.unique(classes[finite]).tolist():
                self._merge(value, f[finite & (classes == value)].to(self.mean))

    def _merge(self, value: int, rows: Tensor) -> None:
        before, n = int(self.count[value]), len(rows)
        old_share = before / (before + n) if self.decay is None or before == 0 else self.decay
        batch_mean = rows.mean(0)
        moved = batch_mean - self.mean[value]
        if self.kind != "none":
            centered = rows - batch_mean
            full = self.kind == "full"
            spread = centered.T @ centered / n if full else centered.square().mean(0)
            between = torch.outer(moved, moved) if full else moved.square()
            self.cov[value].mul_(old_share).add_((1 - old_share) * (spread + old_share * between))
        self.mean[value].add_((1 - old_share) * moved)
        self.count[value] += n
