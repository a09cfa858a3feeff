"""Back to the original grid: the values of scipy's zoom, bounded memory, and every array where it belongs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from autossl.data.labels import LabelSchema
from autossl.data.probabilities import labels_of
from autossl.inference import restore as restore_module
from autossl.inference.predictor import Slab
from autossl.inference.restore import OriginalGrid, SlabResampler, Wanted, decide_labels, restore

LABELS = LabelSchema({"background": (0,), "organ": (1,), "tumor": (5,)})
REGIONS = LabelSchema({"background": (0,), "whole": (1, 2), "core": (2,)}, regions_class_order=(1, 2))


def slabs_of(logits: Tensor, cuts: Sequence[int] = ()) -> Iterator[Slab]:
    """Logits [F,K,z,y,x] in pieces that start at the cuts."""
    edges = [0, *cuts, logits.shape[2]]
    for low, high in pairwise(edges):
        yield Slab(low, logits[:, :, low:high])


def resampled(logits: Tensor, target: Sequence[int], axis: int | None, cuts: Sequence[int] = ()) -> Tensor:
    resampler = SlabResampler(logits.shape[2:], target, axis)
    blocks = [(start, block.clone()) for slab in slabs_of(logits, cuts) for start, block in resampler.feed(slab)]
    assert [start for start, _ in blocks] == np.cumsum([0, *(b.shape[2] for _, b in blocks)])[:-1].tolist()
    return torch.cat([block for _, block in blocks], 2)


def zoomed(volume: npt.NDArray[np.floating], target: Sequence[int]) -> npt.NDArray[np.floating]:
    factors = [new / old for old, new in zip(volume.shape, target, strict=True)]
    return ndimage.zoom(volume.astype(float), factors, order=1, mode="nearest", grid_mode=True)


@pytest.mark.parametrize("target", [(12, 20, 15), (5, 9, 7), (30, 4, 11), (9, 10, 11), (1, 1, 1)])
@pytest.mark.parametrize("cuts", [(), (4,), (1, 2, 3, 4, 5, 6, 7, 8)])
def test_linear_resampling_equals_scipys_however_the_rows_arrive(
    target: tuple[int, int, int], cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore_module, "ELEMENTS_AT_ONCE", 2500)
    logits = torch.randn(1, 2, 9, 10, 11)
    result = resampled(logits, target, None, cuts)
    for k in range(2):
        np.testing.assert_allclose(result[0, k].numpy(), zoomed(logits[0, k].numpy(), target), atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("target", [(12, 20, 15), (5, 4, 7)])
@pytest.mark.parametrize("cuts", [(), (3, 4)])
def test_a_coarse_axis_takes_the_nearest_slice(axis: int, target: tuple[int, int, int], cuts: tuple[int, ...]) -> None:
    logits = torch.randn(1, 1, 9, 10, 11)
    volume = logits[0, 0].numpy()
    places = volume.shape[axis] / target[axis] * (np.arange(target[axis]) + 0.5) - 0.5
    in_plane = list(target)
    in_plane[axis] = volume.shape[axis]
    slices = np.clip(np.floor(places + 0.5), 0, volume.shape[axis] - 1).astype(int)
    expected = zoomed(volume, in_plane).take(slices, axis=axis)
    np.testing.assert_allclose(resampled(logits, target, axis, cuts)[0, 0].numpy(), expected, atol=1e-5)


def test_the_same_grid_gives_the_same_numbers() -> None:
    logits = torch.randn(2, 3, 6, 5, 4)
    assert torch.equal(resampled(logits, (6, 5, 4), None, (2, 5)), logits)


def test_labels_are_the_largest_logit_and_ties_go_to_the_first() -> None:
    logits = torch.tensor([[1.0, 0.0, 0.0, 2.0], [1.0, 3.0, 0.0, 1.0], [0.0, 2.0, 5.0, 2.0]])
    assert decide_labels(logits, LABELS).tolist() == [0, 1, 5, 0]
    many = torch.randn(3, 500)
    assert torch.equal(decide_labels(many, LABELS), torch.tensor([0, 1, 5])[many.argmax(0)].to(torch.uint8))


def test_regions_are_cut_at_one_half_and_later_ones_win() -> None:
    logits = torch.tensor([[-1.0, 1.0, 1.0, 0.0, -1.0], [-1.0, -1.0, 1.0, 0.0, 1.0]])
    assert decide_labels(logits, REGIONS).tolist() == [0, 1, 2, 0, 2]


def test_large_label_values_fit() -> None:
    schema = LabelSchema({"background": (0,), "far": (300,)})
    grid = OriginalGrid((1, 1, 2), (slice(0, 1), slice(0, 1), slice(0, 2)), (0, 1, 2))
    logits = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1).expand(1, 2, 1, 1, 2)
    restored = restore(slabs_of(logits), (1, 1, 2), grid, schema, "softmax")
    assert restored.label_map.tolist() == [[[300, 300]]]


def test_crop_and_transposition_are_undone() -> None:
    original = np.zeros((4, 6, 5), dtype=np.uint8)
    original[1, 4, 2] = 5
    original[2, 2, 3] = 1
    forward, backward = (2, 0, 1), (1, 2, 0)
    transposed = original.transpose(forward)
    crop = (slice(1, 5), slice(1, 3), slice(2, 5))
    cropped = torch.from_numpy(transposed[crop].copy()).long()
    logits = torch.stack([(cropped == value).float() for value in (0, 1, 5)])[None]
    grid = OriginalGrid((5, 4, 6), crop, backward)
    restored = restore(slabs_of(logits, (2,)), cropped.shape, grid, LABELS, "softmax")
    np.testing.assert_array_equal(restored.label_map, original)
    assert restored.label_map.dtype == np.uint8


def test_probabilities_are_of_the_mean_logits_and_background_fills_the_outside() -> None:
    logits = torch.randn(2, 3, 2, 3, 3)
    grid = OriginalGrid((4, 3, 3), (slice(1, 3), slice(0, 3), slice(0, 3)), (0, 1, 2))
    restored = restore(slabs_of(logits), (2, 3, 3), grid, LABELS, "softmax", Wanted(probabilities=True))
    assert restored.probabilities is not None
    np.testing.assert_allclose(restored.probabilities[:, 1:3] / 255, logits.mean(0).softmax(0).numpy(), atol=3 / 510)
    assert restored.probabilities[:, 0, 0, 0].tolist() == [255, 0, 0]
    np.testing.assert_array_equal(labels_of(restored.probabilities / np.float32(255), LABELS), restored.label_map)
    assert restored.entropy is None


def test_uncertainty_of_folds_that_agree_and_of_folds_that_do_not() -> None:
    sure, other = torch.tensor([20.0, 0.0, 0.0]), torch.tensor([0.0, 20.0, 0.0])
    logits = torch.stack([torch.stack([sure, sure], 1), torch.stack([sure, other], 1)])  # [F,K,2 voxels]
    grid = OriginalGrid((2, 1, 1), (slice(0, 2), slice(0, 1), slice(0, 1)), (0, 1, 2))
    slabs = slabs_of(logits.view(2, 3, 2, 1, 1))
    restored = restore(slabs, (2, 1, 1), grid, LABELS, "softmax", Wanted(uncertainty=True))
    assert restored.entropy is not None
    assert restored.disagreement is not None
    expected = np.log(2) / np.log(3)  # two labels with one half each
    np.testing.assert_allclose(restored.entropy.ravel(), [0, expected], atol=1e-5)
    assert restored.disagreement.ravel().tolist() == [0, 1]
