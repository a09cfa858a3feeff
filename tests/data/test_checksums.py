"""Damage to files that were whole when they were written is noticed, wherever in the file it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autossl.data.checksums import with_checksum, without_checksum, zip_damage
from autossl.data.store import array_damage, open_array, read_source, write_array

Damage = Callable[[bytearray, int], bytearray]


def flipped(content: bytearray, at: int) -> bytearray:
    content[at] ^= 1 << (at % 8)
    return content


def zeroed(content: bytearray, at: int) -> bytearray:
    content[at : at + 512] = bytes(len(content[at : at + 512]))
    return content


def truncated(content: bytearray, at: int) -> bytearray:
    return content[:at]


def arrays() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 9, 20, 30)).astype(np.float32)


@pytest.mark.parametrize("damage", [flipped, zeroed, truncated])
def test_no_damage_to_an_array_stays_hidden(tmp_path: Path, damage: Damage) -> None:
    path, array = tmp_path / "array.b2nd", arrays()
    write_array(path, array, {"file": [3, 4]})
    assert array_damage(path) is None
    whole = path.read_bytes()
    found = 0
    for at in np.linspace(0, len(whole) - 1, 60).astype(int):
        path.write_bytes(damage(bytearray(whole), int(at)))
        if array_damage(path) is not None:
            found += 1
            continue
        np.testing.assert_array_equal(open_array(path)[:], array)  # what no reader looks at may change
        assert read_source(path) == {"file": [3, 4]}
    assert found >= 58


@pytest.mark.parametrize("damage", [flipped, zeroed, truncated])
def test_no_damage_to_a_zip_of_arrays_stays_hidden(tmp_path: Path, damage: Damage) -> None:
    path, array = tmp_path / "locations.npz", arrays()
    np.savez(path, voxels=array)
    assert zip_damage(path) is None
    whole = path.read_bytes()
    found = 0
    for at in np.linspace(0, len(whole) - 1, 60).astype(int):
        path.write_bytes(damage(bytearray(whole), int(at)))
        if zip_damage(path) is not None:
            found += 1
            continue
        with np.load(path, allow_pickle=False) as content:
            np.testing.assert_array_equal(content["voxels"], array)
    assert found >= 55


def test_a_zip_whose_entries_are_compressed_is_not_unpacked(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "bomb.npz", voxels=np.zeros(10**6))
    assert zip_damage(tmp_path / "bomb.npz") == "its entries are compressed"


def test_a_json_object_knows_its_own_content() -> None:
    content = with_checksum({"b": 1.5, "a": [1, "x"]})
    assert list(content) == ["b", "a", "checksum"]
    assert without_checksum(content) == {"b": 1.5, "a": [1, "x"]}
    assert without_checksum({"b": 1}) == {"b": 1}
    with pytest.raises(ValueError, match="checksum does not fit"):
        without_checksum(content | {"b": 2.5})
