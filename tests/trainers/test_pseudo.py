"""Pseudo-labels: argmax and confidence, and the largest component with the border rule."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from autossl.trainers.components.pseudo import keep_largest, pseudo_label


def test_label_and_confidence_of_softmax() -> None:
    q = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]).T.view(1, 3, 1, 2).requires_grad_()
    labels, confidence = pseudo_label(q)
    assert (labels.dtype, confidence.dtype) == (torch.int64, torch.float32)
    assert labels.tolist() == [[[[1, 2]]]]
    assert confidence.flatten().tolist() == pytest.approx([0.5, 0.8])
    assert not confidence.requires_grad


def test_label_and_confidence_of_regions() -> None:
    q = torch.tensor([[0.2, 0.9], [0.5, 0.6]]).view(1, 2, 1, 2)
    labels, confidence = pseudo_label(q, regions=True)
    assert labels.flatten().tolist() == [0.0, 1.0, 0.0, 1.0]
    assert labels.dtype == torch.float32
    assert confidence.flatten().tolist() == pytest.approx([0.8, 0.9, 0.5, 0.6])


def body_and_island(dims: int, size: int = 12) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Labels [1, 1, *S] with a body of class 1 in the middle, and the places of an island and of a border voxel."""
    labels = torch.zeros(1, 1, *[size] * dims, dtype=torch.long)
    labels[(0, 0, *[slice(4, 8)] * dims)] = 1
    island = (0, 0, *[2] * dims)
    at_border = (0, 0, *[9] * (dims - 1), size - 1)
    labels[island] = labels[at_border] = 1
    return labels, island, at_border


@pytest.mark.parametrize("dims", [2, 3])
def test_an_island_goes_and_the_border_is_spared(dims: int) -> None:
    labels, island, at_border = body_and_island(dims)
    before = labels.clone()
    kept = keep_largest(labels, [1])
    assert torch.equal(labels, before), "the input is left alone"
    assert kept.dtype == labels.dtype
    assert (kept[island], kept[at_border]) == (0, 1)
    assert int((kept != labels).sum()) == 1
    whole_case = keep_largest(labels, [1], spare_border=False)
    assert (whole_case[island], whole_case[at_border]) == (0, 0)
    assert int(whole_case.sum()) == 4**dims


def test_every_face_is_a_border() -> None:
    for axis in range(3):
        for end in (0, 11):
            labels, _, _ = body_and_island(3)
            labels[..., 11] = 0
            place = [0, 0, 2, 2, 2]
            labels[tuple(place)] = 0
            place[2 + axis] = end
            labels[tuple(place)] = 1
            assert torch.equal(keep_largest(labels, [1]), labels), (axis, end)
            assert int(keep_largest(labels, [1], spare_border=False).sum()) == 64


def test_an_island_at_the_edge_of_its_bounding_box_is_no_border() -> None:
    labels = torch.zeros(1, 1, 10, 10, dtype=torch.long)
    labels[..., 3:7, 3:7] = 1
    labels[..., 1, 1] = 1
    labels[..., 8, 8] = 1
    assert int(keep_largest(labels, [1]).sum()) == 16


def test_the_largest_one_stays_where_smaller_ones_touch_the_border() -> None:
    labels = torch.zeros(1, 1, 10, 10, dtype=torch.long)
    labels[..., 0, :3] = 1
    labels[..., 3:7, 3:7] = 1
    labels[..., 8, 8] = 1
    kept = keep_largest(labels, [1])
    assert int(kept.sum()) == 3 + 16


def test_diagonal_neighbors_belong_together() -> None:
    labels = torch.zeros(1, 1, 8, 8, dtype=torch.long)
    labels[..., 2:4, 2:4] = 1
    labels[..., 4, 4] = 1
    assert keep_largest(labels, [1]) is labels


@pytest.mark.parametrize("dims", [2, 3])
def test_random_shapes_equal_another_labeling(dims: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        shape = rng.integers(1, 33 if dims == 2 else 12, size=dims)
        mask = rng.random(shape) < rng.uniform(0.05, 0.9)
        components, _ = ndimage.label(mask, np.ones((3,) * dims))
        sizes = np.bincount(components.ravel())[1:]
        kept = keep_largest(torch.from_numpy(mask).long()[None, None], [1], spare_border=False)[0, 0].numpy() > 0
        assert int(kept.sum()) == max(sizes, default=0)
        assert len(np.unique(components[kept])) == min(1, len(sizes)), "one whole component"


def test_only_the_given_classes_are_judged() -> None:
    labels, island, _ = body_and_island(2)
    labels[0, 0, 4:6, 9] = 2
    labels[0, 0, 9, 5] = 2
    assert keep_largest(labels, [2])[island] == 1, "class 1 may have two bodies"
    assert keep_largest(labels, [2])[0, 0, 9, 5] == 0
    both = keep_largest(labels, [1, 2])
    assert (both[island], both[0, 0, 9, 5]) == (0, 0)
    for absent in ([], [3]):
        assert keep_largest(labels, absent) is labels


def test_samples_are_judged_apart() -> None:
    labels = torch.zeros(2, 1, 10, 10, dtype=torch.long)
    labels[0, 0, 2:8, 2:8] = 1
    labels[1, 0, 4, 4] = 1
    assert keep_largest(labels, [1]) is labels


def test_regions_are_judged_channel_by_channel() -> None:
    labels, island, at_border = body_and_island(2)
    regions = torch.cat([labels, labels], 1).float()
    kept = keep_largest(regions, [1])
    assert kept.dtype == torch.float32
    assert torch.equal(kept[:, 0], regions[:, 0])
    assert (kept[0, 1, 2, 2], kept[(0, 1, *at_border[2:])]) == (0, 1)
    assert kept[0, 0, 2, 2] == 1
    assert keep_largest(regions, [0])[island] == 0


def test_the_background_is_no_class() -> None:
    with pytest.raises(ValueError, match="background"):
        keep_largest(torch.zeros(1, 1, 4, 4, dtype=torch.long), [0, 1])
