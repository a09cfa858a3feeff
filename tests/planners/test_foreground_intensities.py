"""Pooled foreground statistics equal those of collecting every draw, in a hundredth of the memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from autossl.data.problems import InvalidInput
from autossl.planners import foreground
from autossl.planners.foreground import (
    IntensityPool,
    WeightedValues,
    draw_foreground,
    draws_per_case,
    foreground_intensities,
    foreground_path,
    load_foreground,
    pool_properties,
    store_foreground,
)
from autossl.planners.plans import IntensityProperties

Floats = npt.NDArray[np.float32]


def _collected(cases: list[Floats], n_draws: int) -> list[Floats]:
    """Draws the long way, as nnU-Net v2 does: one generator per case, channel after channel."""
    channels: list[list[Floats]] = [[] for _ in cases[0]]
    for case in cases:
        generator = np.random.RandomState(1234)
        for channel, values in zip(channels, case, strict=True):
            channel.append(generator.choice(values, n_draws, replace=True))
    return [np.concatenate(channel) for channel in channels]


def _pooled(cases: list[Floats], n_draws: int) -> dict[str, IntensityProperties]:
    pools = [IntensityPool() for _ in cases[0]]
    for case in cases:
        for pool, drawn in zip(pools, draw_foreground(case, n_draws), strict=True):
            pool.add(drawn)
    return pool_properties(pools)


@pytest.mark.parametrize("integers", [True, False])
def test_statistics_equal_those_of_all_draws(integers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreground, "DRAWS_AT_ONCE", 100)  # in pieces: the same draws
    random = np.random.default_rng(0)
    cases = [random.normal(50, 20, size=(2, n)).astype(np.float32) for n in (40, 7, 300)]
    cases = [np.rint(case) for case in cases] if integers else cases
    for found, values in zip(_pooled(cases, 1001).values(), _collected(cases, 1001), strict=True):
        low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
        exact = (found.percentile_00_5, found.median, found.percentile_99_5, found.min, found.max)
        assert exact == (low, median, high, values.min(), values.max())
        assert found.mean == pytest.approx(values.astype(np.float64).mean(), rel=1e-12)
        assert found.std == pytest.approx(values.astype(np.float64).std(), rel=1e-12)


def test_percentiles_interpolate_between_neighboring_draws() -> None:
    pool = IntensityPool()
    pool.add(WeightedValues(np.array([0, 10], np.float32), np.array([1, 1])))
    found = pool.properties()
    assert found is not None
    assert (found.percentile_00_5, found.median, found.percentile_99_5) == pytest.approx((0.05, 5, 9.95))


def test_cases_without_foreground_add_nothing() -> None:
    empty = np.empty((2, 0), np.float32)
    assert [len(drawn.values) for drawn in draw_foreground(empty, 10)] == [0, 0]
    assert _pooled([empty], 10) == {}
    assert _pooled([empty, np.ones((2, 3), np.float32)], 10)["1"].mean == 1


def test_a_pool_that_grows_too_large_is_rounded_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    cases = [random.normal(1000, 200, size=(1, 3000)).astype(np.float32) for _ in range(4)]
    exact = _pooled(cases, 20_000)["0"]
    monkeypatch.setattr(foreground, "LARGEST_POOL", 2000)
    rounded = _pooled(cases, 20_000)["0"]
    assert rounded != exact
    for name, value in exact.model_dump().items():
        assert getattr(rounded, name) == pytest.approx(value, rel=2e-5)


def test_draws_are_shared_out_among_the_labeled_cases() -> None:
    assert [draws_per_case(n) for n in (1, 3, 260)] == [100_000_000, 33_333_333, 384_615]


@pytest.mark.parametrize(
    "values, dtype",
    [([0, 255], np.uint8), ([-1024, 3000], np.int16), ([0, 65535], np.uint16), ([0.5, 1], np.float32)],
)
def test_kept_intensities_come_back_exactly_from_the_smallest_type(
    values: list[float], dtype: type, tmp_path: Path
) -> None:
    import blosc2

    array = np.array([values, values[::-1]], np.float32)
    path = foreground_path(tmp_path, "case_1")
    store_foreground(path, array)
    assert path == tmp_path / "foreground" / "case_1.b2nd"
    assert blosc2.open(str(path)).dtype == dtype
    loaded = load_foreground(path)
    assert loaded.dtype == np.float32
    assert np.array_equal(loaded, array)


def test_statistics_of_some_cases_are_those_of_a_dataset_of_just_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreground, "DRAWS_IN_ALL", 3000)
    random = np.random.default_rng(2)
    cases = {name: random.integers(-100, 400, size=(2, 50)).astype(np.float32) for name in "abc"}
    for name, values in cases.items():
        store_foreground(foreground_path(tmp_path, name), values)
    found = foreground_intensities(tmp_path, ["c", "a"])
    assert found == _pooled([cases["a"], cases["c"]], 1500)
    assert found != foreground_intensities(tmp_path, list(cases))


def test_intensities_that_were_not_kept_or_are_damaged_say_what_to_run(tmp_path: Path) -> None:
    foreground_path(tmp_path, "b").parent.mkdir()
    foreground_path(tmp_path, "b").write_bytes(b"damaged")
    flipped = foreground_path(tmp_path, "c")
    store_foreground(flipped, np.random.default_rng(0).normal(size=(1, 3000)).astype(np.float32))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    for case in "abc":
        with pytest.raises(InvalidInput, match=rf"{case}\.b2nd.*--verify_dataset_integrity"):
            foreground_intensities(tmp_path, [case])
