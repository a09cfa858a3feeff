"""Normalization schemes: closed forms, the mask's meaning, and what a wrong image is told."""

from __future__ import annotations

import numpy as np
import pytest

from autossl.data.problems import InvalidInput
from autossl.planners.plans import IntensityProperties
from autossl.preprocessing.normalize import normalize_channel

PROPERTIES = IntensityProperties(
    mean=40.0, std=20.0, min=-5.0, max=900.0, median=38.0, percentile_00_5=0.0, percentile_99_5=100.0
)


@pytest.fixture
def volume() -> np.ndarray:
    return np.random.default_rng(0).normal(100, 15, (4, 5, 6)).astype(np.float32)


def test_z_score_has_mean_zero_and_deviation_one(volume: np.ndarray) -> None:
    before = volume.copy()
    found = normalize_channel(volume, "ZScoreNormalization")
    assert found.mean() == pytest.approx(0, abs=1e-5)
    assert found.std() == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(volume, before)


def test_z_score_keeps_its_digits_where_the_mean_is_large() -> None:
    offsets = np.tile(np.array([-1, 1], dtype=np.float32), 500_000).reshape(10, 100, 1000)
    found = normalize_channel(offsets + np.float32(30_000), "ZScoreNormalization")
    np.testing.assert_allclose(found, offsets, atol=1e-5)


def test_a_mask_limits_the_statistics_and_the_change(volume: np.ndarray) -> None:
    mask = np.zeros(volume.shape, dtype=bool)
    mask[:2] = True
    volume[~mask] = 0
    found = normalize_channel(volume, "ZScoreNormalization", mask=mask)
    assert found[mask].mean() == pytest.approx(0, abs=1e-5)
    assert found[mask].std() == pytest.approx(1, abs=1e-5)
    assert (found[~mask] == 0).all()


def test_an_empty_mask_and_a_constant_image_give_finite_values(volume: np.ndarray) -> None:
    nothing = np.zeros(volume.shape, dtype=bool)
    np.testing.assert_array_equal(normalize_channel(volume, "ZScoreNormalization", mask=nothing), volume)
    for scheme in ("ZScoreNormalization", "RescaleTo01Normalization"):
        assert (normalize_channel(np.full((2, 2, 2), 7, dtype=np.float32), scheme) == 0).all()


def test_ct_is_clipped_and_scaled_by_the_dataset() -> None:
    found = normalize_channel(np.array([[[-500, 40, 60, 5000]]], dtype=np.float32), "CTNormalization", PROPERTIES)
    np.testing.assert_allclose(found.ravel(), [-2, 0, 1, 3], atol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("NoNormalization", [0, 51, 255]),
        ("RescaleTo01Normalization", [0, 0.2, 1]),
        ("RGBTo01Normalization", [0, 0.2, 1]),
    ],
)
def test_plain_schemes(scheme: str, expected: list[float]) -> None:
    found = normalize_channel(np.array([[[0, 51, 255]]], dtype=np.float32), scheme)
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-6)


def test_wrong_images_and_plans_are_told_what_to_do() -> None:
    volume = np.array([[[-3, 300]]], dtype=np.float32)
    with pytest.raises(InvalidInput, match=r"-3 to 300.*0 to 255.*channel_names"):
        normalize_channel(volume, "RGBTo01Normalization")
    with pytest.raises(InvalidInput, match="without intensity properties.*plan again"):
        normalize_channel(volume, "CTNormalization")
    with pytest.raises(InvalidInput, match="'ZScore'.*ZScoreNormalization"):
        normalize_channel(volume, "ZScore")
