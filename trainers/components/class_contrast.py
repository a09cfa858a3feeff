"""Contrast of classes at two scales: cells of a regular grid over the patch, and single voxels.

Labels may be partly unreliable. Rows of several networks at the same place enter together, so that the embedding of
the other network is a positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from autossl.trainers.components.banks import ClassBank
from autossl.trainers.components.contrast import Rows, choose_voxels, has_negatives, rows_at, sup_con
from autossl.trainers.components.losses import connected_zero, one_hot
from autossl.trainers.components.masks import through_plane_axis

FEWEST_CELLS, MOST_CELLS = 2, 8
"""Per axis."""
FEWEST_POSITIONS = 4
"""An axis of the feature map with fewer positions is one cell."""
FOREGROUND_SHARE, BACKGROUND_SHARE = 0.3, 0.95
"""Of a cell that stands for the class, of what of it lies within the image."""
LEAST_INSIDE = 0.5
"""Of a cell that is used."""
UNUSED = -1
VOXELS_PER_CLASS, MOST_VOXELS = 256, 2048
"""Drawn in a step, of one class and of all."""
MOST_CLASSES = 16
"""Classes whose voxels are drawn in one step."""
MOST_BANK_ROWS = 4096
"""Rows of the bank that a step looks at."""
BACKGROUND_WEIGHT = 0.5


class Topic(NamedTuple):
    """Labels that are contrasted with each other: the classes, or one region and what is outside of it."""

    labels: Tensor
    """Integers [N, 1, *S]; 0 is the background."""
    reliable: Tensor
    """Boolean [N, 1, *S]: the label is known."""
    n_classes: int
    first: int = 0
    """Number of the background among the classes of the bank."""
    inside: Tensor | None = None
    """Boolean [N, 1, *S]: within the image; None: everywhere."""


def cells_per_axis(
    shape: Sequence[int], spacing: Sequence[float], positions: Sequence[int], side: int = 16
) -> tuple[int, ...]:
    """Cells of about `side` voxels, 2 to 8 on each axis; through plane (coarse slices) as many as its extent deserves.

    Args:
        shape: the patch S, in voxels.
        spacing: mm per axis.
        positions: size of the feature map that is divided; no axis gets more cells than positions.
        side: voxels.
    """
    counts = [min(MOST_CELLS, max(FEWEST_CELLS, round(size / side))) for size in shape]
    flat = through_plane_axis(spacing)
    if flat is not None:
        extent = [size * step for size, step in zip(shape, spacing, strict=True)]
        widest = max((axis for axis in range(len(shape)) if axis != flat), key=lambda axis: extent[axis])
        counts[flat] = min(MOST_CELLS, max(1, round(counts[widest] * extent[flat] / extent[widest])))
    return tuple(
        1 if there < FEWEST_POSITIONS else min(count, there) for count, there in zip(counts, positions, strict=True)
    )


@torch.no_grad()
def cell_labels(topic: Topic, cells: Sequence[int]) -> Tensor:
    """What each cell stands for, int64 [N, 1, *cells]; -1: nothing, the cell is not used.

    The most frequent foreground class where it covers 30 % of the cell, since cells of foreground are seldom pure;
    else the background where it covers 95 %. Unreliable voxels count for no class, but as a part of the cell; voxels
    outside the image are no part of it, and a cell that lies outside by more than half is not used.
    """
    members = one_hot(topic.labels.clamp(0, topic.n_classes - 1), topic.n_classes) * topic.reliable
    pooled: Any = functional.adaptive_avg_pool2d if members.ndim == 4 else functional.adaptive_avg_pool3d
    part = torch.ones_like(members[:, :1]) if topic.inside is None else topic.inside.to(members)
    inside = pooled(part, tuple(cells))
    # a share that is the limit counts, however it was rounded
    shares = pooled(members * part, tuple(cells)) / inside.clamp(min=LEAST_INSIDE) + 1e-6
    background = torch.where(shares[:, :1] >= BACKGROUND_SHARE, 0, UNUSED)
    most, which = shares[:, 1:].max(1, keepdim=True)
    return torch.where(inside < LEAST_INSIDE, UNUSED, torch.where(most >= FOREGROUND_SHARE, which + 1, background))


def cell_rows(grids: Sequence[Tensor], topic: Topic) -> Rows:
    """Embeddings of the cells that stand for a class, from one map [N, D, *cells] per network."""
    labels = cell_labels(topic, grids[0].shape[2:]).flatten()
    used = (labels != UNUSED).nonzero()[:, 0]
    return _rows(grids, labels, used, topic)


def voxel_rows(maps: Sequence[Tensor], topic: Topic, band: Tensor, generator: torch.Generator) -> Rows:
    """Vectors (not embeddings yet) at up to 256 reliable voxels of each class, from one map [N, c, *S] per network.

    Half of them come from the band [N, 1, *S], as far as there are enough. With many classes fewer of each are drawn,
    and of more than 16 classes a random choice, so that the number of pairs is bounded.
    """
    labels, allowed, n_classes = topic.labels, topic.reliable, topic.n_classes
    if n_classes > MOST_CLASSES:
        order = torch.randperm(n_classes, generator=generator, device=generator.device)
        allowed = allowed & torch.isin(labels, order[:MOST_CLASSES].to(labels.device))
    per_class = min(VOXELS_PER_CLASS, MOST_VOXELS // min(n_classes, MOST_CLASSES))
    chosen = choose_voxels(labels, per_class, allowed, generator, band)
    return _rows(maps, labels.flatten(), chosen, topic)


def contrast_with_bank(rows: Rows, bank: ClassBank, topic: Topic, tau: float) -> Tensor:
    """`sup_con` against each other and the bank, mean per class first; the background counts half.

    Where neither rows nor bank hold a second class there is nothing to be told apart: a connected zero.
    """
    newest = min(bank.size, max(1, MOST_BANK_ROWS // topic.n_classes))
    stored = [bank.sample(topic.first + number, newest) for number in range(topic.n_classes)]
    remembered = Rows(torch.cat([s.rows for s in stored]), torch.cat([s.classes for s in stored]))
    if not has_negatives(rows, remembered):
        return connected_zero(rows.e)
    importance = torch.ones(len(bank.pushed), device=rows.e.device)
    importance[topic.first] = BACKGROUND_WEIGHT
    return sup_con(rows.e, rows.labels, tau, remembered, class_weights=importance)


def _rows(maps: Sequence[Tensor], labels: Tensor, positions: Tensor, topic: Topic) -> Rows:
    """The same positions of all maps, one map after the other, with their class in the bank."""
    e = torch.cat([rows_at(features, positions) for features in maps])
    return Rows(e, (labels[positions].long() + topic.first).repeat(len(maps)))
