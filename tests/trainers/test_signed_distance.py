"""Normalized signed distance maps: closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from autossl.trainers.components.geometry import signed_distance


def test_closed_form_in_one_dimension():
    distance = signed_distance(np.array([[0, 0, 1, 1, 1]], dtype=bool), (1, 1))
    np.testing.assert_allclose(distance, [[1, 0.5, 0, -2 / 3, -1]], atol=1e-6)


def test_empty_and_full_masks():
    assert (signed_distance(np.zeros((3, 4), dtype=bool), (1, 1)) == 1).all()
    assert (signed_distance(np.ones((3, 4), dtype=bool), (1, 1)) == -1).all()


def test_spacing_counts():
    mask = np.zeros((5, 5), dtype=bool)
    mask[2, 2] = True
    distance = signed_distance(mask, (3.0, 1.0))
    assert distance[2, 2] == 0
    assert distance[0, 2] / distance[2, 0] == pytest.approx(3)
    assert distance.max() == distance[0, 0] == 1


def test_slice_mode_treats_each_plane_for_itself():
    mask = np.zeros((3, 4, 5), dtype=bool)
    mask[0, 1:3, 1:3] = True
    mask[1, 0, 0] = True
    distance = signed_distance(mask, (9.0, 1.0, 1.0), "slice")
    for plane, expected in zip(mask, distance, strict=True):
        np.testing.assert_array_equal(signed_distance(plane, (1.0, 1.0)), expected)
    assert (distance[2] == 1).all()
