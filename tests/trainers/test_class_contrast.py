"""Cells, their labels, the voxels that are drawn, and the contrast with a bank."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from autossl.trainers.components.banks import ClassBank
from autossl.trainers.components.class_contrast import (
    Topic,
    cell_labels,
    cell_rows,
    cells_per_axis,
    contrast_with_bank,
    voxel_rows,
)
from autossl.trainers.components.contrast import Rows


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def topic_of(labels: Tensor, n_classes: int = 3, reliable: Tensor | None = None, first: int = 0) -> Topic:
    return Topic(labels, torch.ones_like(labels, dtype=torch.bool) if reliable is None else reliable, n_classes, first)


@pytest.mark.parametrize(
    ("shape", "spacing", "positions", "expected"),
    [
        ((64, 64), (1.0, 1.0), (8, 8), (4, 4)),
        ((20, 512), (1.0, 1.0), (5, 64), (2, 8)),
        ((64, 64), (1.0, 1.0), (3, 8), (1, 4)),
        ((48, 48, 48), (1.0, 1.0, 2.0), (6, 6, 6), (3, 3, 3)),
        ((16, 128, 128), (4.0, 1.0, 1.0), (8, 16, 16), (4, 8, 8)),  # half the extent through plane
        ((4, 256, 256), (4.0, 1.0, 1.0), (4, 32, 32), (1, 8, 8)),
    ],
)
def test_cells_per_axis(
    shape: tuple[int, ...], spacing: tuple[float, ...], positions: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert cells_per_axis(shape, spacing, positions) == expected


@pytest.mark.parametrize(
    ("counts", "n_reliable", "expected"),
    [
        ({2: 40, 0: 60}, 100, 2),
        ({2: 10, 0: 90}, 100, -1),
        ({0: 100}, 96, 0),
        ({0: 100}, 94, -1),
        ({1: 31, 2: 32, 0: 37}, 100, 2),
        ({2: 30, 0: 70}, 100, 2),
        ({2: 29, 0: 71}, 100, -1),
        ({2: 100}, 20, -1),
    ],
)
def test_what_a_cell_of_a_hundred_voxels_stands_for(counts: dict[int, int], n_reliable: int, expected: int) -> None:
    """Four cells, three of them background: each for itself."""
    labels = torch.zeros(1, 1, 20, 20, dtype=torch.long)
    content = torch.cat([torch.full((n,), value) for value, n in counts.items()])
    labels[0, 0, :10, 10:] = content.view(10, 10)
    reliable = torch.ones(1, 1, 20, 20, dtype=torch.bool)
    reliable[0, 0, :10, 10:] = (torch.arange(100) < n_reliable).view(10, 10)
    assert cell_labels(topic_of(labels, 3, reliable), (2, 2)).tolist() == [[[[0, expected], [0, 0]]]]


def test_voxels_outside_the_image_are_no_part_of_a_cell() -> None:
    """Padding is not reliable either: without the rule a cell at the edge of the image would stand for nothing."""
    labels = torch.zeros(1, 1, 10, 40, dtype=torch.long)
    labels[..., 10:14] = 1
    inside = torch.zeros(1, 1, 10, 40, dtype=torch.bool)
    for first, n in ((0, 10), (10, 8), (20, 5), (30, 4)):
        inside[..., first : first + n] = True
    topic = topic_of(labels, 2, inside)
    assert cell_labels(topic, (1, 4)).tolist() == [[[[0, 1, -1, -1]]]]
    assert cell_labels(topic._replace(inside=inside), (1, 4)).tolist() == [[[[0, 1, 0, -1]]]]
    doubtful = inside.clone()
    doubtful[..., 20:22] = False  # within the image, and not known
    assert cell_labels(topic_of(labels, 2, doubtful)._replace(inside=inside), (1, 4)).tolist() == [[[[0, 1, -1, -1]]]]


def test_rows_of_cells_and_voxels_of_two_networks() -> None:
    labels = torch.zeros(1, 1, 8, 8, dtype=torch.long)
    labels[..., 4:] = 1
    topic = topic_of(labels, 2, first=6)
    grids = [torch.arange(4.0).view(1, 1, 2, 2) + 10 * network for network in range(2)]
    rows = cell_rows(grids, topic)
    assert rows.e[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    assert rows.labels.tolist() == [6, 7, 6, 7] * 2
    maps = [torch.arange(64.0).view(1, 1, 8, 8) + 100 * network for network in range(2)]
    rows = voxel_rows(maps, topic, torch.zeros_like(topic.reliable), generator())
    assert len(rows.labels) == 128
    assert torch.equal(rows.e[:64] + 100, rows.e[64:]), "the same places"
    assert torch.equal(rows.labels[:64] == 7, rows.e[:64, 0] % 8 >= 4)


def test_voxels_are_reliable_bounded_and_half_of_them_hard() -> None:
    labels = (torch.arange(64 * 64).view(1, 1, 64, 64) % 2).long()
    places = torch.arange(64.0 * 64).view(1, 1, 64, 64)
    reliable = places < 3000
    band = places < 1000
    rows = voxel_rows([places], topic_of(labels, 2, reliable), band, generator())
    assert rows.e.max() < 3000
    for value in (0, 1):
        mine = rows.e[rows.labels == value, 0]
        assert len(mine) == 256
        assert int((mine < 1000).sum()) == 128
        assert (mine % 2 == value).all()
    again = voxel_rows([places], topic_of(labels, 2, reliable), band, generator())
    assert torch.equal(rows.e, again.e)
    assert not torch.equal(rows.e, voxel_rows([places], topic_of(labels, 2, reliable), band, generator(1)).e)


@pytest.mark.parametrize(
    ("n_classes", "present", "per_class"), [(8, 8, 256), (10, 10, 204), (16, 16, 128), (40, 16, 128)]
)
def test_many_classes_have_fewer_voxels_each(n_classes: int, present: int, per_class: int) -> None:
    labels = (torch.arange(128 * 128).view(1, 1, 128, 128) % n_classes).long()
    rows = voxel_rows([labels.float()], topic_of(labels, n_classes), torch.zeros_like(labels).bool(), generator())
    assert rows.labels.unique(return_counts=True)[1].tolist() == [per_class] * present


def test_closed_form_with_the_background_counting_half() -> None:
    """Two orthogonal classes of two rows each: 0.5514 for every row, whatever the classes weigh."""
    e = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], requires_grad=True)
    rows = Rows(e, torch.tensor([0, 0, 1, 1]))
    bank = ClassBank(2, 2, 4)
    topic = topic_of(torch.zeros(1, 1, 1, 1, dtype=torch.long), 2)
    assert contrast_with_bank(rows, bank, topic, 1.0).item() == pytest.approx(0.5514, abs=1e-4)
    assert contrast_with_bank(rows, bank, topic, 1e6).item() == pytest.approx(math.log(3), abs=1e-4)
    bank.push(torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
    background, foreground = math.log(math.e + 3) - 1, math.log(2 * math.e + 2) - 1
    loss = contrast_with_bank(rows, bank, topic, 1.0)
    assert loss.item() == pytest.approx((0.5 * background + foreground) / 1.5, abs=1e-5)
    loss.backward()
    assert e.grad is not None
    assert e.grad.any()


def test_another_regions_rows_do_not_take_part_and_one_class_costs_nothing() -> None:
    bank = ClassBank(4, 2, 4)
    bank.push(torch.eye(2), torch.tensor([0, 1]))
    e = torch.tensor([[1.0, 0.0], [0.6, 0.8]], requires_grad=True)
    second = Topic(torch.zeros(1, 1, 1, 1), torch.ones(1), 2, first=2)
    loss = contrast_with_bank(Rows(e, torch.tensor([2, 2])), bank, second, 0.1)
    assert loss.item() == 0
    assert loss.requires_grad
    empty = contrast_with_bank(Rows(e[:0], torch.zeros(0, dtype=torch.long)), bank, second, 0.1)
    assert empty.item() == 0
    bank.push(torch.eye(2)[1:], torch.tensor([3]))
    assert contrast_with_bank(Rows(e, torch.tensor([2, 2])), bank, second, 0.1).item() > 0
