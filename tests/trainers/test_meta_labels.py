"""Position, patient and phase of patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch

from autossl.trainers.base import StreamBatch
from autossl.trainers.components.meta_labels import PositionBins, meta_labels, position_bins


def patches(centers: Sequence[Sequence[float]], attributes: Sequence[Mapping[str, str]] | None = None) -> StreamBatch:
    n = len(centers)
    return StreamBatch(
        views=(torch.zeros(n, 1, 4, 4),),
        valids=(torch.ones(n, 1, 4, 4, dtype=torch.bool),),
        case_ids=tuple(f"case {index}" for index in range(n)),
        centers=torch.tensor(centers, dtype=torch.float32),
        attributes=tuple(attributes or ()),
    )


def positions(bins: PositionBins, *centers: Sequence[float]) -> list[int]:
    found = meta_labels(patches(centers), bins)["position"]
    assert found.known.all() == bins.tells_position
    return list(found.values.tolist())


def test_first_and_last_slice_have_the_first_and_last_bin() -> None:
    bins = position_bins((64, 64), (10, 64, 64))
    assert bins.counts == (8, 1, 1)
    middles = [((index + 0.5) / 10, 0.5, 0.5) for index in range(10)]
    labels = positions(bins, *middles)
    assert labels[0] == 0
    assert labels[-1] == 7
    assert labels == sorted(labels)
    assert positions(bins, (0, 0, 0), (1, 1, 1)) == [0, 7], "the ends belong to the outer bins"


@pytest.mark.parametrize(
    ("patch", "extent", "count"), [(60, 100, 1), (59, 100, 3), (50, 100, 3), (25, 100, 4), (20, 100, 6), (10, 100, 8)]
)
def test_number_of_bins(patch: int, extent: float, count: int) -> None:
    """clip(2·round(extent / (2·patch)), 3, 8), where the patch covers less than 60 %."""
    bins = position_bins((patch, 8, 8), (extent, 8, 8))
    assert bins.counts == (count, 1, 1)
    middle = patch / extent / 2
    if count > 1:
        assert positions(bins, (middle, 0.5, 0.5), (1 - middle, 0.5, 0.5)) == [0, count - 1]


def test_the_label_is_the_tuple_over_the_axes_that_tell_it() -> None:
    bins = position_bins((8, 8, 8), (16, 8, 32))
    assert bins.counts == (3, 1, 4)
    places = [(z, y, x) for z in (0.1, 0.5, 0.9) for y in (0.1, 0.9) for x in (0.1, 0.3, 0.6, 0.9)]
    labels = positions(bins, *places)
    assert len(set(labels)) == 12, "one for each pair of bins; y does not count"
    assert labels[:4] == labels[4:8]


def test_a_patch_that_covers_the_case_has_no_position() -> None:
    bins = position_bins((8, 8, 8), (10, 8, 9))
    assert not bins.tells_position
    assert not meta_labels(patches([(0.5, 0.5, 0.5)]), bins)["position"].known.any()
    assert not position_bins((64, 64), (1, 64, 64)).tells_position, "a photograph has one slice"


def test_axes_that_must_not_be_mirrored() -> None:
    assert position_bins((8, 8, 8), (32, 8, 24)).axes_in_patch(3) == (0, 2)
    assert position_bins((8, 8, 8), (8, 8, 8)).axes_in_patch(3) == ()
    assert position_bins((64, 64), (10, 500, 500)).axes_in_patch(2) == (), "the slices are no axis of the patch"


def test_two_phases_of_a_patient_share_it() -> None:
    rows = [{"patient": "p1", "phase": "ED"}, {"patient": "p1", "phase": "ES"}, {"patient": "p2", "phase": "ED"}]
    found = meta_labels(patches([(0.5,) * 3] * 3, rows), position_bins((8, 8), (10, 8, 8)))
    first, second, third = found["patient"].values.tolist()
    assert first == second != third
    first, second, third = found["phase"].values.tolist()
    assert first == third != second
    assert found["patient"].known.all()
    assert found["phase"].known.all()
    assert found["phase"].values.dtype == torch.int64


def test_numbers_are_the_same_in_another_batch() -> None:
    bins = position_bins((8, 8), (10, 8, 8))
    one = meta_labels(patches([(0.5,) * 3], [{"patient": "p1", "site": "p1"}]), bins, phase_key="site")
    two = meta_labels(patches([(0.5,) * 3] * 2, [{"patient": "p2"}, {"patient": "p1"}]), bins)
    assert one["patient"].values[0] == two["patient"].values[1]
    assert one["phase"].values[0] != one["patient"].values[0], "a site of the patient's name is something else"


def test_missing_and_blank_attributes_are_unknown() -> None:
    rows = [{"patient": "p1", "phase": " "}, {"phase": "ED"}, {}]
    found = meta_labels(patches([(0.5,) * 3] * 3, rows), position_bins((8, 8), (10, 8, 8)))
    assert found["patient"].known.tolist() == [True, False, False]
    assert found["phase"].known.tolist() == [False, True, False]
    without_table = meta_labels(patches([(0.5,) * 3] * 2), position_bins((8, 8), (10, 8, 8)))
    assert without_table["patient"].known.tolist() == [False, False]


def test_the_case_has_three_axes() -> None:
    with pytest.raises(ValueError, match=r"case_size \(64, 64\) has 2 axes: expected z, y, x"):
        position_bins((64, 64), (64, 64))
