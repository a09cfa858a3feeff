"""Stored probabilities: how exact they are, that decisions survive them, and means that stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from autossl.data.labels import LabelSchema
from autossl.data.probabilities import (
    ROWS_AT_ONCE,
    labels_of,
    mean_of,
    probabilities_file,
    quantize,
    read_probabilities,
    write_probabilities_quantized,
)
from autossl.data.problems import InvalidInput
from autossl.data.store import write_array

LABELS = LabelSchema({"background": (0,), "organ": (1,), "tumor": (5,)})
REGIONS = LabelSchema({"background": (0,), "whole": (1, 2), "core": (2,)}, regions_class_order=(1, 2))
N_ROWS = 2 * ROWS_AT_ONCE + 3


def made_up(seed: int = 0, n_outputs: int = 3) -> npt.NDArray[np.float32]:
    """[K,z,y,x] that sums to 1; in the first rows all outputs are nearly equal."""
    generator = np.random.default_rng(seed)
    values = generator.dirichlet([0.3] * n_outputs, (N_ROWS, 9, 7)).transpose(3, 0, 1, 2)
    values[:, :4] = 1 / n_outputs + generator.normal(0, 1e-4, (n_outputs, 4, 9, 7))
    return values.astype(np.float32)


def test_values_come_back_within_half_a_step(tmp_path: Path) -> None:
    path = probabilities_file(tmp_path, "case")
    assert path == tmp_path / "probabilities" / "case.b2nd"
    values = made_up()
    write_probabilities_quantized(path, values)
    read = read_probabilities(path)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, values, atol=1.01 / 510)
    np.testing.assert_array_equal(read_probabilities(path, slice(7, 10)), read[:, 7:10])
    exact = np.linspace(0, 1, 256, dtype=np.float32).reshape(1, 4, 8, 8)
    write_probabilities_quantized(path, exact)
    np.testing.assert_allclose(read_probabilities(path), exact, rtol=1e-6)


def test_labels_are_the_same_after_quantizing() -> None:
    values = made_up()
    kept = quantize(values, keep_largest=True) / np.float32(255)
    np.testing.assert_array_equal(labels_of(kept, LABELS), labels_of(values, LABELS))
    np.testing.assert_allclose(kept, values, atol=3.01 / 510)
    rounded = quantize(values) / np.float32(255)
    assert np.any(labels_of(rounded, LABELS) != labels_of(values, LABELS))  # why the largest needs keeping
    assert labels_of(np.array([[0.2], [0.2], [0.6]]), LABELS).tolist() == [5]


def test_regions_are_the_same_after_quantizing() -> None:
    around_half = np.array([0.0, 0.498, 0.4999999, 0.5, 0.5000001, 0.502, 1.0], dtype=np.float32)
    pairs = np.stack(np.meshgrid(around_half, around_half))
    np.testing.assert_array_equal(labels_of(quantize(pairs) / np.float32(255), REGIONS), labels_of(pairs, REGIONS))
    assert labels_of(np.array([[0.4, 0.6, 0.6], [0.4, 0.4, 0.6]]), REGIONS).tolist() == [0, 1, 2]


def test_the_mean_streams_and_can_be_written_again(tmp_path: Path) -> None:
    paths = [tmp_path / f"{seed}.b2nd" for seed in range(3)]
    for seed, path in enumerate(paths):
        write_probabilities_quantized(path, made_up(seed))
    slabs = list(mean_of(paths))
    assert len(slabs) == 3
    expected = sum(read_probabilities(path) for path in paths) / 3
    np.testing.assert_allclose(np.concatenate(slabs, 1), expected, atol=1e-6)
    write_probabilities_quantized(tmp_path / "mean.b2nd", mean_of(paths))
    np.testing.assert_allclose(read_probabilities(tmp_path / "mean.b2nd"), expected, atol=1.01 / 510)
    write_probabilities_quantized(tmp_path / "same.b2nd", mean_of(paths[:1] * 2))
    np.testing.assert_array_equal(read_probabilities(tmp_path / "same.b2nd"), read_probabilities(paths[0]))


def test_faults_are_named(tmp_path: Path) -> None:
    whole = tmp_path / "whole.b2nd"
    write_probabilities_quantized(whole, made_up())
    with pytest.raises(InvalidInput, match="does not exist.*--save_probabilities"):
        read_probabilities(tmp_path / "none.b2nd")
    cut = tmp_path / "cut.b2nd"
    cut.write_bytes(whole.read_bytes()[:200])
    with pytest.raises(InvalidInput, match="cut.b2nd"):
        mean_of([whole, cut])
    other = tmp_path / "other.b2nd"
    write_array(other, made_up())
    with pytest.raises(InvalidInput, match="4 axes and float32"):
        read_probabilities(other)
    fewer = tmp_path / "fewer.b2nd"
    write_probabilities_quantized(fewer, made_up(n_outputs=2))
    with pytest.raises(InvalidInput, match=r"shape \(2, 19, 9, 7\).*\(3, 19, 9, 7\)"):
        mean_of([whole, fewer])
    with pytest.raises(InvalidInput, match="no probabilities to average"):
        mean_of([])


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no slab"):
        write_probabilities_quantized(tmp_path / "case.b2nd", [])
    assert list(tmp_path.iterdir()) == []
